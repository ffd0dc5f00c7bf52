"""`lora-export resize` from door to door."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lora_export import cli
from support.handmade import peft_adapter


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    diagonal = np.diag([3.0, 2.0, 1.0])  # shares of ‖·‖²: 9, 4 and 1 of 14
    peft_adapter(tmp_path / "big", {"fc": (np.eye(3), diagonal), "up": (np.eye(3), 2 * diagonal)})
    return tmp_path


def test_the_share_of_each_layer_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["resize", "big", "-o", "small", "--rank", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "wrote small: 2 pairs of rank 2, 92.9% of ‖ΔW‖²"
    assert lines[2].split() == ["fc", "3", "x", "3", "2", "3", "3.742", "92.9%"]


def test_json_has_every_layer(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["resize", "big", "-o", "small", "--energy", "0.6", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "lora-export/resize-result/1" and document["output"] == "small"
    assert [(layer["module"], layer["rank"], layer["of_rank"]) for layer in document["layers"]] == [
        ("fc", 1, 3),
        ("up", 1, 3),
    ]
    assert document["share"] == pytest.approx(9 / 14)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "give --rank, or --energy"),
        (["--rank", "0"], 2, "Invalid value for '--rank': 0 is not in the range x>=1"),
        (["--energy", "1.1"], 2, "Invalid value for '--energy': 1.1 is not in the range 0<x<=1"),
        (["--rank", "2", "-o", "big"], 7, "big"),
    ],
)
def test_an_error_has_its_exit_code(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert cli.run(["resize", "big", "-o", "small", *arguments]) == code
    assert message in capsys.readouterr().err
    assert [path.name for path in place.iterdir()] == ["big"]
