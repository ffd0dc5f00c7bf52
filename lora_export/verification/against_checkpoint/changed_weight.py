"""A weight that a step changes, before and after."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.plan import Step
from lora_export.verification.against_checkpoint.compare_rows import WeightRows
from lora_export.verification.against_checkpoint.fp64_sums import Fp64Sum
from lora_export.verification.against_checkpoint.stored_tensor import Scratch, StoredTensor
from lora_export.verification.parity import Wide

FIRST_ENTRIES, MOST_ENTRIES = 1 << 12, 1 << 16  # entries: a block in fp64 is half a MiB


@dataclass(frozen=True, eq=False)
class ChangedWeight:
    """A weight that a step changes: as the base stores it, and as the candidate does."""

    step: Step
    base: StoredTensor
    candidate: StoredTensor
    pieces: Sequence[slice]

    def before(self, rows: slice) -> Wide:
        """The rows to which something is added, in fp64."""
        return np.asarray(self._stored(rows, Scratch()), np.float64)

    def after(self, rows: slice) -> Wide:
        """The rows of the candidate, in fp64."""
        return self.candidate.rows(rows).astype(np.float64)

    def blocks(self) -> Iterator[WeightRows]:
        """All rows in blocks that stay in a core's cache; the first is small. A block is valid until the next one."""
        scratch, size = Scratch(), FIRST_ENTRIES
        for piece in self.pieces:
            before, after = self._stored(piece, scratch), self.candidate.rows(piece, scratch, "candidate")
            first = 0
            while first < len(after):
                part = slice(first, min(len(after), first + max(1, size // math.prod(after.shape[1:]))))
                rows = slice(piece.start + part.start, piece.start + part.stop)
                wide = _widened(before[part], scratch, "base in fp64"), _widened(after[part], scratch, "in fp64")
                yield WeightRows(rows, *wide, after[part])
                first, size = part.stop, MOST_ENTRIES

    def _stored(self, rows: slice, scratch: Scratch) -> NDArray[Any]:
        """The rows to which something is added, as they are stored."""
        return self.base.rows(rows, scratch, "base") if self.step.replace is None else self.step.replace[rows]

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


def _widened(stored: NDArray[Any], scratch: Scratch, name: str) -> Wide:
    wide = scratch.array(name, stored.shape)
    np.copyto(wide, stored)
    return wide
