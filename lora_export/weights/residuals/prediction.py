"""Rows of the base as the merged rows and the adapters predict them: W' - ΔW, rounded to the base's type.

The merge and the restoration compute the same bits (see `exact_change`). A prediction that is wrong costs bytes of the
residual, and nothing else.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_export.lora import EVERY_ROW
from lora_export.plan import FLOATS, Plan, Step
from lora_export.storage.safetensors_file import Entry
from lora_export.weights.residuals.exact_change import ExactChange

ENTRIES_AT_ONCE = 1 << 18  # of a block


@dataclass(frozen=True, eq=False)
class ChangedTensor:
    """A tensor that a merge changed: where it is in the base and in the merged file, and what was added where."""

    base: Entry
    merged: Entry
    steps: tuple[tuple[Step, slice, slice], ...]  # with the rows and columns of the matrix that each one changed
    rows: int  # of the matrix: of a tensor of which parts were changed, that of which these are blocks

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrix as which the blocks are cut."""
        return (self.rows, math.prod(self.base.shape) // self.rows if self.rows else 0)

    def pieces(self) -> Iterator[slice]:
        """The rows of each block."""
        rows, columns = self.shape
        step = max(1, ENTRIES_AT_ONCE // max(1, columns))
        for first, last in itertools.pairwise([*range(0, rows, step), rows]):
            yield slice(first, last)

    @property
    def subtracted(self) -> tuple[tuple[Step, slice, slice], ...]:
        """The steps whose ΔW is known: sums that DoRA does not rescale, and shifts of biases."""
        return tuple(each for each in self.steps if _is_plain(each[0]))


class Predictor:
    """Predicts rows of one tensor. Holds the integers of its pairs."""

    def __init__(self, tensor: ChangedTensor):
        self.tensor = tensor
        is_float = {str(tensor.base.dtype), str(tensor.merged.dtype)} <= FLOATS
        steps = tensor.subtracted if is_float else ()
        self._changes = [(ExactChange(step), rows, columns) for step, rows, columns in steps]

    def rows(self, rows: slice, merged: NDArray[np.generic]) -> NDArray[np.generic]:
        """The prediction for these rows in the base's dtype, from those of the merged tensor; (rows, columns)."""
        dtype = self.tensor.base.dtype
        if not {str(dtype), str(merged.dtype)} <= FLOATS:
            same = dtype == merged.dtype
            return merged if same else np.zeros(merged.shape, dtype)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            wide = merged.astype(np.float64)
            for change, own, columns in self._changes:
                first, last = max(rows.start, own.start), min(rows.stop, own.stop)
                if first < last:
                    part = wide[first - rows.start : last - rows.start, columns]
                    part -= change.rows(slice(first - own.start, last - own.start)).reshape(part.shape)
            # Through fp32: NumPy's own rounding to it has one result on every machine.
            return wide if dtype == np.float64 else wide.astype(np.float32).astype(dtype)


def _is_plain(step: Step) -> bool:
    region = step.spec.region
    has_part_of_columns = region is not None and region.columns != EVERY_ROW and len(region.shape) > 2
    return step.replace is None and step.token_rows is None and not step.has_dora and not has_part_of_columns


def changed_tensor(plan: Plan, base: Entry, merged: Entry) -> ChangedTensor | None:
    """What a plan did to a tensor; None where it was copied."""
    parts = plan.by_part.get(base.name, ())
    steps = [(step, step.spec.region.rows, step.spec.region.columns) for step in parts if step.spec.region is not None]
    if (step := plan.by_weight.get(base.name)) is not None and not step.added:
        steps.append((step, slice(0, base.rows), EVERY_ROW))
    if not steps and base.dtype == merged.dtype:
        return None
    regions = [step.spec.region for step in parts if step.spec.region is not None]
    return ChangedTensor(base, merged, tuple(steps), regions[0].shape[0] if regions else base.rows)
