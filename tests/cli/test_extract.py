"""`lora-export extract` from door to door."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lora_export import cli
from support.handmade import base_file


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    base_file(tmp_path / "base.safetensors", {"fc.weight": np.zeros((3, 3)), "norm.weight": [1]})
    base_file(tmp_path / "tuned.safetensors", {"fc.weight": np.diag([3, 2, 1]), "norm.weight": [2]})
    return tmp_path


ARGUMENTS = ["extract", "base.safetensors", "tuned.safetensors", "-o", "adapter", "--layout", "*=out_in"]


def test_pairs_and_whole_tensors_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*ARGUMENTS, "--rank", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["wrote adapter: 1 pair of rank 2, 92.9% of ‖ΔW‖²", "1 tensor saved whole: norm.weight"]
    assert lines[3].split() == ["fc", "3", "x", "3", "2", "3", "3.742", "92.9%"]


def test_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*ARGUMENTS, "--energy", "0.6", "--exclude", "norm", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "lora-export/extract-result/1"
    assert [(layer["module"], layer["rank"]) for layer in document["layers"]] == [("fc", 1)]
    assert (document["whole"], document["excluded"]) == ([], ["norm.weight"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (ARGUMENTS, 2, "give --rank, or --energy"),
        ([*ARGUMENTS, "--rank", "2", "--layout", "x"], 2, "x is not NAME=out_in"),
        (["extract", "base.safetensors", "base.safetensors", "-o", "x", "--rank", "1"], 3, "nothing to extract"),
        ([*ARGUMENTS[:3], "-o", "x", "--rank", "1"], 3, "fc.weight: how it is stored is unknown"),
        (["extract", "base.safetensors", "nowhere", "-o", "x", "--rank", "1"], 3, "nowhere"),
        (["extract", "base.safetensors", "tuned.safetensors", "-o", "base.safetensors", "--rank", "1"], 7, "base"),
    ],
)
def test_an_error_has_its_exit_code_and_leaves_nothing(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    before = sorted(place.iterdir())
    assert cli.run(arguments) == code
    assert message in capsys.readouterr().err
    assert sorted(place.iterdir()) == before
