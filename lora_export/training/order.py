"""Which examples each step sees: all of them once an epoch, in an order that the seed and the epoch decide."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


class ShuffledOrder:
    """The rows of each step."""

    def __init__(self, count: int, batch_size: int, seed: int):
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.steps_per_epoch = math.ceil(count / batch_size)
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
