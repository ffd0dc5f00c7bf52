"""A tensor on its way from one file into another: copied, rounded to another dtype, replaced, or added to.

Whatever holds weights in files (a safetensors file, a graph) describes each of its tensors as a `Move`, and gets
the blocks that `transfer` carries over.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lora_export import sums
from lora_export.errors import InputRefused
from lora_export.lora import EVERY_ROW
from lora_export.plan import FLOATS, Step
from lora_export.storage import block_copy
from lora_export.storage.block_copy import Block, Bytes, Hashes, Memory
from lora_export.storage.safetensors_file import Entry
from lora_export.weights.merge_report import Statistics

MEASURED = 1 << 20  # entries of a weight from which its figures are taken, at least


class Patch(NamedTuple):
    """A step on a part of a stored matrix, which other parameters share side by side: a block of it."""

    step: Step  # said of the block
    rows: slice
    columns: slice


@dataclass(frozen=True, eq=False)
class Move:
    """One tensor of the output: what it is, where in the base it comes from, and what happens to it on the way."""

    old: Entry  # of an added tensor: no bytes
    step: Step | None  # None: nothing but, perhaps, another dtype
    name: str
    dtype: np.dtype[Any]
    patches: tuple[Patch, ...] = ()  # instead of a step; what they do not touch stays as it is

    @property
    def is_copy(self) -> bool:
        return self.step is None and not self.patches and self.old.dtype == self.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.old.shape) * self.dtype.itemsize


def room(moves: Iterable[Move]) -> int:
    """The size of the largest block that these tensors need."""
    return max((block_copy.BLOCK, *(_room(move, 1) for move in moves if not move.is_copy)))


def copied_blocks(read_fd: int, write_fd: int, start: int, place: int, count: int) -> Iterator[Block]:
    """Carry a range over as it is; shared where the file system can."""
    shared = block_copy.share(read_fd, write_fd, start, place, count)
    ends = sorted({start, start + count, *((shared.start, shared.stop) if shared else ())})
    for one, other in itertools.pairwise(ends):
        for first in range(one, other, block_copy.BLOCK):
            last = min(first + block_copy.BLOCK, other)
            yield Block(first, last, place + first - start, place + last - start, shared=first in shared)


def changed_blocks(source: Path, read_fd: int, move: Move, place: Entry, backend: Backend) -> Iterator[Block]:
    """Carry a tensor over in whole rows, changed on the way. The work of a block returns Tallies.

    Where DoRA's lengths run along the rows, the tensor is read once more, before its first block.
    """
    old, count = move.old, max(1, block_copy.BLOCK // max(1, _room(move, 1)))
    cuts = [*range(0, place.rows, count), place.rows]
    rows = [slice(first, last) for first, last in itertools.pairwise(cuts)]
    measured = measured_blocks(move.step, rows)
    along = [_energies_along(source, read_fd, move, patch, rows) for patch in _patches(move)]
    for part, is_measured in zip(rows, measured, strict=True):
        yield Block(
            old.start + part.start * old.row_bytes,
            old.start + part.stop * old.row_bytes,
            place.start + part.start * place.row_bytes,
            place.start + part.stop * place.row_bytes,
            work=functools.partial(_change, backend.carry_out, move, place, part, is_measured, along),
        )


def _patches(move: Move) -> tuple[Patch, ...]:
    return move.patches if move.step is None else (Patch(move.step, slice(0, move.old.rows), EVERY_ROW),)


def _energies_along(
    source: Path, read_fd: int, move: Move, patch: Patch, rows: Sequence[slice]
) -> NDArray[np.float64] | None:
    """‖·‖² of the outputs of W + ΔW, where each of them runs through every stored row; None where nobody asks."""
    step = patch.step
    if step.magnitude is None or not step.spec.layout.is_transposed:
        return None

    def of(part: slice) -> NDArray[np.float64]:
        stored = np.empty((part.stop - part.start) * move.old.row_bytes, np.uint8)
        block_copy.read(source, read_fd, stored, move.old.start + part.start * move.old.row_bytes)
        weight = sums.starting_rows(step, part, _part(stored.view(move.old.dtype).reshape(_shape(move, part)), patch))
        total = np.empty(weight.shape, sums.sum_dtype(weight.dtype))
        sums.add_into(total, weight, sums.stored_delta(step, part))
        return sums.squared_norms(total.T)

    # In the blocks' order, so that the sum does not depend on the number of threads. Not hashed: `transfer` will.
    with np.errstate(over="ignore", invalid="ignore"), ThreadPoolExecutor(block_copy.default_threads()) as pool:
        squares: NDArray[np.float64] = sum(pool.map(of, rows), start=np.zeros(len(step.magnitude)))
    return squares


def _room(move: Move, rows: int) -> int:
    """The bytes that rows of a tensor take in their largest form on the way: stored, summed, or stored anew."""
    brought = move.step.replace.itemsize if move.step is not None and move.step.replace is not None else 0
    each = max(move.old.dtype.itemsize, move.dtype.itemsize, np.dtype(np.float32).itemsize, brought)
    return rows * math.prod(move.old.shape[1:]) * each


def measured_blocks(step: Step | None, rows: Sequence[slice]) -> Sequence[bool]:
    """Which blocks of a weight the ledger's figures are taken from: all, or in a large weight some.

    Measuring a block costs as much as changing it, and a million entries tell a retention to a thousandth. The
    sample is spread over the rows evenly; where it would miss much of the change, all is measured. So it is with
    DoRA, whose change nobody knows before it is made.
    """
    everything = [True] * len(rows)
    stride = math.prod(step.spec.shape) // MEASURED if step is not None and step.terms else 0
    if step is None or stride < 2 or step.magnitude is not None:
        return everything
    sample = [number % stride == 0 for number in range(len(rows))]
    energies = sums.squared_row_norms(step)
    in_sample = [part for part, taken in zip(rows, sample, strict=True) if taken]
    share = sum(part.stop - part.start for part in in_sample) / len(energies)
    heard = sum(energies[part].sum() for part in in_sample)
    return sample if heard >= share / 2 * energies.sum() else everything


def _change(
    carry_out: CarryOut,
    move: Move,
    place: Entry,
    rows: slice,
    measured: bool,
    along: Sequence[NDArray[np.float64] | None],
    source: Bytes,
    target: Bytes,
    spare: Bytes,
) -> list[Statistics]:
    """Make rows of a tensor that is not copied; returns what became of them where something was added to them."""
    shape = _shape(move, rows)
    merged = target.view(place.dtype).reshape(shape)
    stored = source.view(move.old.dtype).reshape(shape) if move.old.nbytes else merged  # of an added tensor: nothing
    tallies = []
    with np.errstate(over="ignore", invalid="ignore"):  # refuse_overflow looks for it, and knows the tensor's name
        if move.step is None:
            np.copyto(merged, stored, casting="unsafe")
            refuse_overflow(place, stored, merged)
        for patch, lengths in zip(_patches(move), along, strict=True):
            first, last = max(rows.start, patch.rows.start), min(rows.stop, patch.rows.stop)
            if first < last:
                here = slice(first - rows.start, last - rows.start) if move.old.shape else ...
                own = slice(first - patch.rows.start, last - patch.rows.start)
                before, after = _part(stored[here], patch), _part(merged[here], patch)
                named = replace(place, name=patch.step.weight) if move.patches else place
                tallies += carry_out(patch.step, named, own, before, after, lengths, spare, measured=measured)
    return tallies


def carry_out(
    step: Step,
    place: Entry,
    rows: slice,
    stored: NDArray[Any],
    merged: NDArray[Any],
    along: NDArray[np.float64] | None,
    spare: Bytes,
    *,
    measured: bool,
) -> list[Statistics]:
    """What a step does to some rows, by NumPy: `stored` in, `merged` out. See `CarryOut`."""
    weight = sums.starting_rows(step, rows, stored)
    if step.is_replacement:
        np.copyto(merged, weight, casting="unsafe")
        if step.token_rows is not None:
            step.token_rows.write_into(merged, rows.start)
        refuse_overflow(place, weight, merged)
        return []
    change, room = _two(spare, merged.shape, sums.sum_dtype(weight.dtype))
    total = merged if merged.dtype == room.dtype else room  # no pass over what need not be rounded
    change = sums.sum_rows(step, rows, weight, total, column_norms=along, change=change)
    sums.round_into(merged, total)
    flat = total.reshape(-1)
    if not flat @ flat < np.float64(ml_dtypes.finfo(place.dtype).max) ** 2:  # or it is finite, each entry of it
        refuse_overflow(place, weight, merged)
    statistics = Statistics(place.name)
    if measured:
        statistics.count(weight, change, merged, room)
    return [statistics]


class CarryOut(Protocol):
    """Makes `merged` of `stored`, some rows of a weight (or the part of them that is the step's), as the step says.

    `place` is where they will lie, `along` DoRA's lengths where these run along the rows. Returns what became of them,
    where something was added and it is `measured`. Raises InputRefused for what the stored type cannot hold.
    """

    def __call__(
        self,
        step: Step,
        place: Entry,
        rows: slice,
        stored: NDArray[Any],
        merged: NDArray[Any],
        along: NDArray[np.float64] | None,
        spare: Bytes,
        *,
        measured: bool,
    ) -> list[Statistics]: ...


@dataclass(frozen=True)
class Backend:
    """Who changes the weights, and where: NumPy on every core, or a GPU (see `device`)."""

    carry_out: CarryOut = carry_out
    threads: int | None = None  # as many as `transfer` thinks right
    memory: Memory = block_copy.memory
    device: str = ""  # its name, where it is not the processor

    @property
    def settings(self) -> dict[str, str]:
        """What a record should say of it."""
        return {"device": self.device} if self.device else {}

    def transfer(
        self, source: Path, target_fd: int, blocks: Iterable[Block], hashes: Hashes, *, room: int
    ) -> Iterator[tuple[Block, Any]]:
        """As `transfer.transfer`, with this backend's threads and memory."""
        return block_copy.transfer(
            source, target_fd, blocks, hashes, room=room, threads=self.threads, memory=self.memory
        )


def _part(stored: NDArray[Any], patch: Patch) -> NDArray[Any]:
    """What of some rows is the patch's."""
    return stored if patch.columns == EVERY_ROW else stored[:, patch.columns]


def _shape(move: Move, rows: slice) -> tuple[int, ...]:
    return (rows.stop - rows.start, *move.old.shape[1:]) if move.old.shape else ()


def _two(spare: Bytes, shape: tuple[int, ...], wide: np.dtype[Any]) -> tuple[NDArray[np.float32], NDArray[Any]]:
    """Room for a change and a sum of this shape."""
    half, count = spare.size // 2, math.prod(shape)
    change = spare[: 4 * count].view(np.float32).reshape(shape)
    return change, spare[half : half + wide.itemsize * count].view(wide).reshape(shape)


def refuse_overflow(place: Entry, before: NDArray[Any], after: NDArray[Any]) -> None:
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
