"""What GitHub is told: commands that say what they should and nothing that a name in a file would like."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_export import cli, errors
from lora_export.report import github
from lora_export.verification.parity import judge
from support import FACTORIES
from support.verdicts import DIFFERENT, SAME, STRAYED, UNDECIDED, case

HOSTILE = "a\n::add-mask::b ##[error]c | <b>@everyone</b> [x](y) 50%,:\r`"


def test_a_reason_is_an_error_and_a_remedy_goes_with_it() -> None:
    (line,) = github.workflow_commands(UNDECIDED, "verify m.onnx")
    assert line.startswith("::error title=verify m.onnx%3A undecided::logits in case 2 x 300: control `tolerance`")
    assert "%0Awhat would decide it: an --atol below 64 with --rtol 0" in line
    assert [line.partition("::logits")[0] for line in github.workflow_commands(DIFFERENT, "v")][:2] == [
        "::error title=v%3A different",
        "::error title=v%3A different",
    ]
    assert list(github.workflow_commands(SAME, "v")) == ["::notice title=v::same: 1 output in 2 cases, float32"]


def test_no_name_ends_a_command_or_begins_one() -> None:
    for line in github.workflow_commands(judge([case(1.0, name=HOSTILE, output=HOSTILE)]), HOSTILE):
        assert "\n" not in line and "\r" not in line
        assert line.startswith("::error title=a\\n%3A%3Aadd-mask%3A%3Ab ")
        assert "50%25" in line and "title=" in line.partition("%2C")[0]


def test_the_summary_is_a_table_and_nothing_but_text() -> None:
    told = github.summary(DIFFERENT, STRAYED, {"torch": "2.13.0", "seed": 1}, title="verify m.onnx")
    assert told.startswith("### ❌ verify m.onnx: different\n")
    assert "| logits | bad | 1 | 0.125 | 1 | 1.6 % |" in told
    assert "/layer.3/MatMul" in told and "torch 2.13.0" in told
    lines = github.summary(judge([case(1.0, name=HOSTILE, output=HOSTILE)]), title=HOSTILE).splitlines()
    assert not [line for line in lines if line.startswith("::")]
    row = next(line for line in lines if line.startswith("| a"))
    assert row.replace("\\|", "").count("|") == 7
    assert "<b>" not in row and "@everyone" not in row and "[x]" not in row.replace("\\[", "")


def test_on_github_no_line_of_ours_is_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    assert errors.printable("::add-mask::x\n##[error]y") == "::add-mask::x\n##[error]y"
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    assert errors.printable("  ::add-mask::x\n##[error]y\na::b") == "  \\x3a:add-mask::x\n##\\x5berror]y\na::b"


@pytest.fixture
def candidate(tmp_path: Path) -> Path:
    assert cli.run(["torchscript", f"{FACTORIES}:spotter", "-o", str(tmp_path / "##[x].pt"), "--no-verify"]) == 0
    return tmp_path / "##[x].pt"


@pytest.mark.parametrize("as_json", [False, True])
def test_verify_tells_github_on_stderr_and_writes_the_runs_page(
    candidate: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    as_json: bool,
) -> None:
    (tmp_path / "summary.md").write_text("before\n")
    capsys.readouterr()
    words = ["verify", str(candidate), "--model", f"{FACTORIES}:spotter", *(["--json"] if as_json else [])]
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    assert cli.run(words) == 0
    assert "::notice" not in capsys.readouterr().err
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    assert cli.run(words) == 0
    out, err = capsys.readouterr()
    assert err.splitlines()[-1].startswith("::notice title=verify ##\\x5bx].pt::same: 1 output in 3 cases")
    assert "::notice" not in out and "##[" not in out
    if as_json:
        assert json.loads(out)["about"]["candidate"]["path"] == str(candidate)
    assert (tmp_path / "summary.md").read_text(encoding="utf-8").startswith("before\n### ✅ verify")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path))
    assert cli.run(words) == 0
    assert "the summary of the run was not written" in capsys.readouterr().err


def test_a_provider_that_did_not_do_the_work_is_reported_too(
    candidate: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_export.errors import EnvironmentLacking
    from lora_export.verification import against_pytorch

    def strayed(*_: object, **__: object) -> None:
        raise EnvironmentLacking("1 of 1 compute nodes ran elsewhere")

    monkeypatch.setattr(against_pytorch, "prove", strayed)
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    capsys.readouterr()
    files = [tmp_path / f"report.{suffix}" for suffix in ("json", "xml", "html")]
    reports = [word for path in files for word in ("--report", str(path))]
    assert cli.run(["verify", str(candidate), "--model", f"{FACTORIES}:spotter", "--json", *reports]) == 6
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert (told["outcome"], told["exit_code"], told["reasons"][0]["gate"]) == ("undecided", 6, "placement")
    assert json.loads(files[0].read_text()) == told
    assert 'errors="1"' in files[1].read_text() and "exit code 6" in files[2].read_text()
    assert "::error" in err and "Error: 1 of 1 compute nodes ran elsewhere" in err
