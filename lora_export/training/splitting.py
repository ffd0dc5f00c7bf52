"""Hold some of the rows out of training."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.options.spelling import named

RowNumbers = NDArray[np.int64]


def split_rows(groups: NDArray[np.int64], holdout: float, *, seed: int) -> tuple[RowNumbers, RowNumbers]:
    """The rows to train on and those held out, sorted: of each group the same part, drawn by the seed.

    `groups` has a number for each row, such as its class. `holdout` is the part to hold out, between 0 and 1. A group
    always has a row to train on. Raises InputRefused for another `holdout`, and where nothing would be held out.
    """
    if not 0 < holdout < 1:
        raise InputRefused(f"the part to hold out is {holdout}; it must be between 0 and 1")
    rng = np.random.default_rng(seed)
    trained_on: list[RowNumbers] = []
    held_out: list[RowNumbers] = []
    for group in np.unique(groups):
        rows = rng.permutation(np.flatnonzero(groups == group))
        count = min(round(len(rows) * holdout), len(rows) - 1)
        held_out.append(rows[:count])
        trained_on.append(rows[count:])
    if not sum(map(len, held_out)):
        of_what = "each class" if len(held_out) > 1 else "them"
        raise InputRefused(
            f"{len(groups)} examples are too few to hold out {holdout:g} of {of_what}. "
            f"Give more examples, or train on all of them ({named('holdout', 0)})"
        )
    return np.sort(np.concatenate(trained_on)), np.sort(np.concatenate(held_out))
