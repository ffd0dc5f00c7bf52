"""The learning rate of each step, as a factor of the highest one.

A factor depends on the step alone, so that a training that is continued needs no state of a scheduler.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping


def _linear(progress: float) -> float:
    return 1 - progress


def _cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


def _constant(_: float) -> float:
    return 1.0


# Name -> the factor at a part (0 to 1) of the steps after the warm-up
SCHEDULES: Mapping[str, Callable[[float], float]] = {"linear": _linear, "cosine": _cosine, "constant": _constant}


def learning_rate_factor(schedule: str, step: int, steps: int, warmup: float) -> float:
    """The factor, from 0 to 1, of step `step` (from 0) of `steps`: linear up to 1 over the warm-up, then the schedule.

    `warmup` is the part of all steps, from 0 to below 1. Every step has a factor above 0.
    """
    warm = min(round(steps * warmup), steps - 1)
    if step < warm:
        return (step + 1) / (warm + 1)
    return SCHEDULES[schedule]((step - warm) / (steps - warm))
