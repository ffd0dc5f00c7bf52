"""`lora-export torchscript`: what is printed, and what is refused."""

from __future__ import annotations

from pathlib import Path

from support.api import MODEL, an_adapter
from support.cli import Capture, answer, call


def test_the_verdict_and_the_file_are_printed(tmp_path: Path, capsys: Capture) -> None:
    adapter, out = an_adapter(tmp_path / "adapter"), tmp_path / "m.pt"
    assert call("torchscript", MODEL, "-a", adapter, "-o", out) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("same: ")
    assert lines[-1] == f"wrote {out} ({out.stat().st_size:,} bytes)"


def test_without_a_proof_the_file_is_published_and_that_is_printed(tmp_path: Path, capsys: Capture) -> None:
    assert call("torchscript", MODEL, "--no-verify", "-o", tmp_path / "m.pt") == 0
    assert capsys.readouterr().out.splitlines()[0] == "not verified (--no-verify)"
    code, document = answer(capsys, "torchscript", MODEL, "--no-verify", "-o", tmp_path / "m.pt", "--overwrite")
    assert (code, document["output"], document["proof"]) == (0, str(tmp_path / "m.pt"), None)


def test_a_weight_without_an_adapter_is_refused(tmp_path: Path, capsys: Capture) -> None:
    assert call("torchscript", MODEL, "--weight", "2", "-o", tmp_path / "m.pt") == 2
    assert "--weight is a factor on an adapter, and there is no adapter (-a)" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
