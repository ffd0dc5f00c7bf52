"""What installs the packages that a feature needs, whether the program came from an index or from a clone."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

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
