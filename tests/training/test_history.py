"""What a training measured, and its file."""

from __future__ import annotations

import json
from pathlib import Path

from lora_export.training.history import EvaluationRecord, MemoryUse, StepRecord, TrainingHistory


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
