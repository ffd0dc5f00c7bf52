"""What a training measured, its checkpoints, and its event files."""

from __future__ import annotations

import errno
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_export as le
from lora_export.errors import EnvironmentLacking, InputRefused, OutputFailed
from lora_export.training import checkpoint
from lora_export.training.checkpoint import (
    METRICS,
    NORMS_WITH_STATISTICS,
    TRAINING_STATE,
    Checkpoints,
    EvaluationRecord,
    EventLog,
    MemoryUse,
    StepRecord,
    TrainingHistory,
    checkpoint_folder,
    require_tensorboard,
    trained_tensors,
)
from support.api import MODEL

IDENTITY = {"data": "abc", "learning_rate": 0.1, "rank": 4}


def stepped(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer, TrainingHistory]:
    """A module after one step of training its second layer."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    module[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(module[1].parameters(), lr=0.1)
    module(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    history = TrainingHistory("cpu", [StepRecord(1, 1, 0.5, 0.1, 2, 0.1)], [EvaluationRecord(1, 0.4, None)])
    return module, optimizer, history


def saved(folder: Path, **identity: Any) -> Checkpoints:
    checkpoints = Checkpoints(folder / "a.training", IDENTITY | identity)
    checkpoints.begin()
    checkpoints.save(*stepped()[:2], None, stepped()[2], {"a": torch.ones(2)})
    return checkpoints


def test_the_state_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path)
    module, optimizer, history = stepped(seed=1)
    wanted, its_optimizer, _ = stepped()
    base = module[0].weight.clone()
    best = checkpoints.load(module, optimizer, None, history)
    assert {name: tensor.tolist() for name, tensor in best.items()} == {"a": [1, 1]}
    for mine, theirs in zip(module[1].parameters(), wanted[1].parameters(), strict=True):
        assert torch.equal(mine, theirs)
        for name in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[mine][name], its_optimizer.state[theirs][name])
    assert torch.equal(module[0].weight, base)  # the base is not part of it
    assert history.losses == (0.5,)
    (checkpoints.folder / METRICS).write_text("of later steps\n" * 9)
    history.write(checkpoints.folder / METRICS)
    assert len((checkpoints.folder / METRICS).read_text().splitlines()) == 2


def test_statistics_of_a_trained_batch_norm_are_part_of_it() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2)).requires_grad_(False)
    module[1].requires_grad_(True)
    assert set(trained_tensors(module)) == {
        *("1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked")
    }


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path)
    other = Checkpoints(checkpoints.folder, IDENTITY | {"rank": 8, "learning_rate": 0.01})
    with pytest.raises(InputRefused, match=r"checkpoint of another training:\n  rank was 4, and is 8$"):
        other.load(*stepped()[:2], None, stepped()[2])
    Checkpoints(checkpoints.folder, IDENTITY | {"learning_rate": 0.01}).load(*stepped()[:2], None, stepped()[2])
    with pytest.raises(InputRefused, match="checkpoint of another adapter"):
        checkpoints.load(nn.Linear(2, 2), stepped()[1], None, stepped()[2])


def test_missing_and_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path)
    with pytest.raises(InputRefused, match=r"b\.training/state\.safetensors is damaged: No such file"):
        Checkpoints(tmp_path / "b.training", {}).load(*stepped()[:2], None, stepped()[2])
    (checkpoints.folder / TRAINING_STATE).write_bytes(b"x" * 20)
    with pytest.raises(InputRefused, match=r"state\.safetensors is damaged"):
        checkpoints.load(*stepped()[:2], None, stepped()[2])


def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = saved(tmp_path)
    before = (checkpoints.folder / TRAINING_STATE).read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    module, optimizer, history = stepped(seed=1)
    with pytest.raises(OutputFailed, match=r"step 1 could not .* No space .*; the checkpoint before it is whole"):
        checkpoints.save(module, optimizer, None, history)
    assert (checkpoints.folder / TRAINING_STATE).read_bytes() == before
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == [TRAINING_STATE]


def test_values_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path)
    before = (checkpoints.folder / TRAINING_STATE).read_bytes()
    module, optimizer, history = stepped()
    with torch.no_grad():
        module[1].weight[0, 0] = float("nan")
    with pytest.raises(InputRefused, match=r"these are not finite:\n  1\.weight"):
        checkpoints.save(module, optimizer, None, history)
    assert (checkpoints.folder / TRAINING_STATE).read_bytes() == before


def test_the_folder_lasts_only_with_a_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(checkpoint_folder(tmp_path / "out"), {})
    assert checkpoints.folder == tmp_path / "out.training"
    checkpoints.begin()
    checkpoints.record(stepped()[2])
    assert len((checkpoints.folder / METRICS).read_text().splitlines()) == 2
    checkpoints.remove_if_empty()
    assert not checkpoints.folder.exists()
    kept = saved(tmp_path)
    kept.remove_if_empty()
    assert kept.exists
    kept.begin()
    assert list(kept.folder.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OutputFailed, match="could not be made"):
        Checkpoints(tmp_path / "file/x", {}).begin()


def test_every_norm_of_pytorch_with_statistics_is_known() -> None:
    norms = {
        cls for cls in vars(nn).values()
        if isinstance(cls, type) and "track_running_stats" in inspect.signature(cls).parameters
    }  # fmt: skip
    assert norms == set(NORMS_WITH_STATISTICS)


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
    with pytest.raises(EnvironmentLacking, match=r"needs tensorboard: pip install 'tensorboard>="):
        le.train(MODEL, tmp_path / "none.npz", tmp_path / "ad", tensorboard=tmp_path / "log")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(sys.modules, "tensorboard", sys)
    monkeypatch.setattr(sys, "__spec__", object(), raising=False)
    require_tensorboard()


def a_history() -> TrainingHistory:
    steps = [StepRecord(number, 1, 1 / number, 0.1, 7, 0.5) for number in (1, 2, 3)]
    evaluations = [EvaluationRecord(1, 0.7, 0.5), EvaluationRecord(2, 0.3, None), EvaluationRecord(3, 0.3, None)]
    return TrainingHistory("cpu", steps, evaluations, MemoryUse(1, 2, 3, 4, 2**21))


def test_the_first_of_equal_evaluations_is_the_best() -> None:
    history = a_history()
    assert history.best is history.evaluations[1] and history.without_improvement() == 1
    assert TrainingHistory("cpu").best is None and TrainingHistory("cpu").without_improvement() == 0
    assert str(TrainingHistory("cpu", history.steps[:1])).startswith("1 step on cpu in ")
    assert str(history) == "3 steps on cpu in 1.5 s, loss 1 -> 0.3333, peak memory 2 MiB"
    assert history.memory.total == 10


def test_records_come_back_from_a_checkpoint_and_are_lines_by_step(tmp_path: Path) -> None:
    history, restored = a_history(), TrainingHistory("cpu")
    restored.restore(json.loads(json.dumps(history.as_table())))
    assert (restored.steps, restored.evaluations) == (history.steps, history.evaluations)
    history.write(tmp_path / "metrics.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], "held_out_loss" in line) for line in lines] == [
        (1, False), (1, True), (2, False), (2, True), (3, False), (3, True)
    ]  # fmt: skip
    assert lines[2] == {"step": 2, "epoch": 1, "loss": 0.5, "learning_rate": 0.1, "tokens": 7, "seconds": 0.5}
