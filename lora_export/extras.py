"""What installs the packages that a feature needs, whether the program came from an index or from a clone."""

from __future__ import annotations

import contextlib
import importlib
from typing import TYPE_CHECKING, Any

from lora_export.errors import EnvironmentLacking

if TYPE_CHECKING:
    from importlib.metadata import Distribution

DISTRIBUTIONS = ("lora-export", "lora-export-core")  # each has the package, or requires the other


def installed() -> list[Distribution]:
    """Those of the program's distributions that are installed."""
    import importlib.metadata  # imported here: it brings the package email, and few processes need it

    found = []
    for name in DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(importlib.metadata.distribution(name))
    return found


def optional_package(name: str, needs: str, extra: str, *packages: str) -> Any:
    """Import a package of an extra. Raises EnvironmentLacking without it, with `needs` ("sounds need") before it."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: a library that it loads is missing
        raise EnvironmentLacking(f"{needs} {name} ({error}): {pip_install(extra, *packages)}") from error


def pip_install(extra: str, *packages: str) -> str:
    """The command that installs the packages of an extra, by their requirements: `pip install 'jinja2>=3.1'`.

    `packages` chooses some of them. Without the metadata of an installation, the command names the extra.
    """
    from packaging.requirements import Requirement

    requirements = map(Requirement, dict.fromkeys(line for own in installed() for line in own.requires or ()))
    markers = ((one, one.marker) for one in requirements)
    of_extra = [
        one for one, marker in markers if marker and "extra" in str(marker) and marker.evaluate({"extra": extra})
    ]
    named = [f"{one.name}{one.specifier}" for one in of_extra if not packages or one.name in packages]
    words = " ".join(f"'{one}'" for one in named or [f"{DISTRIBUTIONS[0]}[{extra}]"])
    return f"pip install {words}"
