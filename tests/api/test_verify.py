"""`lora_export.verify`: a verdict as a value, whichever it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lora_export as le
from lora_export.errors import InputRefused, WrongUsage
from support.api import MODEL, an_adapter, base_weights


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    an_adapter(folder / "adapter")
    an_adapter(folder / "stronger", scale=2.0)
    base_weights(folder / "base.safetensors")
    le.merge(folder / "base.safetensors", folder / "adapter", folder / "merged.safetensors")
    le.export_onnx(MODEL, folder / "m.onnx", adapters=folder / "adapter")
    return folder


def test_a_right_graph_is_the_same(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = le.verify(place / "m.onnx", MODEL, adapters=place / "adapter", reports=[tmp_path / "v.json"])
    assert result and result.verdict.same and result.error is None
    assert str(result).startswith("same")
    assert result.about["candidate"]["path"] == str(place / "m.onnx") and result.seconds > 0
    document = json.loads((tmp_path / "v.json").read_text())
    assert document == json.loads(json.dumps(result.as_document()))
    assert capsys.readouterr().out == ""


def test_another_adapter_is_different_and_returned(place: Path) -> None:
    result = le.verify(place / "m.onnx", MODEL, adapters=place / "stronger")
    assert not result and result.verdict.outcome == "different" and result.exit_code == 4


def test_a_merged_file_is_compared_without_a_model(place: Path) -> None:
    right = le.verify(place / "merged.safetensors", base=place / "base.safetensors", adapters=place / "adapter")
    wrong = le.verify(place / "merged.safetensors", base=place / "base.safetensors", adapters=place / "stronger")
    assert right and not wrong and wrong.verdict.outcome == "different"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give --model"),
        ({"base": "b", "seed": 1}, "with --base nothing is run"),
        ({"base": "b", "seed": 0}, "with --base nothing is run"),
        ({"base": "b", "trace": True}, "with --base nothing is run"),
        ({"base": "b"}, "--base alone judges checkpoints"),
        ({"model": MODEL, "base": "b.safetensors"}, "--base beside --model is the quantised .onnx"),
    ],
)
def test_options_that_do_not_go_together_are_refused(place: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(WrongUsage, match=message):
        le.verify(place / "m.onnx", **options)  # type: ignore[arg-type]


def test_a_report_of_an_unknown_kind_is_refused_first(place: Path, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"\.json"):
        le.verify(place / "m.onnx", MODEL, reports=[tmp_path / "verdict.txt"])
