"""Writing a report: the suffix selects the format, and a path is checked before the work."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lora_export.errors import EnvironmentLacking, InputRefused, OutputFailed
from lora_export.report import files
from lora_export.report.files import badge, card, check_report_path, figures, write_report
from lora_export.report.json_document import document_of_proof
from lora_export.verification.proof import Proof
from support.verdicts import ABOUT, DIAGNOSIS, DIFFERENT, NOTHING, ON_CPU, SAME, STRAYED, UNDECIDED


def test_suffix_selects_the_format_and_existing_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "junit.xml"
    write_report(path, Proof(DIFFERENT))
    write_report(path, Proof(SAME, ON_CPU, seconds=2))
    root = ElementTree.parse(path).getroot()
    assert (root.attrib["tests"], root.attrib["failures"], root.attrib["time"]) == ("9", "0", "2.000")
    assert [each.name for each in tmp_path.iterdir()] == ["junit.xml"]


@pytest.mark.parametrize("name", ["report.txt", "report", "report.htm"])
def test_unknown_suffix_is_refused_before_and_after_the_work(tmp_path: Path, name: str) -> None:
    message = r"unknown report format. Name it \.svg .*, \.md .*, \.json .*, \.xml .* or \.html"
    with pytest.raises(InputRefused, match=message):
        check_report_path(tmp_path / name)
    with pytest.raises(InputRefused, match=message):
        write_report(tmp_path / name, Proof(SAME))
    assert list(tmp_path.iterdir()) == []


def test_folder_of_a_report_is_created(tmp_path: Path) -> None:
    write_report(tmp_path / "no" / "such" / "report.json", Proof(SAME))
    assert (tmp_path / "no/such/report.json").is_file()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("README.md", "by somebody"),
        ("page.html", "<!doctype html>\n<title>How we use lora-export verify</title>\n<p>by somebody"),
        ("README.md", "# A LoRA adapter\n\nTrained by `lora-export train`; PEFT loads this folder."),
        ("README.md", "# My model\n\n## Proof\n\nBy lora-export 0.1.0:"),
        (
            "junit.xml",
            '<?xml version="1.0"?><testsuites name="pytest tests"><testsuite name="lora-export"/>',
        ),
    ],
)
def test_what_is_no_report_is_not_replaced(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    for write in (lambda path: write_report(path, Proof(SAME)), check_report_path):
        with pytest.raises(InputRefused, match="exists and is no report"):
            write(tmp_path / name)
    assert (tmp_path / name).read_text() == text


@pytest.mark.parametrize("suffix", files.report_files())
def test_reports_of_verdicts_and_of_errors_are_replaced(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"report{suffix}"
    error = {"schema": "lora-export/error/1", "error": "no", "exit": 3, "kind": "input", "command": ["lora-export"]}
    for _ in range(2):
        write_report(path, Proof(SAME, ON_CPU, ABOUT))
        before = path.read_bytes()
        files.write_error_report(path, error)
        assert path.read_bytes() != before


def test_report_below_a_file_is_an_output_failure(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputFailed, match="is not a folder"):
        write_report(tmp_path / "file" / "report.json", Proof(SAME))


def test_html_without_jinja2_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)  # as where it is not installed
    with pytest.raises(EnvironmentLacking, match=r"pip install 'jinja2>="):
        check_report_path(tmp_path / "page.html")
    check_report_path(tmp_path / "page.json")


def test_a_report_is_a_module_with_a_suffix_of_its_own() -> None:
    modules = {path.stem for path in Path(files.__path__[0]).glob("*.py")} - {"__init__"}
    assert {".json", ".xml", ".html"} <= set(files.report_files())
    assert {module.__name__.rpartition(".")[2] for module in files.report_files().values()} == modules


# --- A card and a badge ---


def test_a_card_has_the_verdict_the_hashes_and_the_command() -> None:
    about = ABOUT | {"command": ["lora-export", "verify", "a b.onnx"], "adapters": [
        {"name": "<b>|x", "sha256": "12ab", "weight": 0.5}], "lora_export": "0.1.0"}  # fmt: skip
    text = card.of_proof(Proof(SAME, ON_CPU, about))
    assert f"**{SAME.headline}**" in text and "fp64" in text and "lora-export verify 'a b.onnx'" in text
    assert r"| adapter, × 0.5 | &lt;b&gt;\|x | `12ab` |" in text and text.count("12ab") == 1
    assert "By lora-export 0.1.0:" in text and "to detect what is wrong on purpose: adapter off, scale × 1.1." in text
    named = card.of_proof(Proof(SAME, ON_CPU, about | {"candidate": "a`*b*.onnx"}))
    assert rf"a\`\*b\*.onnx: **{SAME.headline}**" in named
    ended = card.of_error({"error": "no | file", "command": ["lora-export", "verify", "x"]}, 1.0)
    assert r"Nothing was proven: no \| file" in ended and "same" not in ended


def test_a_card_claims_no_comparison_and_no_control_that_was_not_made() -> None:
    assert "It did not detect: tolerance, adapter off." in card.of_proof(Proof(UNDECIDED, ON_CPU, ABOUT))
    text = card.of_proof(Proof(NOTHING, None, ABOUT))
    assert "nothing was compared" in text and "fp64" not in text and "detect" not in text


@pytest.mark.parametrize(
    ("proof", "message"), [(Proof(SAME), "proven: same"), (Proof(DIFFERENT), "different"), (None, "not proven")]
)
def test_a_badge_is_a_picture_of_the_outcome(proof: Proof | None, message: str) -> None:
    text = badge.of_error({"error": "x"}, 1.0) if proof is None else badge.of_proof(proof)
    root = ElementTree.fromstring(text)
    label, shown = (each.text for each in root.iter("{http://www.w3.org/2000/svg}text"))
    assert (label, shown) == ("lora-export", message)
    assert root.attrib["aria-label"] == f"lora-export: {message}" and "<script" not in text


# --- Every figure, as JSON: of a verdict, and of an error that ended the command. ---


def test_the_file_has_the_document_of_the_proof() -> None:
    proof = Proof(DIFFERENT, STRAYED, ABOUT, diagnosis=DIAGNOSIS)
    text = figures.of_proof(proof)
    assert text.endswith("}\n") and json.loads(text) == json.loads(json.dumps(document_of_proof(proof)))


def test_an_error_is_its_own_document() -> None:
    assert (
        figures.of_error({"error": "no such file", "exit": 3}, 2.0) == '{\n  "error": "no such file",\n  "exit": 3\n}\n'
    )
