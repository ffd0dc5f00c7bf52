"""Rows of the base as the merged rows and the adapters predict them: W' - ΔW, rounded to the base's type.

The merge and the restoration compute the same bits. A prediction that is wrong costs bytes of the residual, and nothing
else.

A matrix product in floating point depends on the order of its sums, so on the processor and the library. For ΔW the
factors are rounded to integers, relative to the largest value of each row of B and each column of A. They are so small
that every sum of their products is an integer below 2⁵³, which fp64 holds exactly in any order. What follows is
single operations of IEEE 754, which have one result.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.lora import EVERY_ROW
from lora_export.plan import FLOATS, Plan, Step, Term
from lora_export.storage.safetensors_file import Entry


@dataclass(frozen=True, eq=False)
class _IntegerTerm:
    """One pair: A as integers (rank, columns) and the exponents of its columns; B is rounded row by row."""

    term: Term
    a: NDArray[np.float64]
    exponents: NDArray[np.int32]  # (columns,)
    bits: int

    @classmethod
    def of(cls, term: Term) -> _IntegerTerm:
        a = term.pair.a.reshape(term.pair.rank, -1)
        bits = (52 - math.ceil(math.log2(term.pair.rank))) // 2
        integers, exponents = _integers(a.T, bits)
        return cls(term, np.ascontiguousarray(integers.T), exponents, bits)

    def rows(self, rows: slice) -> NDArray[np.float64]:
        integers, exponents = _integers(self.term.pair.b[rows].reshape(-1, self.term.pair.rank), self.bits)
        product = integers @ self.a  # integers below 2^52: exact
        scaled: NDArray[np.float64] = np.ldexp(product, exponents[:, None] + self.exponents - 2 * self.bits)
        scaled *= np.float64(np.float32(self.term.scale))
        return scaled


class ExactChange:
    """ΔW of a step, in rows of the weight as it is stored, (rows, columns) in fp64."""

    def __init__(self, step: Step):
        self._shift = step.shift
        self._terms = [_IntegerTerm.of(term) for term in step.stored_terms]

    def rows(self, rows: slice) -> NDArray[np.float64]:
        if self._shift is not None:
            return self._shift[rows].astype(np.float64)[:, None]
        first, *others = self._terms
        total = first.rows(rows)
        for term in others:
            total += term.rows(rows)
        return total


def _integers(rows: NDArray[Any], bits: int) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """Each row as integers up to 2^bits, times 2^(exponent - bits)."""
    wide = rows.astype(np.float64)
    _, exponents = np.frexp(np.abs(wide).max(axis=1))
    return np.rint(np.ldexp(wide, bits - exponents[:, None])), exponents.astype(np.int32)


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
    return step.replace is None and step.token_rows is None and not step.depends_on_weight and not has_part_of_columns


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
