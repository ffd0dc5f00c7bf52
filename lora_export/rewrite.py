"""A tensor on its way from one file into another: copied, rounded to another dtype, replaced, or added to.

Whatever holds weights in files (a safetensors file, a graph) describes each of its tensors as a `Move`, and gets
the blocks that `transfer` carries over.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lora_export import transfer
from lora_export.errors import InputRefused
from lora_export.ledger import Tally
from lora_export.lora import add_into, sums_in
from lora_export.plan import FLOATS, Step
from lora_export.tensorfile import Entry
from lora_export.transfer import Block, Bytes

MEASURED = 1 << 20  # entries of a weight from which its figures are taken, at least


@dataclass(frozen=True, eq=False)
class Move:
    """One tensor of the output: what it is, where in the base it comes from, and what happens to it on the way."""

    old: Entry  # of an added tensor: no bytes
    step: Step | None  # None: nothing but, perhaps, another dtype
    name: str
    dtype: np.dtype[Any]

    @property
    def is_copy(self) -> bool:
        return self.step is None and self.old.dtype == self.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.old.shape) * self.dtype.itemsize


def room(moves: Iterable[Move]) -> int:
    """The size of the largest block that these tensors need."""
    return max((transfer.BLOCK, *(_room(move, 1) for move in moves if not move.is_copy)))


def copied_blocks(read_fd: int, write_fd: int, start: int, place: int, count: int) -> Iterator[Block]:
    """Carry a range over as it is; shared where the file system can."""
    shared = transfer.share(read_fd, write_fd, start, place, count)
    ends = sorted({start, start + count, *((shared.start, shared.stop) if shared else ())})
    for one, other in itertools.pairwise(ends):
        for first in range(one, other, transfer.BLOCK):
            last = min(first + transfer.BLOCK, other)
            yield Block(first, last, place + first - start, place + last - start, shared=first in shared)


def changed_blocks(move: Move, place: Entry) -> Iterator[Block]:
    """Carry a tensor over in whole rows, changed on the way. The work of a block returns a Tally, or None."""
    old, count = move.old, max(1, transfer.BLOCK // max(1, _room(move, 1)))
    cuts = [*range(0, place.rows, count), place.rows]
    rows = [slice(first, last) for first, last in itertools.pairwise(cuts)]
    measured = _measured(move.step, rows)
    for part, is_measured in zip(rows, measured, strict=True):
        yield Block(
            old.start + part.start * old.row_bytes,
            old.start + part.stop * old.row_bytes,
            place.start + part.start * place.row_bytes,
            place.start + part.stop * place.row_bytes,
            work=functools.partial(_change, move, place, part, is_measured),
        )


def _room(move: Move, rows: int) -> int:
    """The bytes that rows of a tensor take in their largest form on the way: stored, summed, or stored anew."""
    each = max(move.old.dtype.itemsize, move.dtype.itemsize, np.dtype(np.float32).itemsize)
    return rows * math.prod(move.old.shape[1:]) * each


def _measured(step: Step | None, rows: Sequence[slice]) -> Sequence[bool]:
    """Which blocks of a weight the ledger's figures are taken from: all, or in a large weight some.

    Measuring a block costs as much as changing it, and a million entries tell a retention to a thousandth. The
    sample is spread over the rows evenly; where it would miss much of the change, all is measured.
    """
    everything = [True] * len(rows)
    stride = math.prod(step.spec.shape) // MEASURED if step is not None and step.terms else 0
    if step is None or stride < 2:
        return everything
    sample = [number % stride == 0 for number in range(len(rows))]
    energies = step.row_energies()
    in_sample = [part for part, taken in zip(rows, sample, strict=True) if taken]
    share = sum(part.stop - part.start for part in in_sample) / len(energies)
    heard = sum(energies[part].sum() for part in in_sample)
    return sample if heard >= share / 2 * energies.sum() else everything


def _change(
    move: Move, place: Entry, rows: slice, measured: bool, source: Bytes, target: Bytes, spare: Bytes
) -> Tally | None:
    """Make rows of a tensor that is not copied; returns what became of them where something was added to them."""
    shape = (rows.stop - rows.start, *move.old.shape[1:]) if move.old.shape else ()
    merged = target.view(place.dtype).reshape(shape)
    with np.errstate(over="ignore", invalid="ignore"):  # _refuse_overflow looks for it, and knows the tensor's name
        if move.step is not None and move.step.replace is not None:
            whole = move.step.replace[rows] if move.old.shape else move.step.replace
            np.copyto(merged, whole, casting="unsafe")
            _refuse_overflow(place, whole, merged)
            return None
        weight = source.view(move.old.dtype).reshape(shape)
        if move.step is None:
            np.copyto(merged, weight, casting="unsafe")
            _refuse_overflow(place, weight, merged)
            return None
        change, total = _two(spare, shape, sums_in(weight.dtype))
        change = move.step.stored_delta(rows, out=change)
        add_into(merged, weight, change, total)
        flat = total.reshape(-1)
        if not flat @ flat < float(ml_dtypes.finfo(place.dtype).max) ** 2:  # or it is finite, each entry of it
            _refuse_overflow(place, weight, merged)
        tally = Tally(place.name)
        if measured:
            tally.count(weight, change, merged)
    return tally


def _two(spare: Bytes, shape: tuple[int, ...], wide: np.dtype[Any]) -> tuple[NDArray[np.float32], NDArray[Any]]:
    """Room for a change and a sum of this shape."""
    half, count = spare.size // 2, math.prod(shape)
    change = spare[: 4 * count].view(np.float32).reshape(shape)
    return change, spare[half : half + wide.itemsize * count].view(wide).reshape(shape)


def _refuse_overflow(place: Entry, before: NDArray[Any], after: NDArray[Any]) -> None:
    if str(place.dtype) not in FLOATS or np.isfinite(after).all():
        return
    bad = before.size - np.count_nonzero(np.isfinite(before))
    if bad:
        raise InputRefused(f"{place.name}: the base holds {bad} values that are not finite. Nothing was written.")
    limit = float(ml_dtypes.finfo(place.dtype).max)
    raise InputRefused(
        f"{place.name}: {after.size - np.count_nonzero(np.isfinite(after))} values would lie beyond {limit:g}, the "
        f"largest {place.dtype}. Look at the adapter's scale, or use --dtype float32. Nothing was written."
    )
