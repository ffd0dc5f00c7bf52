"""Settings of a training, and impossible ones."""

from __future__ import annotations

import re
from typing import Any, get_args

import pytest

from lora_export.errors import WrongUsage
from lora_export.options.declaring import options_of
from lora_export.options.train import LearntTask, TrainingSettings
from lora_export.training.order import SCHEDULES
from lora_export.training.row_forms import RowForm

GOOD: dict[str, Any] = {"epochs": 1, "learning_rate": 0.1, "batch_size": 2, "seed": 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs= is 0; it must be at least 1"),
        ({"batch_size": 0}, "batch_size= is 0"),
        ({"accumulate": -1}, "accumulate= is -1"),
        ({"learning_rate": float("nan")}, "learning_rate= is nan; it must be above 0"),
        ({"learning_rate": float("inf")}, "learning_rate= is inf"),
        ({"max_gradient_norm": 0.0}, "max_gradient_norm= is 0"),
        ({"seed": -1}, "seed= is -1; it must be at least 0"),
        ({"warmup": 1.0}, "warmup= is 1; it must be at least 0 and below 1"),
        ({"weight_decay": -0.1}, "weight_decay= is -0.1"),
        ({"schedule": "stairs"}, "schedule= is 'stairs'; it must be linear, cosine or constant"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WrongUsage, match=re.escape(message)):
        TrainingSettings(**(GOOD | changes))


def test_what_changes_no_result_is_not_recorded() -> None:
    first, second = TrainingSettings(**GOOD, save_every=1), TrainingSettings(**GOOD, save_every=2)
    assert first.recorded == second.recorded and first.recorded["learning_rate"] == 0.1
    assert first.recorded != TrainingSettings(**GOOD, accumulate=2).recorded


def test_early_stopping_and_the_best_checkpoint_evaluate() -> None:
    assert not TrainingSettings(**GOOD).evaluates
    for name in ("evaluate_every", "patience", "keep_best"):
        assert TrainingSettings(**GOOD, **{name: 1}).evaluates


def test_the_schedules_are_those_of_the_loop() -> None:
    (schedule,) = (declared for declared in options_of(TrainingSettings) if declared.name == "schedule")
    assert sorted(schedule.choices) == sorted(SCHEDULES)


def test_tasks_are_those_that_rows_can_have() -> None:
    assert sorted(get_args(LearntTask)) == sorted(RowForm)
