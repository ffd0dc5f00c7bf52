"""Rows of the base as the merged rows and the adapters predict them: W' - ΔW, rounded to the base's type.

The merge and the restoration compute the same bits. A prediction that is wrong costs bytes of the residual, and nothing
else.

A matrix product in floating point depends on the order of its sums, so on the processor and the library. For ΔW the
factors are rounded to integers, relative to the largest value of each row of B and each column of A. They are so small
that every sum of their products is an integer below 2⁵³, which fp64 holds exactly in any order. What follows is
single operations of IEEE 754, which have one result.

A residual has how far the bit patterns of the base are from the predicted ones. The patterns of two neighbouring values
of a float type differ by one, so a rounding that went the other way is a small integer. Where most differences are
zero, the positions and values of the others are stored; else all of them, one plane of bytes after the other, which
compresses well.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.lora import EVERY_ROW
from lora_export.plan import FLOATS, Plan, Step, Term
from lora_export.storage.safetensors_file import Entry

HEADER = struct.Struct("<BBBxI")  # kind, bytes of a gap, bytes of a value, number of values
SPARSE, DENSE = 0, 1
SPARSE_BELOW = 8  # sparse where fewer than one of so many differences is not zero
UNSIGNED: dict[int, np.dtype[Any]] = {size: np.dtype(f"<u{size}") for size in (1, 2, 4, 8)}
ReadBytes = Callable[[int], bytes]  # reads exactly so many bytes


def packed_differences(actual: NDArray[Any], predicted: NDArray[Any]) -> bytes:
    """The differences of the bit patterns of two arrays of one dtype and size, as bytes."""
    unsigned = UNSIGNED[actual.dtype.itemsize]
    steps = _folded(_patterns(actual, unsigned) - _patterns(predicted, unsigned))
    positions = np.flatnonzero(steps)
    if len(positions) * SPARSE_BELOW >= steps.size:
        width = _least_width(steps)
        planes = steps.view(np.uint8).reshape(-1, unsigned.itemsize)[:, :width]
        return HEADER.pack(DENSE, 0, width, steps.size) + np.ascontiguousarray(planes.T).tobytes()
    gaps, values = np.diff(positions, prepend=-1) - 1, steps[positions]
    gap_width, width = _least_width(gaps), _least_width(values)
    head = HEADER.pack(SPARSE, gap_width, width, len(positions))
    return head + gaps.astype(UNSIGNED[gap_width]).tobytes() + values.astype(UNSIGNED[width]).tobytes()


def unpacked_differences(read: ReadBytes, size: int, itemsize: int) -> NDArray[Any]:
    """The differences of `size` patterns, from what `packed_differences` wrote.

    Reads no more than such an array can need. Raises InputRefused for what it cannot have written.
    """
    kind, gap_width, width, count = HEADER.unpack(read(HEADER.size))
    unsigned = UNSIGNED[itemsize]
    is_known = kind in (SPARSE, DENSE) and 1 <= width <= itemsize and count <= size
    if not is_known or (kind == SPARSE and (gap_width not in UNSIGNED or width not in UNSIGNED)):
        raise _damaged()
    steps = np.zeros(size, unsigned)
    if kind == DENSE:
        if count != size:
            raise _damaged()
        planes = np.frombuffer(read(width * size), np.uint8).reshape(width, size)
        steps.view(np.uint8).reshape(size, itemsize)[:, :width] = planes.T
        return _unfolded(steps)
    gaps = np.frombuffer(read(gap_width * count), UNSIGNED[gap_width])
    if gaps.size and (int(gaps.max()) >= size):
        raise _damaged()
    positions = np.cumsum(gaps.astype(np.int64) + 1) - 1
    if count and positions[-1] >= size:
        raise _damaged()
    steps[positions] = np.frombuffer(read(width * count), UNSIGNED[width])
    return _unfolded(steps)


def add_differences(predicted: NDArray[Any], differences: NDArray[Any]) -> NDArray[Any]:
    """The array whose bit patterns are those of `predicted` plus the differences; of the same dtype, flat."""
    unsigned = UNSIGNED[predicted.dtype.itemsize]
    actual: NDArray[Any] = (_patterns(predicted, unsigned) + differences).view(predicted.dtype)
    return actual


def _patterns(array: NDArray[Any], unsigned: np.dtype[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(array).reshape(-1).view(unsigned)


def _folded(differences: NDArray[Any]) -> NDArray[Any]:
    """0, -1, 1, -2, ... as 0, 1, 2, 3, ...: small differences of both signs become small numbers."""
    signed = differences.view(f"<i{differences.itemsize}")
    folded: NDArray[Any] = ((signed << 1) ^ (signed >> (8 * signed.itemsize - 1))).view(differences.dtype)
    return folded


def _unfolded(steps: NDArray[Any]) -> NDArray[Any]:
    unfolded: NDArray[Any] = (steps >> 1) ^ (-(steps & 1).view(f"<i{steps.itemsize}")).view(steps.dtype)
    return unfolded


def _least_width(values: NDArray[Any]) -> int:
    """The bytes that the largest value needs: 1, 2, 4 or 8."""
    largest = int(values.max()) if values.size else 0
    return next(size for size in UNSIGNED if largest < 1 << 8 * size)


def _damaged() -> InputRefused:
    return InputRefused("the residual is damaged: it holds differences that no merge writes")


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
