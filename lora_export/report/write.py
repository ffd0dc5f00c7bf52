"""A report as a file: JSON, JUnit XML or HTML, by the suffix of its path."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lora_export.errors import InputRefused
from lora_export.report.html import html_page, page_of_error, require_jinja2
from lora_export.report.json_document import verdict_document
from lora_export.report.junit_xml import junit, junit_of_error, junit_of_weights
from lora_export.runtime.runner import Placement
from lora_export.storage import atomic_output
from lora_export.storage.manifest import MANIFEST
from lora_export.verification.against_checkpoint import Audit
from lora_export.verification.diagnose.diagnosis import Diagnosis
from lora_export.verification.parity import Verdict


def check_report_path(path: Path, inputs: Iterable[Path] = ()) -> None:
    """Check a report's path before the work begins. `inputs` are the files and folders that the command reads.

    Raises InputRefused where `write_report` could not write it or would overwrite an input, and EnvironmentLacking
    where it is HTML and jinja2 is missing.
    """
    if path.suffix not in (".json", ".xml", ".html"):
        raise InputRefused(
            f"{path}: unknown report format. Name it .json (every figure), .xml (JUnit, for CI) or .html (to read)"
        )
    for source in inputs:
        is_inside = path.exists() and path.resolve().is_relative_to(source.resolve())
        if is_inside and not (source.is_dir() and _is_report(path)):
            raise InputRefused(f"{path} is an input, or a file of {source}. Write the report elsewhere")
    if path.suffix == ".html":
        require_jinja2()


def _is_report(path: Path) -> bool:
    """Whether an existing file is a report of this program: a manifest and a config are none."""
    with path.open("rb") as file:
        beginning = file.read(4096)
    return path.name != MANIFEST and b"lora-export" in beginning


def write_report(
    path: Path,
    verdict: Verdict | Audit,
    *,
    placement: Placement | None = None,
    about: Mapping[str, Any] | None = None,
    diagnosis: Diagnosis | None = None,
    exit_code: int | None = None,
    seconds: float = 0.0,
) -> None:
    """Write a report as JSON, JUnit XML or HTML, by the suffix of the path. An existing file is replaced.

    The file is either written completely, or unchanged. `exit_code` is the exit code of the command, where it is not
    that of the verdict; `seconds` is the duration of the run.

    Raises InputRefused for another suffix, and OutputFailed where the file cannot be written.
    """
    check_report_path(path)
    if path.suffix == ".xml":
        content = (
            junit_of_weights(verdict, about, seconds=seconds)
            if isinstance(verdict, Audit)
            else junit(verdict, placement, about, diagnosis, seconds=seconds)
        )
    else:
        evidence = verdict_document(verdict, placement, about, diagnosis, exit_code)
        content = html_page(evidence) if path.suffix == ".html" else _json(evidence)
    _replace(path, content)


def write_error_report(path: Path, error: Mapping[str, Any], *, seconds: float = 0.0) -> None:
    """Write a report of an error that ended the command before there was a verdict. Otherwise as `write_report`.

    `error` is its JSON document: `error` (the message), `exit` (the code), `kind`, `command` and more.
    """
    check_report_path(path)
    if path.suffix == ".xml":
        about = {name: error[name] for name in ("command", "exit", "kind")}
        content = junit_of_error(error["error"], error["kind"], about, seconds=seconds)
    else:
        content = page_of_error(error) if path.suffix == ".html" else _json(error)
    _replace(path, content)


def _json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def _replace(path: Path, content: str) -> None:
    with atomic_output.stage_file(path, inputs=[], overwrite=True) as stage:
        (stage / path.name).write_text(content, encoding="utf-8", newline="\n")
