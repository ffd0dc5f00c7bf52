"""What each step sees: the rows that are not held out, in an order that seed and epoch decide, and a learning rate.

Both depend on the number of the step alone, so that a training that is continued needs no state of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from lora_export.errors import InputRefused, count
from lora_export.options.spelling import named

RowNumbers = NDArray[np.int64]


def split_rows(groups: NDArray[np.int64], holdout: float, *, seed: int) -> tuple[RowNumbers, RowNumbers]:
    """The rows to train on and those held out, sorted: of each group the same part, drawn by the seed.

    `groups` has a number for each row, such as its class. `holdout` is the part to hold out, between 0 and 1. A group
    always has a row to train on. Raises InputRefused where nothing would be held out.
    """
    rng = np.random.default_rng(seed)
    trained_on: list[RowNumbers] = []
    held_out: list[RowNumbers] = []
    for group in np.unique(groups):
        rows = rng.permutation(np.flatnonzero(groups == group))
        number = min(round(len(rows) * holdout), len(rows) - 1)
        held_out.append(rows[:number])
        trained_on.append(rows[number:])
    if not sum(map(len, held_out)):
        of_what = "each class" if len(held_out) > 1 else "them"
        raise InputRefused(
            f"{count(len(groups), 'example is', 'examples are')} too few to hold out {holdout:g} of "
            f"{of_what}. "
            f"Give more examples, or train on all of them ({named('holdout', 0)})"
        )
    return np.sort(np.concatenate(trained_on)), np.sort(np.concatenate(held_out))


class ShuffledOrder:
    """The rows of each step."""

    def __init__(self, examples: int, batch_size: int, seed: int):
        self.count, self.batch_size, self.seed = examples, batch_size, seed
        self.steps_per_epoch = math.ceil(examples / batch_size)
        self._epoch = -1
        self._rows = torch.empty(0)

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, of a step, from 0."""
        return step // self.steps_per_epoch

    def rows_of(self, step: int) -> list[int]:
        """The examples of a step, from 0. The last step of an epoch may have fewer."""
        epoch = self.epoch_of(step)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            self._epoch, self._rows = epoch, torch.randperm(self.count, generator=generator)
        start = (step % self.steps_per_epoch) * self.batch_size
        return [int(row) for row in self._rows[start : start + self.batch_size]]


def parts_of(rows: Sequence[int], parts: int, *, rank: int, processes: int) -> list[Sequence[int]]:
    """What one process computes of a step's rows, in at most `parts` parts. Together, all processes have every row."""
    own = rows[rank::processes]
    size = max(1, math.ceil(len(rows) / (parts * processes)))
    return [own[start : start + size] for start in range(0, len(own), size)]


# Name -> the factor at a part (0 to 1) of the steps after the warm-up
SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "constant": lambda _: 1.0,
}


def learning_rate_factor(schedule: str, step: int, steps: int, warmup: float) -> float:
    """The factor, from 0 to 1, of step `step` (from 0) of `steps`: linear up to 1 over the warm-up, then the schedule.

    `warmup` is the part of all steps, from 0 to below 1. Every step has a factor above 0.
    """
    warm = min(round(steps * warmup), steps - 1)
    if step < warm:
        return (step + 1) / (warm + 1)
    return SCHEDULES[schedule]((step - warm) / (steps - warm))
