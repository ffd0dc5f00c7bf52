"""The learning rate of each step."""

from __future__ import annotations

import math

import pytest

from lora_export.training.schedule import learning_rate_factor


def factors(schedule: str, steps: int, warmup: float) -> list[float]:
    return [learning_rate_factor(schedule, step, steps, warmup) for step in range(steps)]


def test_rates_warm_up_and_then_follow_the_schedule() -> None:
    warm = [1 / 3, 2 / 3, 1]
    assert factors("linear", 10, 0.2) == pytest.approx([*warm, *(number / 8 for number in (7, 6, 5, 4, 3, 2, 1))])
    assert factors("constant", 5, 0.4) == pytest.approx([*warm, 1, 1])
    cosine = [(1 + math.cos(math.pi * number / 4)) / 2 for number in range(4)]
    assert factors("cosine", 4, 0.0) == pytest.approx(cosine)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_every_step_learns(schedule: str) -> None:
    assert factors(schedule, 1, 0.9) == [1.0]
    assert min(factors(schedule, 7, 0.5)) > 0
