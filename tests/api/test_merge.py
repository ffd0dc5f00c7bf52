"""`lora_export.merge`: its result, its callbacks, and what it leaves behind when it refuses."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_export as le
from lora_export.errors import InputRefused, MatchError, WrongUsage
from support.api import A, B, Recorder, an_adapter, base_weights


@pytest.fixture
def place(tmp_path: Path) -> Path:
    base_weights(tmp_path / "base.safetensors")
    an_adapter(tmp_path / "adapter")
    return tmp_path


def test_the_sum_is_written_and_reported(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = Recorder()
    result = le.merge(place / "base.safetensors", place / "adapter", place / "out.safetensors", **seen.callbacks)
    before, after = load_file(place / "base.safetensors"), load_file(place / "out.safetensors")
    change = (B @ A).astype(np.float32)
    np.testing.assert_array_equal(after["dense.weight"], before["dense.weight"] + change)
    assert result.output == place / "out.safetensors"
    assert [step.weight for step in result.plan.steps] == ["dense.weight"]
    assert result.report is not None and result.report.results[0].changed == np.count_nonzero(change)
    assert seen.stages == ["merging"] and seen.events[-1].done == seen.events[-1].total
    assert capsys.readouterr() == ("", "")


def test_a_result_cannot_be_changed(place: Path) -> None:
    result = le.merge(place / "base.safetensors", place / "adapter", place / "out.safetensors")
    with pytest.raises(FrozenInstanceError):
        result.output = place  # type: ignore[misc]


def test_an_adapter_in_memory_is_merged(place: Path) -> None:
    adapter = le.load_adapter(place / "adapter", name="loaded")
    result = le.merge(place / "base.safetensors", adapter, place / "out.safetensors")
    assert "loaded" in str(result.plan)


def test_a_dry_run_writes_nothing(place: Path) -> None:
    before = sorted(place.iterdir())
    result = le.merge(place / "base.safetensors", place / "adapter", place / "out.safetensors", dry_run=True)
    assert result.report is None and "dense.weight" in str(result.plan)
    assert sorted(place.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"requantize": True}, WrongUsage, "requantize= is for an .onnx BASE"),
        ({"checkpoint": "x"}, WrongUsage, "checkpoint= is for an .onnx BASE"),
        ({"weights": [1.0, 2.0]}, InputRefused, "1 adapters but 2 weights"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    place: Path, options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        le.merge(place / "base.safetensors", place / "adapter", place / "out.safetensors", **options)  # type: ignore[arg-type]
    assert not (place / "out.safetensors").exists()


def test_a_misfit_raises_and_leaves_nothing(place: Path) -> None:
    save_file({"unrelated.weight": np.eye(8, dtype=np.float32)}, place / "other.safetensors")
    before = sorted(place.iterdir())
    with pytest.raises(MatchError, match="dense"):
        le.merge(place / "other.safetensors", place / "adapter", place / "out.safetensors")
    assert sorted(place.iterdir()) == before
