"""The summary of a verdict as Markdown."""

from __future__ import annotations

from pathlib import Path

from lora_export.report.files import markdown
from lora_export.report.write import write_report
from lora_export.verification.proof import Proof
from support.verdicts import ABOUT, DIFFERENT


def test_a_summary_names_the_candidate(tmp_path: Path) -> None:
    write_report(tmp_path / "verdict.md", Proof(DIFFERENT, about=ABOUT))
    assert (tmp_path / "verdict.md").read_text(encoding="utf-8").startswith("### ❌ model.onnx: different\n")


def test_an_error_is_its_message() -> None:
    assert markdown.of_error({"error": "no such file"}, 2.0) == "### failed after 2 s\n\nno such file\n"
