"""A weight that a candidate stores in the quantised scheme of its base, judged by its numbers.

    scales     Scales, zero points and all other parts have the bytes of the base.
    changed    M is the nearest to V = W + Σ s·BA among the values that the scale allows: |M - V| <= half the distance
               from M to its neighbour on the side of V + the error bound of a sum in fp32. W, V and M are computed
               here in fp64 from the stored numbers. Beyond the last value there is no neighbour.
    the rest   Numbers outside of the parts that change, and padding, have the bits of the base.

Nothing of a merge is used but how numbers are unpacked, and where in the file the rows of a weight are.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lora_export.plan import Layout, Step
from lora_export.storage import block_copy
from lora_export.storage.block_copy import Bytes
from lora_export.storage.safetensors_file import TensorFile
from lora_export.verification.against_checkpoint.changed_weight import ChangedWeight, WeightRows
from lora_export.verification.against_checkpoint.judge_changed import judge_unknown_layout, judge_weight
from lora_export.verification.against_checkpoint.result import AuditedWeight, Fate
from lora_export.verification.parity import Outcome, Wide
from lora_export.weights.checkpoint import Checkpoint
from lora_export.weights.kept_weights import patch_in_file
from lora_export.weights.quantised.codes import Grid, Numbers, StoredCodes, read_numbers
from lora_export.weights.quantised.stored_parts import QuantisedTensor
from lora_export.weights.tensor_blocks import Patch

NUMBERS_AT_ONCE = 1 << 17


@dataclass(frozen=True, eq=False)
class KeptWeight:
    """A quantised weight in its file."""

    files: dict[str, TensorFile]  # stored tensor -> its file
    tensor: QuantisedTensor

    @classmethod
    def of(cls, checkpoint: Checkpoint, name: str) -> KeptWeight:
        files = {stored: shard for shard in checkpoint.shards.values() for stored in shard.entries}
        return cls(files, checkpoint.quantised[name])

    @property
    def codes(self) -> StoredCodes:
        assert self.tensor.codes is not None
        return self.tensor.codes

    @functools.cached_property
    def grid(self) -> Grid:
        return self.codes.load()

    def numbers(self, rows: slice) -> Numbers:
        """Some rows in the order of the file, as codes."""
        file = self.files[self.tensor.packed]
        with file.path.open("rb") as reader:
            start = file.entries[self.tensor.packed].start
            return read_numbers(self.codes, file.path, reader.fileno(), start, rows)

    def packed(self, rows: slice) -> Bytes:
        """The bytes that have some rows, from a multiple of the rows that are packed together on."""
        file = self.files[self.tensor.packed]
        first, last = self.codes.layout.extent(rows)
        found = np.empty(last - first, np.uint8)
        with file.path.open("rb") as reader:
            block_copy.read(file.path, reader.fileno(), found, file.entries[self.tensor.packed].start + first)
        return found

    def pieces(self, rows: slice) -> list[slice]:
        """Rows in pieces that fit into a core's cache."""
        least = self.codes.layout.rows_together
        count = max(1, NUMBERS_AT_ONCE // self.codes.shape[1] // least) * least
        cuts = [rows.start, *range(rows.start // count * count + count, rows.stop, count), rows.stop]
        return [slice(first, last) for first, last in itertools.pairwise(cuts)]

    def other_part(self, base: KeptWeight) -> str:
        """The part of the description of the numbers that is not the base's; empty where all of it is."""
        pairs = zip(self.tensor.parts, base.tensor.parts, strict=True)
        return next(
            (own for own, old in pairs if not _are_equal_bytes((self.files[own], own), (base.files[old], old))), ""
        )


def _are_equal_bytes(one: tuple[TensorFile, str], other: tuple[TensorFile, str]) -> bool:
    """Whether two stored tensors have the same type, shape and bytes."""
    first, second = (file.entries[name] for file, name in (one, other))
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with one[0].path.open("rb") as mine, other[0].path.open("rb") as its:
        for start in range(0, first.nbytes, block_copy.BLOCK):
            size = min(block_copy.BLOCK, first.nbytes - start)
            own, old = np.empty(size, np.uint8), np.empty(size, np.uint8)
            block_copy.read(one[0].path, mine.fileno(), own, first.start + start)
            block_copy.read(other[0].path, its.fileno(), old, second.start + start)
            if not np.array_equal(own, old):
                return False
    return True


Judge = Callable[[], AuditedWeight | None]


def judges_of_kept(name: str, steps: Sequence[Step], base: KeptWeight, candidate: KeptWeight) -> list[Judge]:
    """What judges a weight: a function for each step on it or on a part of it, and one for all else of it."""
    mine, its = ((each.tensor.scheme, each.tensor.shape, len(each.tensor.parts)) for each in (candidate, base))
    fate = Fate.CHANGED if steps else Fate.KEPT
    if mine != its:
        why = f"is stored as {mine[0]} {list(mine[1])}, and the base's is {its[0]} {list(its[1])}"
        return [lambda: AuditedWeight(name, fate, Outcome.DIFFERENT, why)]

    def of_step(step: Step) -> AuditedWeight:
        own = name if step.spec.region is None else step.weight

        def judge(one: Step) -> AuditedWeight:
            return judge_weight(own, ChangedNumbers.of(patch_in_file(base.tensor, one), base, candidate))

        return judge_unknown_layout(step, judge) if step.spec.layout is Layout.UNKNOWN else judge(step)

    def of_rest() -> AuditedWeight | None:
        other = candidate.other_part(base)
        off, elements = _other_numbers([patch_in_file(base.tensor, step) for step in steps], base, candidate)
        if not (off or other):
            return None if steps else AuditedWeight(name, fate, Outcome.SAME, elements=elements)
        why = f"{off:,} of {elements:,} numbers that should not change, or bytes beside them, are not the base's"
        why = f"{other} is not the base's" if other else why
        rest = f"{name} (other entries)" if steps else name
        return AuditedWeight(rest, Fate.KEPT, Outcome.DIFFERENT, why, elements, off)

    return [*(functools.partial(of_step, step) for step in steps), of_rest]


def _other_numbers(patches: Sequence[Patch], base: KeptWeight, candidate: KeptWeight) -> tuple[int, int]:
    """How many numbers outside of the patches, and bytes beside all numbers, are not the base's; and of how many."""
    layout, (rows, columns) = base.codes.layout, base.codes.shape
    off = elements = 0
    for piece in base.pieces(slice(0, rows)):
        own, old = candidate.packed(piece), base.packed(piece)
        is_outside = np.ones((piece.stop - piece.start, columns), bool)
        for patch in patches:
            inside = patch.within(piece)
            if inside is not None:
                first = patch.rows.start - piece.start
                is_outside[inside.start + first : inside.stop + first, patch.columns] = False
        elements += int(np.count_nonzero(is_outside))
        if np.array_equal(own, old):
            continue
        mine, its = layout.unpack(piece, own), layout.unpack(piece, old)
        off += int(np.count_nonzero((mine != its) & is_outside))
        nothing = np.zeros_like(its)
        layout.pack(nothing, own)
        layout.pack(nothing, old)
        off += int(np.count_nonzero(own != old))
    return off, elements


@dataclass(frozen=True, eq=False)
class _Values:
    """The values of a patch in fp64, of the base or of the candidate, on the scales of the base."""

    patch: Patch
    base: KeptWeight
    weight: KeptWeight
    dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype(np.float64))

    def _in_tensor(self, rows: slice) -> slice:
        return slice(rows.start + self.patch.rows.start, rows.stop + self.patch.rows.start)

    def numbers(self, rows: slice) -> Numbers:
        return self.weight.numbers(self._in_tensor(rows))[:, self.patch.columns]

    def scales(self, rows: slice) -> tuple[Wide, Wide | float]:
        """The scales and zero points of these rows, of each entry."""
        scales, zeros = self.base.grid(self._in_tensor(rows))
        shape = (rows.stop - rows.start, self.base.codes.shape[1])
        wide = np.broadcast_to(scales, shape)[:, self.patch.columns].astype(np.float64)
        if zeros is None:
            return wide, 0.0
        return wide, np.broadcast_to(zeros, shape)[:, self.patch.columns].astype(np.float64)

    def rows(self, rows: slice, _scratch: Any = None, _name: str = "") -> Wide:
        scales, zeros = self.scales(rows)
        found: Wide = (self.base.codes.values.astype(np.float64)[self.numbers(rows)] - zeros) * scales
        return self.patch.shaped(found)


class ChangedNumbers(ChangedWeight):
    """A patch of a quantised weight, before and after."""

    @classmethod
    def of(cls, patch: Patch, base: KeptWeight, candidate: KeptWeight) -> ChangedNumbers:
        rows = slice(0, patch.rows.stop - patch.rows.start)
        return cls(patch.step, _Values(patch, base, base), _Values(patch, base, candidate), base.pieces(rows))

    @property
    def stored_as(self) -> str:
        assert isinstance(self.candidate, _Values)
        return self.candidate.weight.tensor.scheme

    def blocks(self) -> Iterator[WeightRows]:
        """All rows, with half the distances from each value to its neighbours."""
        assert isinstance(self.base, _Values) and isinstance(self.candidate, _Values)
        values = self.base.base.codes.values.astype(np.float64)
        below, above = half_distances(values)
        for rows in self.pieces:
            old, new = (each.numbers(rows).astype(np.intp) for each in (self.base, self.candidate))
            scales, zeros = self.base.scales(rows)
            before, after = ((values.take(numbers) - zeros) * scales for numbers in (old, new))
            size, is_negative, gaps = np.abs(scales), scales < 0, (below.take(new), above.take(new))
            if is_negative.any():
                gaps = np.where(is_negative, gaps[1], gaps[0]), np.where(is_negative, gaps[0], gaps[1])
            # Another number of the same value, and any other number where the scale is zero, is no change of the sum.
            is_wrong = (new != old) & (after == before)
            for gap in gaps:
                np.multiply(gap, np.where(size, size, np.inf), out=gap)
                gap[is_wrong] = np.nan
            before, after, below_it, above_it = map(self.base.patch.shaped, (before, after, *gaps))
            yield WeightRows(rows, before, after, after, (below_it, above_it))


def half_distances(values: Wide) -> tuple[Wide, Wide]:
    """Of each code, half the distance from its value to the next smaller and the next larger one; infinite at an end.

    NaN where the code is no number.
    """
    ordered = np.unique(values[np.isfinite(values)])
    halves = np.concatenate([[np.inf], np.diff(ordered) / 2, [np.inf]])
    place = np.searchsorted(ordered, values)
    is_number = np.isfinite(values)
    below, above = (np.where(is_number, halves[np.minimum(place + more, len(ordered))], np.nan) for more in (0, 1))
    return below, above
