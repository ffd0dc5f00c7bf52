"""Reports as files: one module for each, found by itself.

To add a report, write `report/files/NAME.py` with what `ReportFile` asks for, and its test. `write_report` and the
option `reports` of `verify` then take its suffix.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from lora_export.verification.against_checkpoint import Audit
    from lora_export.verification.proof import Proof


class ReportFile(Protocol):
    """What the module of a report provides."""

    __name__: str
    SUFFIX: str  # of the files: ".json"
    PURPOSE: str  # what such a report is for, for messages: "every figure"

    def require(self) -> None:
        """Raise EnvironmentLacking where a package is missing that the report needs. Called before any work."""

    def of_proof(self, proof: Proof | Audit) -> str:
        """The report of a verdict, as the text of the file."""

    def of_error(self, error: Mapping[str, Any], seconds: float) -> str:
        """The report of an error that ended the command before there was a verdict; `seconds` is how long it ran.

        `error` is its JSON document: `error` (the message), `exit` (the code), `kind`, `command` and more.
        """


@functools.cache
def report_files() -> Mapping[str, ReportFile]:
    """Suffix -> the module of this report."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [cast(ReportFile, importlib.import_module(f"{__name__}.{name}")) for name in names]
    return {module.SUFFIX: module for module in modules}
