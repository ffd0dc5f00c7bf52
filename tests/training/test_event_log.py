"""TensorBoard's event files, read with TensorBoard."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import lora_export as le
from lora_export.errors import EnvironmentLacking, OutputFailed
from lora_export.training.event_log import EventLog, require_tensorboard
from lora_export.training.history import EvaluationRecord, StepRecord
from support.api import MODEL


def a_step(number: int, loss: float) -> StepRecord:
    return StepRecord(number, 1, loss, 0.5, 8, 0.25)


def test_tensorboard_reads_the_curves_and_no_step_twice(tmp_path: Path) -> None:
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    first = EventLog(tmp_path / "log" / "rank-4")
    first.write([a_step(1, 2.0), a_step(2, 1.5), EvaluationRecord(2, 1.75, None)])
    first.write([a_step(3, 9.0)])  # killed after this step, and before its checkpoint
    first.close()
    resumed = EventLog(tmp_path / "log" / "rank-4")
    resumed.write([a_step(3, 1.25)])
    resumed.close()
    events = reader.EventAccumulator(str(tmp_path / "log" / "rank-4"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {*("epoch", "loss", "learning_rate", "tokens", "seconds", "held_out_loss")}
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.0), (2, 1.5), (3, 1.25)]
    assert [(event.step, event.value) for event in events.Scalars("held_out_loss")] == [(2, 1.75)]


def test_without_records_no_folder_is_made(tmp_path: Path) -> None:
    EventLog(tmp_path / "log").close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __init__(self, *names: str, **options: int) -> None: ...

        def start(self) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker", Full)
    with pytest.raises(OutputFailed, match="log could not be written: No space left on device"):
        EventLog(tmp_path / "log").write([a_step(1, 2.0)])


def test_a_missing_tensorboard_is_missed_before_the_data_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(EnvironmentLacking, match=r"needs tensorboard: pip install 'lora-export\[tensorboard\]'"):
        le.train(MODEL, tmp_path / "none.npz", tmp_path / "ad", tensorboard=tmp_path / "log")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(sys.modules, "tensorboard", sys)
    monkeypatch.setattr(sys, "__spec__", object(), raising=False)
    require_tensorboard()
