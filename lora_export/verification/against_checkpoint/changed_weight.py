"""A weight that a step changes, before and after; some of its rows against one sum in fp64.

V is computed in fp64 for every entry. Whether |M - V| is within half a step of the stored dtype and the bound of a sum
in fp32 needs a second look only where one of these does not show it:

    bf16, fp16    V, rounded to fp32 and then to the stored dtype, has the bits of M. The first rounding moves V by
                  2⁻²⁴ · |V|, which is less than the bound, and the second by half a step.
    fp32, fp64    |M - V| <= 2⁻²² · |V|, which is a part of the bound.

A block with a value that is not finite is compared entry by entry.

Whether the numbers of a layer were chosen by its inputs for one sum shows in their errors E = M - V. d is the distance
from each number to the value on the other side of V, and H the damped second moments of the layer's inputs. To take the
other value changes ‖XEᵀ‖² by 2 (EH)_k d_k + H_kk d_k². Feedback leaves almost no number where that is negative. What
all of them could gain, relative to Σ H_kk d_k², is below 2e-4 (measured on 4 bits, 8 bits and bf16). For another sum it
is larger, by the more it differs in the outputs. This file shares no code with a merge.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lora_export.pairs.exact_transforms import OF_OUTPUTS, exact_change, independent_axis
from lora_export.pairs.transforms import WeightTransform
from lora_export.plan import Layout, Step
from lora_export.storage.matrix_on_disk import MatrixOnDisk
from lora_export.verification.against_checkpoint.fp64_sums import (
    EVERY_ENTRY,
    FP32_ROUNDOFF,
    ChangesOf,
    Entries,
    Fp64Sum,
    allowed_error,
)
from lora_export.verification.against_checkpoint.stored_tensor import Scratch
from lora_export.verification.parity import Wide
from lora_export.weights.calibrated_rounding import DAMPING, LayerInputs

MOST_LEFT = 1e-3  # of what single numbers could gain: see above
NEARLY = 1 + 2.0**-10  # times half a step: a sum in fp32 may round to either value


@dataclass(eq=False)
class ChosenNumbers:
    """The errors of one layer against several sums, by the names of these, block by block."""

    fitted: NDArray[np.float32]  # inputs of the layer, (tokens, inputs)
    held_out: NDArray[np.float32]
    is_transposed: bool  # whether the rows of the stored weight are inputs: all blocks are judged together then
    _moments: Wide = field(init=False)
    _sums: dict[str, Wide] = field(default_factory=dict)
    _waiting: dict[str, list[tuple[NDArray[Any], ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = self.fitted.astype(np.float64)
        self._moments = rows.T @ rows
        diagonal = np.einsum("ii->i", self._moments)
        diagonal += DAMPING * (diagonal.mean() or 1.0)

    def add(self, name: str, difference: Wide, halves: tuple[Wide, Wide], change: Wide) -> None:
        """Add a block of M - V, with half the distances to the values beside M, and V - W."""
        half = np.where(difference > 0, *halves)
        other = -np.sign(difference) * 2 * np.where(np.isfinite(half), half, 0)
        arrays = difference.copy(), other, np.abs(difference) <= half * NEARLY, change.copy()
        if self.is_transposed:
            self._waiting.setdefault(name, []).append(arrays)
        else:
            self._add(name, *arrays)

    def _add(self, name: str, error: Wide, other: Wide, is_nearest: NDArray[np.bool_], change: Wide) -> None:
        """Add whole outputs, all (outputs, inputs)."""
        diagonal = np.einsum("ii->i", self._moments)
        sizes = diagonal * np.square(other)
        gains = np.minimum(2 * (error @ self._moments) * other + sizes, 0)
        chosen = ~is_nearest.all(axis=1)  # all others are rounded to nearest
        nearest = np.where(is_nearest, error, error + other)
        rows = self.held_out.astype(np.float64)
        squares = [np.square(rows @ each.T).sum() for each in (error, nearest, change)]
        found = np.array([-gains[chosen].sum(), sizes[chosen].sum(), np.count_nonzero(chosen), *squares])
        self._sums[name] = self._sums.get(name, 0) + found

    def _of(self, name: str) -> Wide:
        if waiting := self._waiting.pop(name, None):
            self._add(name, *(np.concatenate(each).T for each in zip(*waiting, strict=True)))
        return self._sums[name]

    def fits(self, name: str) -> bool:
        """Whether the numbers were chosen for this sum; those of whole outputs may be the nearest."""
        gain, size, *_ = self._of(name)
        return bool(gain <= MOST_LEFT * size)

    def is_calibrated(self, name: str) -> bool:
        """Whether some number is not the nearest."""
        return bool(self._of(name)[2])

    def errors(self, name: str) -> tuple[float, float] | None:
        """‖X(M - V)ᵀ‖ / ‖X(V - W)ᵀ‖ on held-out inputs, of M and of the nearest numbers; None without an effect."""
        *_, own, nearest, effect = self._of(name)
        return (float(np.sqrt(own / effect)), float(np.sqrt(nearest / effect))) if effect else None


LEAST = np.finfo(np.float64).tiny  # above zero: what is relative to it is finite
MOST_UNDECIDED = 1 / 8  # of the entries of a block; all together cost less than more of them one by one


class TensorRows(Protocol):
    """A tensor that is read in pieces: from a file (`StoredTensor`), or of a model or a graph."""

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def rows(self, rows: slice, scratch: Scratch | None = None, name: str = "") -> NDArray[Any]: ...


@dataclass(frozen=True, eq=False)
class WeightRows:
    """Some rows of a weight, before and after."""

    rows: slice
    before: Wide  # to which something is added
    after: Wide  # M
    stored: NDArray[Any]  # M in its own dtype
    # Half the distances from M to the next smaller and the next larger value that can be stored; None: the dtype's
    gaps: tuple[Wide, Wide] | None = None
    is_calibrated: bool = False  # M may be either value around V: twice as far away

    def allowed(self, value: Wide, bound: Wide, difference: Wide, entries: Entries) -> Wide:
        """How far M may be from V, of these entries."""
        if self.gaps is None:
            return allowed_error(value, bound, self.stored.dtype)
        below, above = (gap.reshape(-1)[entries] for gap in self.gaps)
        found: Wide = np.where(difference > 0, below, above) + bound
        if self.is_calibrated:  # a number that can be stored and does not change has no choice
            before = self.before.reshape(-1)[entries]
            stays = (value == before) & (before == before.astype(self.stored.dtype))
            found = np.where(stays, np.maximum(bound, LEAST), 2 * found - bound)
        return found


@dataclass(frozen=True, eq=False)
class ComparedRows:
    """What a comparison of a block with one sum found. The arrays are valid until the scratch memory is used again."""

    value: Wide  # V
    difference: Wide  # M - V
    off: int  # entries that differ by more than what is allowed
    entries: Entries  # of the flattened block: those whose bits did not decide
    relative: Wide  # |M - V| of these, relative to what is allowed


def compare_rows(block: WeightRows, one: Fp64Sum, scratch: Scratch, *, every_entry: bool = False) -> ComparedRows:
    """Compare a block with a sum. With `every_entry`, no entry is decided by its bits."""
    with np.errstate(over="ignore", invalid="ignore"):  # entries that are off may have any value
        value, bound_of = one.values(block.rows, block.before, scratch)
        difference = np.subtract(block.after, value, out=scratch.array("difference", value.shape))
        entries = EVERY_ENTRY if every_entry else _undecided(block, value, difference, scratch)
        if not isinstance(entries, slice) and not entries.size:
            return ComparedRows(value, difference, 0, entries, np.empty(0))
        signed = difference.reshape(-1)[entries]
        distance = np.abs(signed)
        allowed = block.allowed(value.reshape(-1)[entries], bound_of(entries), signed, entries)
        relative = np.nan_to_num(distance / allowed, nan=np.inf, posinf=np.inf)
        off = distance.size - int(np.count_nonzero(distance <= allowed))  # NaN is off
    return ComparedRows(value, difference, off, entries, relative)


def _undecided(block: WeightRows, value: Wide, difference: Wide, scratch: Scratch) -> Entries:
    """The entries that may be off; every entry where there are many."""
    flat = difference.reshape(-1)
    if not np.isfinite(flat @ flat):
        return EVERY_ENTRY
    if block.is_calibrated:
        return EVERY_ENTRY
    mask = scratch.array("undecided", value.shape, np.bool_)
    if block.gaps is not None:
        distance = np.abs(difference, out=scratch.array("distance", value.shape))
        np.less_equal(distance, np.where(difference > 0, *block.gaps), out=mask)
        np.logical_not(mask, out=mask)  # NaN too
    elif block.stored.dtype.itemsize == 2:
        rounded = scratch.array("rounded", value.shape, block.stored.dtype)
        in_fp32 = scratch.array("fp32", value.shape, np.float32)
        np.copyto(in_fp32, value, casting="unsafe")
        np.copyto(rounded, in_fp32, casting="unsafe")
        np.not_equal(rounded.view(np.uint16), block.stored.view(np.uint16), out=mask)
    else:
        distance, near = (scratch.array(name, value.shape) for name in ("distance", "near"))
        np.multiply(np.abs(value, out=near), 4 * FP32_ROUNDOFF, out=near)
        np.greater(np.abs(difference, out=distance), near, out=mask)
    if np.count_nonzero(mask) > MOST_UNDECIDED * mask.size:
        return EVERY_ENTRY
    return np.flatnonzero(mask)


FIRST_ENTRIES, MOST_ENTRIES = 1 << 12, 1 << 16  # entries: a block in fp64 is half a MiB


@dataclass(frozen=True, eq=False)
class CalibratedLayer:
    """A layer whose numbers are not rounded to nearest, by the record of the candidate."""

    inputs: LayerInputs | None = None  # where they are known

    def numbers(self, layout: Layout) -> ChosenNumbers | None:
        if self.inputs is None:
            return None
        rows = self.inputs.fitted.read(), self.inputs.held_out.read()
        return ChosenNumbers(*rows, is_transposed=layout.is_transposed)


@dataclass(frozen=True, eq=False)
class ChangedWeight:
    """A weight that a step changes: as the base stores it, and as the candidate does."""

    step: Step
    base: TensorRows
    candidate: TensorRows
    pieces: Sequence[slice]
    calibrated: CalibratedLayer | None = None  # None: each number is rounded to nearest

    @property
    def stored_as(self) -> str:
        """What the candidate's numbers are rounded to."""
        return str(self.candidate.dtype)

    def before(self, rows: slice) -> Wide:
        """The rows to which something is added, in fp64."""
        return np.asarray(self._stored(rows), np.float64)

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
                gaps = None if self.calibrated is None else half_gaps(after[part])
                yield WeightRows(rows, *wide, after[part], gaps, self.calibrated is not None)
                first, size = part.stop, MOST_ENTRIES

    def _stored(self, rows: slice, scratch: Scratch | None = None) -> NDArray[Any]:
        """The rows to which something is added, as they are stored."""
        return self.base.rows(rows, scratch, "base") if self.step.replace is None else self.step.replace[rows]

    def with_norms(self, one: Fp64Sum) -> Fp64Sum:
        """The sum with what takes a pass over all rows: norms of DoRA's outputs, and T(W)."""
        if one.needs_weight:
            return replace(one, changes=changes_of_weight(self))
        if not one.needs_column_norms:
            return one
        assert self.step.magnitude is not None
        plain, squares = one.without_magnitude(), np.zeros((2, len(self.step.magnitude)))
        for rows in self.pieces:
            squares += [np.square(part).sum(axis=0) for part in plain.rows(rows, self.before(rows))]
        norms, bounds = np.sqrt(squares)
        return replace(one, column_norms=(norms, bounds))


def changes_of_weight(weight: ChangedWeight) -> ChangesOf:
    """T(W) - W and its size, of rows that are in one of the pieces.

    Where the rows change one by one, those of a piece are computed when they are needed. Otherwise the columns do: all
    are computed at once, by way of temporary files of 24 bytes for each entry.
    """
    (pair, is_transposed) = weight.step.terms[0].pair, weight.step.spec.layout.is_transposed
    assert isinstance(pair, WeightTransform)
    transform: WeightTransform = pair

    def changes(own: slice, stored: Wide) -> tuple[Wide, Wide]:
        change, size = exact_change(transform, stored.T if is_transposed else stored, own)
        return (change.T, size.T) if is_transposed else (change, size)

    axis = independent_axis(transform)
    if axis is not None and (axis == OF_OUTPUTS) is not is_transposed:
        last: list[tuple[slice, tuple[Wide, Wide]]] = []

        def of_rows(rows: slice) -> tuple[Wide, Wide]:
            if not last or not last[0][0].start <= rows.start < last[0][0].stop:
                piece = next(each for each in weight.pieces if each.start <= rows.start < each.stop)
                last[:] = [(piece, changes(piece, weight.before(piece)))]
            (piece, (change, size)) = last[0]
            here = slice(rows.start - piece.start, rows.stop - piece.start)
            return change[here], size[here]

        return of_rows

    shape = weight.pieces[-1].stop, math.prod(weight.step.spec.shape) // weight.pieces[-1].stop
    before, change, size = (MatrixOnDisk(shape, np.float64) for _ in range(3))
    for piece in weight.pieces:
        before.write_rows(piece, weight.before(piece).reshape(-1, shape[1]))
    every = slice(0, shape[0])
    for columns in before.column_blocks if axis is not None else ():
        for matrix, values in zip((change, size), changes(columns, before.columns(columns)), strict=True):
            matrix.write_columns(columns, values)
    if axis is None:
        for matrix, values in zip((change, size), changes(every, before[every]), strict=True):
            matrix.write_rows(every, values)
    return lambda rows: (change[rows], size[rows])


def half_gaps(stored: NDArray[Any]) -> tuple[Wide, Wide]:
    """Half the distances from numbers of a float dtype to the next smaller and the next larger ones."""
    ends = (np.array(end, stored.dtype) for end in (-np.inf, np.inf))
    with np.errstate(over="ignore", invalid="ignore"):
        wide = stored.astype(np.float64)
        below, above = (np.abs(np.nextafter(stored, end).astype(np.float64) - wide) / 2 for end in ends)
    return below, above


def _widened(stored: NDArray[Any], scratch: Scratch, name: str) -> Wide:
    wide = scratch.array(name, stored.shape)
    np.copyto(wide, stored)
    return wide
