"""A weight that a step changes, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lora_export.plan import Step
from lora_export.verification.against_checkpoint.fp64_sums import Fp64Sum
from lora_export.verification.against_checkpoint.stored_tensor import StoredTensor
from lora_export.verification.parity import Wide


@dataclass(frozen=True, eq=False)
class ChangedWeight:
    """A weight that a step changes: as the base stores it, and as the candidate does."""

    step: Step
    base: StoredTensor
    candidate: StoredTensor
    pieces: Sequence[slice]

    def before(self, rows: slice) -> Wide:
        """The rows to which something is added, in fp64."""
        stored = self.base.rows(rows) if self.step.replace is None else self.step.replace[rows]
        return np.asarray(stored, np.float64)

    def after(self, rows: slice) -> Wide:
        """The rows of the candidate, in fp64."""
        return self.candidate.rows(rows).astype(np.float64)

    def with_norms(self, one: Fp64Sum) -> Fp64Sum:
        """The sum with the norms of DoRA's outputs, where these take a pass over all rows."""
        if not one.needs_column_norms:
            return one
        assert self.step.magnitude is not None
        plain, squares = one.without_magnitude(), np.zeros((2, len(self.step.magnitude)))
        for rows in self.pieces:
            squares += [np.square(part).sum(axis=0) for part in plain.rows(rows, self.before(rows))]
        norms, bounds = np.sqrt(squares)
        return replace(one, column_norms=(norms, bounds))
