"""`lora-export merge --keep-residual` and `unmerge` from door to door."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lora_export import cli
from support.handmade import base_file, peft_adapter

W = np.arange(6).reshape(2, 3)
MERGE = ["merge", "base.safetensors", "one", "-o", "out.safetensors", "--keep-residual", "r"]
UNMERGE = ["unmerge", "out.safetensors", "one", "-o", "again.safetensors", "--base-from", "r"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    base_file(tmp_path / "base.safetensors", {"fc.weight": W, "up.weight": W})
    peft_adapter(tmp_path / "one", {"fc": ([[1, 2, 3]], [[1], [10]])})
    peft_adapter(tmp_path / "two", {"fc": ([[1, 2, 4]], [[1], [10]])})
    return tmp_path


def test_the_base_comes_back(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(MERGE) == 0
    output = capsys.readouterr()
    size = (place / "r").stat().st_size
    assert f"note: r has {size:,} bytes" in output.err and "lora-export unmerge" in output.err
    assert cli.run(UNMERGE) == 0
    assert capsys.readouterr().out == (
        "wrote again.safetensors: 1 tensor restored; every file has the hash that it had in the base\n"
    )
    assert (place / "again.safetensors").read_bytes() == (place / "base.safetensors").read_bytes()


def test_json_is_one_document(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*MERGE, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["residual"] == {"path": "r", "bytes": (place / "r").stat().st_size}
    assert cli.run([*UNMERGE, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "output": "again.safetensors",
        "bytes": 2 * W.size * 4,
        "restored": 1,
        "files": 1,
    }


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["unmerge", "out.safetensors", "one", "-o", "x"], 2, "Missing option '--base-from'"),
        (["unmerge", "out.safetensors", "two", "-o", "x", "--base-from", "r"], 3, "one (sha256"),
        (["unmerge", "base.safetensors", "one", "-o", "x", "--base-from", "r"], 3, "is not what the merge wrote"),
        (
            ["unmerge", "out.safetensors", "one", "-o", "x", "--base-from", "one/adapter_config.json"],
            3,
            "is not a residual",
        ),
        (["unmerge", "out.safetensors", "one", "-o", "x", "--base-from", "nowhere"], 3, "nowhere"),
        (["unmerge", "out.safetensors", "one", "-o", "r", "--base-from", "r", "--overwrite"], 7, "is the input"),
        ([*UNMERGE[:4], "base.safetensors", "--base-from", "r"], 7, "base.safetensors"),
        (["unmerge", "nowhere", "one", "-o", "x", "--base-from", "r"], 3, "nowhere"),
    ],
)
def test_an_error_has_its_exit_code_and_leaves_nothing(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert cli.run(MERGE) == 0
    before = sorted(place.iterdir())
    assert cli.run(arguments) == code
    assert message in capsys.readouterr().err
    assert sorted(place.iterdir()) == before
