"""Plan, ledger and verdict -> terminal, JSON, JUnit, HTML, and what GitHub shows of a run.

Nothing is decided here: what a verdict means stands in it. On a terminal a verdict is one screen;
its files hold every figure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_export.errors import InputRefused
from lora_export.report import github
from lora_export.report.documents import Placement, as_dict, document
from lora_export.report.html import page, require_jinja2
from lora_export.report.junit_xml import junit, junit_of_weights
from lora_export.report.terminal import (
    console,
    placed,
    print_adapter,
    print_merge_report,
    print_plan,
    print_verdict,
    screen,
)
from lora_export.storage import atomic_output
from lora_export.verification.against_checkpoint import Audit
from lora_export.verification.parity import Verdict

__all__ = [
    "as_dict",
    "check_path",
    "console",
    "document",
    "github",
    "junit",
    "page",
    "placed",
    "print_adapter",
    "print_merge_report",
    "print_plan",
    "print_verdict",
    "screen",
    "write",
]


def check_path(path: Path) -> None:
    """To be asked before the work is done: raise InputRefused for a report that `write` could not write.

    Raises EnvironmentLacking where it is HTML and jinja2 is missing.
    """
    if path.suffix not in (".json", ".xml", ".html"):
        raise InputRefused(
            f"{path}: a report is .json (every figure), .xml (JUnit, for CI) or .html (to read and to show); name it so"
        )
    if path.suffix == ".html":
        require_jinja2()


def write(
    path: Path,
    verdict: Verdict | Audit,
    *,
    placement: Placement | None = None,
    about: Mapping[str, Any] | None = None,
    diagnosis: Any = None,
    exit_code: int | None = None,
    seconds: float = 0.0,
) -> None:
    """Write a report, as JSON, JUnit XML or HTML by the path's suffix, whole or not at all; an older one is replaced.

    Raises InputRefused for another suffix and OutputFailed where it cannot be written.
    """
    check_path(path)
    if path.suffix == ".xml":
        content = (
            junit_of_weights(verdict, about, seconds=seconds)
            if isinstance(verdict, Audit)
            else junit(verdict, placement, about, seconds=seconds)
        )
    else:
        told = document(verdict, placement, about, diagnosis, exit_code)
        content = page(told) if path.suffix == ".html" else json.dumps(told, indent=2, allow_nan=False) + "\n"
    with atomic_output.stage_file(path, inputs=[], overwrite=True) as stage:
        (stage / path.name).write_text(content, encoding="utf-8")
