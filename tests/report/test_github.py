"""GitHub's annotations and summary: they show the verdict, and a name in a file cannot become a command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from lora_export import cli, errors
from lora_export.report import github
from lora_export.verification.parity import judge
from lora_export.verification.proof import Proof
from support import FACTORIES
from support.verdicts import DIAGNOSIS, DIFFERENT, SAME, STRAYED, UNDECIDED, case

HOSTILE = "a\n::add-mask::b ##[error]c | <b>@everyone</b> [x](y) 50%,:\r`"


def test_reason_is_an_error_with_its_remedy() -> None:
    (line,) = github.workflow_commands(Proof(UNDECIDED), "verify m.onnx")
    assert line.startswith('::error title=verify m.onnx%3A undecided::logits in case 2 x 300: control "tolerance')
    assert "%0Awhat would decide it: an atol= below 64 with rtol=0" in line
    assert [line.partition("::logits")[0] for line in github.workflow_commands(Proof(DIFFERENT), "v")][:2] == [
        "::error title=v%3A different",
        "::error title=v%3A different",
    ]


def test_same_is_a_notice_with_the_headline() -> None:
    headline = "same: error 0.39 %25 of the adapter's effect, 2 × PyTorch's own rounding (limit 2 ×), 2 cases"
    assert list(github.workflow_commands(Proof(SAME), "v")) == [f"::notice title=v::{headline}"]


def test_diagnosis_is_the_first_annotation() -> None:
    first, second, *_ = github.workflow_commands(Proof(DIFFERENT, diagnosis=DIAGNOSIS), "v")
    assert first.startswith("::error title=v%3A different::The first module that differs is encoder.1.%0A")
    assert "%0Aits adapter's scale, 2, is applied twice" in first
    assert "::logits in case bad: the error is 1" in second


def test_diagnosis_comes_first_in_the_summary() -> None:
    lines = github.summary(Proof(DIFFERENT, diagnosis=DIAGNOSIS), "verify m.onnx").splitlines()
    first = lines.index("- **The first module that differs is encoder.1.**  ")
    assert lines[first + 1] == "  its adapter's scale, 2, is applied twice  "
    assert lines[first + 3].startswith("- logits in case bad: the error is 1")
    assert "applied twice" not in github.summary(Proof(DIFFERENT), "verify m.onnx")


def test_what_the_file_records_comes_before_the_diagnosis() -> None:
    verdict = dataclasses.replace(DIFFERENT, recorded=("You gave no adapters=; this file contains `fr`.",))
    proof = Proof(verdict, diagnosis=DIAGNOSIS)
    first, *_ = github.workflow_commands(proof, "v")
    assert "different::You gave no adapters=; this file contains `fr`.%0AThe first module that differs is" in first
    text = github.summary(proof, "v")
    assert "- **You gave no adapters=; this file contains \\`fr\\`.**  \n  The first module" in text


def test_no_name_ends_or_begins_a_command() -> None:
    for line in github.workflow_commands(Proof(judge([case(1.0, name=HOSTILE, output=HOSTILE)])), HOSTILE):
        assert "\n" not in line and "\r" not in line
        assert line.startswith("::error title=a\\n%3A%3Aadd-mask%3A%3Ab ")
        assert "50%25" in line and "title=" in line.partition("%2C")[0]


def test_summary_has_headline_and_table_of_plain_text() -> None:
    text = github.summary(Proof(DIFFERENT, STRAYED, {"torch": "2.13.0", "seed": 1}), "verify m.onnx")
    assert text.startswith("### ❌ verify m.onnx: different\n")
    assert "different: error 1.6 % of the adapter's effect, 8 × PyTorch's own rounding" in text
    assert "| logits | bad | 1 | 0.125 | 1 | 1.6 % |" in text
    assert "/layer.141/MatMul" in text and "torch 2.13.0" in text
    lines = github.summary(Proof(judge([case(1.0, name=HOSTILE, output=HOSTILE)])), HOSTILE).splitlines()
    assert not [line for line in lines if line.startswith("::")]
    row = next(line for line in lines if line.startswith("| a"))
    assert row.replace("\\|", "").count("|") == 7
    assert "<b>" not in row and "@everyone" not in row and "[x]" not in row.replace("\\[", "")


def test_printed_lines_are_no_commands_on_github(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    assert errors.printable("::add-mask::x\n##[error]y") == "::add-mask::x\n##[error]y"
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    assert errors.printable("  ::add-mask::x\n##[error]y\na::b") == "  \\x3a:add-mask::x\n##\\x5berror]y\na::b"


@pytest.fixture(scope="module")
def candidate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("candidate") / "##[x].pt"
    assert cli.run(["torchscript", f"{FACTORIES}:spotter", "-o", str(path), "--no-verify"]) == 0
    return path


@pytest.mark.parametrize("as_json", [False, True])
def test_verify_annotates_on_stderr_and_writes_the_summary(
    candidate: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    (tmp_path / "summary.md").write_text("before\n")
    capsys.readouterr()
    words = ["verify", str(candidate), "--model", f"{FACTORIES}:spotter", *(["--json"] if as_json else [])]
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    assert cli.run(words) == 0
    out, err = capsys.readouterr()
    assert err.splitlines()[-1].startswith("::notice title=verify ##\\x5bx].pt::same: ")
    assert ", 3 cases" in err.splitlines()[-1]
    assert "::notice" not in out and "##[" not in out
    if as_json:
        assert json.loads(out)["about"]["candidate"]["path"] == str(candidate)
    assert (tmp_path / "summary.md").read_text(encoding="utf-8").startswith("before\n### ✅ verify")


def test_verdict_without_figures_is_reported_too(
    candidate: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_export.errors import EnvironmentLacking
    from lora_export.verification import proof

    def strayed(*_: object, **__: object) -> None:
        raise EnvironmentLacking("1 of 1 compute nodes ran elsewhere")

    monkeypatch.setattr(proof, "prove", strayed)
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    capsys.readouterr()
    files = [tmp_path / f"report.{suffix}" for suffix in ("json", "xml", "html")]
    reports = [word for path in files for word in ("--report", str(path))]
    assert cli.run(["verify", str(candidate), "--model", f"{FACTORIES}:spotter", "--json", *reports]) == 6
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert (document["outcome"], document["exit_code"], document["reasons"][0]["gate"]) == ("undecided", 6, "placement")
    assert json.loads(files[0].read_text()) == document
    assert 'errors="1"' in files[1].read_text() and "exit code 6" in files[2].read_text()
    assert "::error" in err and "Error: 1 of 1 compute nodes ran elsewhere" in err
