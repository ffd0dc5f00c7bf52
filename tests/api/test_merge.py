"""`lora_export.merge`: its result, its callbacks and notes, and what it leaves behind when it refuses."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_export as le
from lora_export.errors import InputRefused, MatchError, WrongUsage
from lora_export.storage import block_copy
from support.api import A, B, Recorder, an_adapter, base_weights
from support.handmade import graph_file


@pytest.fixture
def place(tmp_path: Path) -> Path:
    base_weights(tmp_path / "base.safetensors")
    (tmp_path / "base").mkdir()
    base_weights(tmp_path / "base" / "model.safetensors")
    graph_file(tmp_path / "base.onnx", {"dense.weight": np.eye(8, dtype=np.float32)})
    save_file({"unrelated.weight": np.eye(8, dtype=np.float32)}, tmp_path / "other.safetensors")
    graph_file(tmp_path / "other.onnx", {"unrelated.weight": np.eye(8, dtype=np.float32)})
    an_adapter(tmp_path / "adapter")
    return tmp_path


def merged(place: Path, base: str, **options: Any) -> Any:
    return le.merge(place / base, place / "adapter", place / f"out{Path(base).suffix}", **options)


def test_the_sum_is_written_and_reported(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = Recorder()
    result = merged(place, "base.safetensors", **seen.callbacks)
    before, after = load_file(place / "base.safetensors"), load_file(place / "out.safetensors")
    change = (B @ A).astype(np.float32)
    np.testing.assert_array_equal(after["dense.weight"], before["dense.weight"] + change)
    assert result.output == place / "out.safetensors"
    assert [step.weight for step in result.plan.steps] == ["dense.weight"]
    assert result.report is not None and result.report.results[0].changed == np.count_nonzero(change)
    assert seen.stages == ["merging"] and seen.events[-1].done == seen.events[-1].total
    assert capsys.readouterr() == ("", "")
    with pytest.raises(FrozenInstanceError):
        result.output = place


@pytest.mark.parametrize("base", ["base.safetensors", "base"])
def test_space_is_reserved_for_the_whole_file(place: Path, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reserved: list[int] = []
    monkeypatch.setattr(block_copy, "reserve", lambda _, count: reserved.append(count))
    output = merged(place, base).output
    assert reserved == [(output / "model.safetensors" if output.is_dir() else output).stat().st_size]


def test_an_adapter_in_memory_is_merged(place: Path) -> None:
    adapter = le.load_adapter(place / "adapter", name="loaded")
    result = le.merge(place / "base.safetensors", adapter, place / "out.safetensors")
    assert "loaded" in str(result.plan)


def test_a_dry_run_writes_nothing(place: Path) -> None:
    before = sorted(place.iterdir())
    result = merged(place, "base.safetensors", dry_run=True)
    assert result.report is None and "dense.weight" in str(result.plan)
    assert sorted(place.iterdir()) == before


@pytest.mark.parametrize(
    ("base", "options", "error", "message"),
    [
        ("base.safetensors", {"requantize": True}, WrongUsage, "requantize= is for an .onnx BASE"),
        ("base.safetensors", {"checkpoint": "x"}, WrongUsage, "checkpoint= is for an .onnx BASE"),
        ("base.safetensors", {"weights": [1.0, 2.0]}, WrongUsage, "1 adapter but 2 weights"),
        ("base", {"dequantize": True}, InputRefused, r"is not quantised\. Leave dequantize= out"),
        ("base.onnx", {"tied": "untie"}, WrongUsage, "tied= is for checkpoints: in a graph each layer gets a weight"),
        ("base.onnx", {"dtype": "float16"}, WrongUsage, "dtype= is for checkpoints: the weights of a graph keep the"),
        ("base.onnx", {"layout": {"a": "out_in"}}, WrongUsage, "layout= is for checkpoints: a graph's operators"),
        ("base.onnx", {"dequantize": True}, WrongUsage, "dequantize= is for checkpoints"),
        ("base.onnx", {"keep_residual": "r"}, WrongUsage, "keep_residual= is for checkpoints"),
        ("base.onnx", {"variant": "fp16"}, WrongUsage, "variant= is for folders of checkpoints"),
        ("other.safetensors", {}, MatchError, "dense"),
        ("other.onnx", {}, MatchError, "dense"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(
    place: Path, base: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = sorted(place.iterdir())
    with pytest.raises(error, match=message):
        merged(place, base, **options)
    assert sorted(place.iterdir()) == before


def test_much_rounding_is_told_with_its_remedy(place: Path) -> None:
    an_adapter(place / "adapter", scale=2**-6)
    rows = np.repeat(np.float16([0, 100]), 4)  # half of the change is lost beside large weights
    save_file({"dense.weight": np.tile(rows[:, None], 8)}, place / "base.safetensors")
    seen: list[str] = []
    report = merged(place, "base.safetensors", min_retention=0, on_message=seen.append).report
    assert report is not None and report.below_rounding
    (warning,) = (line for line in seen if line.startswith("warning:"))
    assert "rounding took more than a tenth of the change of 1 of 1 weights, most of dense.weight" in warning
    assert warning.endswith('; dtype="float32" keeps it')


def test_notes_of_a_plan_are_not_shown_twice(place: Path) -> None:
    save_file({"model.dense.weight": np.ones((8, 8), np.float32)}, place / "named.safetensors")
    planned, written = (merged(place, "named.safetensors", dry_run=dry_run).notes for dry_run in (True, False))
    assert len(written) == len(planned) + 1 and "prefix" in written[-1]


def test_the_notes_tell_of_code_of_other_weights_and_of_another_base(place: Path) -> None:
    config = {"auto_map": {"AutoModel": "code.Model"}, "_name_or_path": "org/small"}
    (place / "base" / "config.json").write_text(json.dumps(config))
    (place / "base" / "pytorch_model.bin").write_bytes(b"others")
    recorded = json.loads((place / "adapter" / "adapter_config.json").read_text())
    named = json.dumps({**recorded, "base_model_name_or_path": "org/large"})
    (place / "adapter" / "adapter_config.json").write_text(named)
    found = "\n".join(merged(place, "base").notes)
    assert "adapter was made for org/large, the base is org/small: shapes that agree prove nothing" in found
    assert "names code of its own (auto_map:" in found
    assert "pytorch_model.bin contains weights too, unmerged ones; it is left out" in found


def test_a_residual_is_kept_beside_the_output(place: Path) -> None:
    seen: list[str] = []
    residual = place / "residual"
    result = merged(place, "base", keep_residual=residual, on_message=seen.append)
    assert result.residual_bytes == residual.stat().st_size > 0
    assert any("with it and the adapters, `unmerge()` makes the base again" in line for line in seen)
    with pytest.raises(WrongUsage, match="is the output or inside it"):
        merged(place, "base", keep_residual=place / "out" / "r", overwrite=True)
