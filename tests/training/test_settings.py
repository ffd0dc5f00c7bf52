"""Settings of a training, and impossible ones."""

from __future__ import annotations

from typing import Any

import pytest

from lora_export.errors import InputRefused
from lora_export.training.settings import TrainingSettings

GOOD: dict[str, Any] = {"epochs": 1, "learning_rate": 0.1, "batch_size": 2, "seed": 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs 0"),
        ({"batch_size": 0, "accumulate": -1}, "batch size 0, accumulate -1"),
        ({"learning_rate": float("nan")}, "learning rate nan"),
        ({"learning_rate": float("inf")}, "learning rate inf"),
        ({"warmup": 1.0}, r"warm-up 1\.0"),
        ({"weight_decay": -0.1}, r"weight decay -0\.1"),
        ({"schedule": "stairs"}, "schedule stairs"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        TrainingSettings(**(GOOD | changes))


def test_what_changes_no_result_is_not_recorded() -> None:
    first, second = TrainingSettings(**GOOD, save_every=1), TrainingSettings(**GOOD, save_every=2)
    assert first.recorded == second.recorded and first.recorded["learning_rate"] == 0.1
    assert first.recorded != TrainingSettings(**GOOD, accumulate=2).recorded


def test_early_stopping_and_the_best_checkpoint_evaluate() -> None:
    assert not TrainingSettings(**GOOD).evaluates
    for name in ("evaluate_every", "patience", "keep_best"):
        assert TrainingSettings(**GOOD, **{name: 1}).evaluates
