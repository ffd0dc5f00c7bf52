"""A weight that a candidate stores in the quantised scheme of its base, judged by its numbers.

    scales     Scales, zero points and all other parts have the bytes of the base.
    finer      In 8 bits a step is exactly 2^(bits - 8) of the base's, and a zero point 2^(8 - bits) times the base's.
    rescaled   Where the record has new scales, each is what the rule of the scheme makes of V (`kept_weights`),
               within the rounding of its dtype and the error of a sum in fp32; one without a change stays.
    changed    M is the nearest to V = W + Σ s·BA among the values that the scale allows: |M - V| <= half the distance
               from M to its neighbour on the side of V + the error bound of a sum in fp32. W, V and M are computed
               here in fp64 from the stored numbers. Beyond the last value there is no neighbour.
    the rest   Numbers outside of the parts that change have the value of the base, and with it the bits where the
               scales are the same; padding has the bits of the base, or is zero.

Nothing of a merge is used but how numbers are unpacked, and where in the file the rows of a weight are.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.plan import Layout, Step
from lora_export.storage.block_copy import Bytes
from lora_export.storage.file_pieces import read_piece
from lora_export.storage.safetensors_file import TensorFile
from lora_export.verification.against_checkpoint.changed_weight import CalibratedLayer, ChangedWeight, WeightRows
from lora_export.verification.against_checkpoint.fp64_sums import Fp64Sum
from lora_export.verification.against_checkpoint.judge_changed import judge_unknown_layout, judge_weight
from lora_export.verification.against_checkpoint.result import AuditedWeight, Fate
from lora_export.verification.against_checkpoint.stored_tensor import have_equal_bytes
from lora_export.verification.parity import Outcome, Wide
from lora_export.weights.checkpoint import Checkpoint
from lora_export.weights.kept_weights import NeededScales, patch_in_file
from lora_export.weights.quantised.codes import Grid, Numbers, StoredCodes, read_numbers
from lora_export.weights.quantised.new_grid import NewGrid, OldAndNew
from lora_export.weights.quantised.stored_parts import QuantisedTensor
from lora_export.weights.tensor_blocks import Patch

NUMBERS_AT_ONCE = 1 << 17
OF_SCALE = 1e-5  # of a scale: the error of sums in fp32, relative to the largest number


@dataclass(frozen=True, eq=False)
class KeptWeight:
    """A quantised weight in its file."""

    shards: Collection[TensorFile]
    tensor: QuantisedTensor

    @classmethod
    def of(cls, checkpoint: Checkpoint, name: str) -> KeptWeight:
        return cls(checkpoint.shards.values(), checkpoint.quantised[name])

    def file_of(self, stored: str) -> TensorFile:
        """The file that has a stored tensor."""
        return next(shard for shard in self.shards if stored in shard.entries)

    @property
    def codes(self) -> StoredCodes:
        assert self.tensor.codes is not None
        return self.tensor.codes

    @functools.cached_property
    def grid(self) -> Grid:
        return self.codes.load()

    def numbers(self, rows: slice) -> Numbers:
        """Some rows in the order of the file, as codes."""
        file = self.file_of(self.tensor.packed)
        with file.path.open("rb") as reader:
            start = file.entries[self.tensor.packed].start
            return read_numbers(self.codes, file.path, reader.fileno(), start, rows)

    def packed(self, rows: slice) -> Bytes:
        """The bytes that have some rows, from a multiple of the rows that are packed together on."""
        file = self.file_of(self.tensor.packed)
        first, last = self.codes.layout.extent(rows)
        found = np.empty(last - first, np.uint8)
        read_piece(file.path, found, file.entries[self.tensor.packed].start + first)
        return found

    def pieces(self, rows: slice) -> list[slice]:
        """Rows in pieces that fit into a core's cache."""
        least = self.codes.layout.rows_together
        count = max(1, NUMBERS_AT_ONCE // self.codes.shape[1] // least) * least
        cuts = [rows.start, *range(rows.start // count * count + count, rows.stop, count), rows.stop]
        return [slice(first, last) for first, last in itertools.pairwise(cuts)]

    def other_part(self, base: KeptWeight, remade: Container[str] = ()) -> str:
        """The part of the description of the numbers that is not the base's; empty where all of it is.

        Not compared are those of the base that are `remade`.
        """
        pairs = zip(self.tensor.parts, base.tensor.parts, strict=True)
        files = (((self.file_of(own), own), (base.file_of(old), old)) for own, old in pairs if old not in remade)
        return next((own[1] for own, old in files if not _are_equal_bytes(own, old)), "")

    def half_steps(self, rows: slice) -> Wide:
        """Half the larger distance from each number of some rows to its neighbours, and what fp32 may add to it."""
        of_codes = np.maximum(*half_distances(self.codes.values.astype(np.float64)))[self.numbers(rows)]
        found: Wide = of_codes * np.abs(self.grid(rows)[0].astype(np.float64)) * (1 + OF_SCALE)
        return found

    def values(self, rows: slice) -> Wide:
        """Some rows in fp64."""
        (scales, zeros), numbers = self.grid(rows), self.codes.values.astype(np.float64)[self.numbers(rows)]
        found: Wide = (numbers - (0.0 if zeros is None else zeros.astype(np.float64))) * scales.astype(np.float64)
        return found


def _are_equal_bytes(one: tuple[TensorFile, str], other: tuple[TensorFile, str]) -> bool:
    """Whether two stored tensors have the same type, shape and bytes."""
    first, second = (file.entries[name] for file, name in (one, other))
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return have_equal_bytes(one[0].path, first.start, other[0].path, second.start, first.nbytes)


Judge = Callable[[], AuditedWeight | None]


def judges_of_kept(
    name: str,
    steps: Sequence[Step],
    base: KeptWeight,
    candidate: KeptWeight,
    grid: NewGrid | None = None,
    calibrated: CalibratedLayer | None = None,
) -> list[Judge]:
    """What judges a weight: a function for each step on it or on a part of it, and one for all else of it.

    `grid` is what it should be stored on, where that is another than the base's.
    """
    mine, its = ((each.tensor.scheme, each.tensor.shape, len(each.tensor.parts)) for each in (candidate, base))
    fate = Fate.CHANGED if steps else Fate.KEPT
    if mine != (its if grid is None else (grid.scheme, *its[1:])):
        why = f"is stored as {mine[0]} {list(mine[1])}, and the base's is {its[0]} {list(its[1])}"
        return [lambda: AuditedWeight(name, fate, Outcome.DIFFERENT, why)]

    def of_step(step: Step) -> AuditedWeight:
        own = name if step.spec.region is None else step.weight

        def judge(one: Step) -> AuditedWeight:
            patch = patch_in_file(base.tensor, one)
            return judge_weight(own, ChangedNumbers.of(patch, base, candidate, calibrated))

        return judge_unknown_layout(step, judge) if step.spec.layout is Layout.UNKNOWN else judge(step)

    def of_rest() -> AuditedWeight | None:
        other = candidate.other_part(base, () if grid is None else grid.parts)
        if grid is not None and not other:
            patches = [patch_in_file(base.tensor, step) for step in steps]
            is_right = _are_by_rule(patches, base, candidate) if grid.is_rescaled else _is_finer(base, candidate)
            other = "" if is_right else "one of its scales or zero points"
        off, elements = (_other_numbers if grid is None else _other_values)(
            [patch_in_file(base.tensor, step) for step in steps], base, candidate
        )
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
        is_outside = _outside(patches, piece, columns)
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


def _is_finer(base: KeptWeight, candidate: KeptWeight) -> bool:
    """Whether each step is exactly a power of two of the base's, and each zero point has the same value."""
    factor = len(candidate.codes.values) / len(base.codes.values)
    for piece in base.pieces(slice(0, base.codes.shape[0])):
        (own, points), (old, old_points) = candidate.grid(piece), base.grid(piece)
        if not np.array_equal(own * np.float32(factor), old) or (points is None) != (old_points is None):
            return False
        if points is not None and old_points is not None and not np.array_equal(points, old_points * factor):
            return False
    return True


def _are_by_rule(patches: Sequence[Patch], base: KeptWeight, candidate: KeptWeight) -> bool:
    """Whether each scale is what the rule of the scheme makes of W + Σ s·BA in fp64; the base's without a change."""
    scaling, its = base.tensor.scaling, candidate.tensor.scaling
    assert scaling is not None and its is not None
    old, new = scaling.read(), its.read()
    if (old.shape, old.dtype) != (new.shape, new.dtype):
        return False
    weights = [ChangedNumbers.of(patch, base, candidate) for patch in patches]
    exact = [weight.with_norms(Fp64Sum.right(weight.step)) for weight in weights]
    needed = NeededScales(base.codes, scaling, old.size)
    for piece in base.pieces(slice(0, base.codes.shape[0])):
        before = base.values(piece)
        after = before.copy()
        for patch, one in zip(patches, exact, strict=True):
            own = patch.within(piece)
            if own is not None:
                first = patch.rows.start - piece.start
                here = slice(own.start + first, own.stop + first), patch.columns
                after[here] = one.rows(own, patch.shaped(before[here]))[0].reshape(after[here].shape)
        needed.add(piece, before, after, base.grid(piece)[1])
    factors = needed.factors.astype(np.float32).reshape(old.shape)
    change = needed.change.reshape(old.shape)
    low, high, may_move = scaling.between(factors, change > 0, OldAndNew(old, new), OF_SCALE)
    found, kept = scaling.decode(new), np.equal(new.view(np.uint8), old.view(np.uint8)).reshape(*old.shape, -1).all(-1)
    is_none = change <= OF_SCALE * factors  # at most: lost in fp32, or in a scale that is too small to be stored
    is_rule = may_move & (np.fmin(low, high) <= found) & (found <= np.fmax(low, high))
    return bool((is_rule | (kept & (is_none | ~(np.fmin(low, high) > 0)))).all())


def _other_values(patches: Sequence[Patch], base: KeptWeight, candidate: KeptWeight) -> tuple[int, int]:
    """As `_other_numbers`, of values on different grids. On new scales they are the nearest."""
    off = elements = 0
    are_new = len(candidate.codes.values) == len(base.codes.values)
    for piece in base.pieces(slice(0, base.codes.shape[0])):
        is_outside = _outside(patches, piece, base.codes.shape[1])
        elements += int(np.count_nonzero(is_outside))
        distance = np.abs(candidate.values(piece) - base.values(piece))
        is_new = (candidate.grid(piece)[0] != base.grid(piece)[0]) & are_new
        allowed = np.where(is_new, candidate.half_steps(piece), 0.0)
        off += int(np.count_nonzero(~(distance <= allowed) & is_outside))
    return off, elements


def _outside(patches: Sequence[Patch], piece: slice, columns: int) -> NDArray[np.bool_]:
    """Which numbers of some rows are in no patch."""
    is_outside = np.ones((piece.stop - piece.start, columns), bool)
    for patch in patches:
        inside = patch.within(piece)
        if inside is not None:
            first = patch.rows.start - piece.start
            is_outside[inside.start + first : inside.stop + first, patch.columns] = False
    return is_outside


@dataclass(frozen=True, eq=False)
class _Values:
    """The values of a patch in fp64, of the base or of the candidate."""

    patch: Patch
    weight: KeptWeight
    dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype(np.float64))

    def _in_tensor(self, rows: slice) -> slice:
        return slice(rows.start + self.patch.rows.start, rows.stop + self.patch.rows.start)

    def numbers(self, rows: slice) -> Numbers:
        return self.weight.numbers(self._in_tensor(rows))[:, self.patch.columns]

    def scales(self, rows: slice) -> tuple[Wide, Wide | float]:
        """The scales and zero points of these rows, of each entry."""
        scales, zeros = self.weight.grid(self._in_tensor(rows))
        shape = (rows.stop - rows.start, self.weight.codes.shape[1])
        wide = np.broadcast_to(scales, shape)[:, self.patch.columns].astype(np.float64)
        if zeros is None:
            return wide, 0.0
        return wide, np.broadcast_to(zeros, shape)[:, self.patch.columns].astype(np.float64)

    def rows(self, rows: slice, _scratch: Any = None, _name: str = "") -> Wide:
        scales, zeros = self.scales(rows)
        found: Wide = (self.weight.codes.values.astype(np.float64)[self.numbers(rows)] - zeros) * scales
        return self.patch.shaped(found)


class ChangedNumbers(ChangedWeight):
    """A patch of a quantised weight, before and after."""

    @classmethod
    def of(
        cls, patch: Patch, base: KeptWeight, candidate: KeptWeight, calibrated: CalibratedLayer | None = None
    ) -> ChangedNumbers:
        rows = slice(0, patch.rows.stop - patch.rows.start)
        before, after = (_Values(patch, each) for each in (base, candidate))
        return cls(patch.step, before, after, base.pieces(rows), calibrated)

    @property
    def stored_as(self) -> str:
        assert isinstance(self.candidate, _Values)
        return self.candidate.weight.tensor.scheme

    def blocks(self) -> Iterator[WeightRows]:
        """All rows, with half the distances from each value to its neighbours."""
        assert isinstance(self.base, _Values) and isinstance(self.candidate, _Values)
        values = self.candidate.weight.codes.values.astype(np.float64)
        below, above = half_distances(values)
        for rows in self.pieces:
            new = self.candidate.numbers(rows).astype(np.intp)
            scales, zeros = self.candidate.scales(rows)
            before, after = self.base.rows(rows), (values.take(new) - zeros) * scales
            before = before.reshape(after.shape)
            size, is_negative, gaps = np.abs(scales), scales < 0, (below.take(new), above.take(new))
            if is_negative.any():
                gaps = np.where(is_negative, gaps[1], gaps[0]), np.where(is_negative, gaps[0], gaps[1])
            # Another number of the same value, and any other number where the scale is zero, is no change of the sum.
            is_wrong = (after == before) & (scales == self.base.scales(rows)[0]) & (self.base.numbers(rows) != new)
            for gap in gaps:
                np.multiply(gap, np.where(size, size, np.inf), out=gap)
                gap[is_wrong] = np.nan
            before, after, below_it, above_it = map(self.base.patch.shaped, (before, after, *gaps))
            yield WeightRows(rows, before, after, after, (below_it, above_it), self.calibrated is not None)


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
