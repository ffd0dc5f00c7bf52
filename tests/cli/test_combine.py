"""`lora-export combine` and `merge --combine` from door to door."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_export import cli
from support.handmade import base_file, peft_adapter

A, B = [[1, 2, 3]], [[1], [10]]
C, D = [[0, 1, 0]], [[2], [0]]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    base_file(tmp_path / "base.safetensors", {"fc.weight": np.zeros((2, 3))})
    peft_adapter(tmp_path / "one", {"fc": (A, B)})
    peft_adapter(tmp_path / "two", {"fc": (C, D)})
    return tmp_path


def test_combine_prints_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["combine", "one", "two", "-o", "both", "--weight", "1", "--weight", "2"]) == 0
    assert capsys.readouterr().out == "wrote both: 1 pairs of rank 2 or less, 1 from several adapters\n"
    assert cli.run(["merge", "base.safetensors", "both", "-o", "out.safetensors"]) == 0
    assert load_file(place / "out.safetensors")["fc.weight"].tolist() == [[1, 6, 3], [10, 20, 30]]


def test_json_is_one_document(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["combine", "one", "two", "-o", "both", "--combine", "linear", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == {"output": "both", "modules": 1, "shared": 1, "largest_rank": 1, "notes": []}


def test_merge_combines_by_name(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["merge", "base.safetensors", "one", "two", "-o", "out.safetensors", "--combine", "magnitude_prune"]
    assert cli.run([*arguments, "--density", "0.5"]) == 0
    assert "note: the pairs of each weight are combined by magnitude_prune (density 0.5), as PEFT" in (
        capsys.readouterr().err
    )
    # Of one: A (0, 0, 3), B (0, 10). Of two: A (0, 1, 0) or the first zero of two equal ones; B (2, 0).
    assert load_file(place / "out.safetensors")["fc.weight"].tolist() == [[0, 2, 6], [0, 10, 30]]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["combine", "one", "two", "-o", "x", "--method", "ties"], 2, "--combine ties needs --density"),
        (["combine", "one", "two", "-o", "x", "--density", "0.5"], 2, "--combine cat does not use it"),
        (["combine", "one", "-o", "x", "--method", "svd"], 3, "combines several adapters, and there is one"),
        (["combine", "one", "two=one", "-o", "x"], 3, "two is the same adapter as one"),
        (["combine", "-o", "x"], 2, "Missing argument"),
        (["combine", "one", "nowhere", "-o", "x"], 3, "nowhere"),
        (["merge", "base.safetensors", "one", "two", "-o", "x.safetensors", "--seed", "1"], 2, "does not use it"),
        (["merge", "base.safetensors", "one", "two", "-o", "x.safetensors", "--combine", "mean"], 2, "mean"),
    ],
)
def test_an_error_has_its_exit_code_and_leaves_nothing(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    before = sorted(place.iterdir())
    assert cli.run(arguments) == code
    assert message in capsys.readouterr().err
    assert sorted(place.iterdir()) == before
