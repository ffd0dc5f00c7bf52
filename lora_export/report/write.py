"""A report as a file, whose suffix selects the kind of report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.errors import InputRefused
from lora_export.report.files import ReportFile, report_files
from lora_export.storage import atomic_output
from lora_export.storage.manifest import MANIFEST

if TYPE_CHECKING:
    from lora_export.verification.against_checkpoint import Audit
    from lora_export.verification.proof import Proof


def check_report_path(path: Path, inputs: Iterable[Path] = ()) -> None:
    """Check a report's path before the work begins. `inputs` are the files and folders that the command reads.

    Raises InputRefused where `write_report` could not write it or would overwrite an input, and EnvironmentLacking
    where a package is missing that the report needs.
    """
    kind = _kind_of(path)
    for source in inputs:
        is_inside = path.exists() and path.resolve().is_relative_to(source.resolve())
        if is_inside and not (source.is_dir() and _is_report(path)):
            raise InputRefused(f"{path} is an input, or a file of {source}. Write the report elsewhere")
    kind.require()


def _kind_of(path: Path) -> ReportFile:
    kinds = report_files()
    if (found := kinds.get(path.suffix)) is not None:
        return found
    *others, last = (f"{suffix} ({kind.PURPOSE})" for suffix, kind in kinds.items())
    raise InputRefused(f"{path}: unknown report format. Name it {', '.join(others)} or {last}")


def _is_report(path: Path) -> bool:
    """Whether an existing file is a report of this program: a manifest and a config are none."""
    with path.open("rb") as file:
        beginning = file.read(4096)
    return path.name != MANIFEST and b"lora-export" in beginning


def write_report(path: Path, proof: Proof | Audit) -> None:
    """Write a report of a verdict. An existing file is replaced.

    The file is either written completely, or unchanged. Raises InputRefused for a suffix that no report has, and
    OutputFailed where the file cannot be written.
    """
    check_report_path(path)
    _replace(path, _kind_of(path).of_proof(proof))


def write_error_report(path: Path, error: Mapping[str, Any], *, seconds: float = 0.0) -> None:
    """Write a report of an error that ended the command before there was a verdict. Otherwise as `write_report`.

    `error` is its JSON document (see `ReportFile.of_error`); `seconds` is the duration of the run.
    """
    check_report_path(path)
    _replace(path, _kind_of(path).of_error(error, seconds))


def _replace(path: Path, content: str) -> None:
    with atomic_output.stage_file(path, inputs=[], overwrite=True) as stage:
        (stage / path.name).write_text(content, encoding="utf-8", newline="\n")
