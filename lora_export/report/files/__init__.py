"""Reports as files: one module for each, found by itself.

To add a report, write `report/files/NAME.py` with what `ReportFile` asks for, and its test. `write_report` and the
option `reports` of `verify` then take its suffix.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import pkgutil
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from lora_export.errors import InputRefused
from lora_export.report.json_document import AnyProof
from lora_export.storage import atomic_output, input_files
from lora_export.storage.manifest import MANIFEST


class ReportFile(Protocol):
    """What the module of a report provides.

    One that needs a package has `require` too, which raises EnvironmentLacking without it, before any work.
    """

    __name__: str
    SUFFIX: str  # of the files: ".json"
    PURPOSE: str  # what such a report is for, for messages: "every figure"

    def of_proof(self, proof: AnyProof) -> str:
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


def check_report_path(path: Path, inputs: Iterable[Path] = ()) -> None:
    """Check a report's path before the work begins. `inputs` are the files and folders that the command reads.

    Raises InputRefused where `write_report` could not write it, or would overwrite an input or what is no report, and
    EnvironmentLacking where a package is missing that the report needs.
    """
    kind = _kind_of(path)
    for source in inputs:
        is_inside = path.exists() and path.resolve().is_relative_to(source.resolve())
        if is_inside and not (source.is_dir() and is_report(path)):
            raise InputRefused(f"{path} is an input, or a file of {source}. Write the report elsewhere")
    refuse_other_file(path)
    getattr(kind, "require", lambda: None)()


class _Tried(Exception):
    """The file could be written, and is not."""


def try_report_place(path: Path) -> None:
    """Raise OutputFailed where no report could be written at a path: before the work, not with its verdict."""
    with contextlib.suppress(_Tried), atomic_output.stage_file(path, inputs=[], overwrite=True):
        raise _Tried


def _kind_of(path: Path) -> ReportFile:
    kinds = report_files()
    if kind := kinds.get(path.suffix):
        return kind
    *others, last = (f"{suffix} ({kind.PURPOSE})" for suffix, kind in kinds.items())
    raise InputRefused(f"{path}: unknown report format. Name it {', '.join(others)} or {last}")


# How reports begin. A page, a README or the results of pytest may name the program, too.
REPORT_BEGINNING = (
    r'\{\s+"schema": "lora-export/|<\?xml .*\n<testsuites name="lora-export |<svg .*aria-label="lora-export: |'
    r"## Proof\s|<!doctype html>(.*\n){1,9}<title>.* – lora-export (verify|fleet)</title>"
)


def is_report(path: Path) -> bool:
    """Whether an existing file is a report of this program: a manifest and a config are none."""
    with input_files.open_regular(path) as file:
        beginning = file.read(4096).decode(errors="replace")
    return path.name != MANIFEST and re.match(REPORT_BEGINNING, beginning) is not None


def refuse_other_file(path: Path) -> None:
    """Raise InputRefused for an existing file that is no report of this program, and not empty."""
    if path.is_file() and path.stat().st_size and not is_report(path):
        raise InputRefused(f"{path} exists and is no report")


def write_report(path: Path, proof: AnyProof) -> None:
    """Write a report of a verdict. An existing report is replaced.

    The file is either written completely, or unchanged. Raises InputRefused for a suffix that no report has, and
    OutputFailed where the file cannot be written.
    """
    check_report_path(path)
    replace_report(path, _kind_of(path).of_proof(proof))


def write_error_report(path: Path, error: Mapping[str, Any], *, seconds: float = 0.0) -> None:
    """Write a report of an error that ended the command before there was a verdict. Otherwise as `write_report`.

    `error` is its JSON document (see `ReportFile.of_error`); `seconds` is the duration of the run.
    """
    check_report_path(path)
    replace_report(path, _kind_of(path).of_error(error, seconds))


def replace_report(path: Path, content: str) -> None:
    """Write the text of a report, completely or not at all. An existing file is replaced."""
    with atomic_output.stage_file(path, inputs=[], overwrite=True) as stage:
        (stage / path.name).write_text(content, encoding="utf-8", newline="\n")
