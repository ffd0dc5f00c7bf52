"""Quantised weights that change: W' = Q(D(W) + ΔW), in the scheme that they have.

D is what the graph's own node computes, in fp32. Q takes new scales, and zero points where the scheme has such, from
the new weights (see `schemes`). Scales are rounded to their own type before the integers are made, which so belong to
what is stored.

A weight is up to three tensors, in places of their own in files of their own. Each is made in a pass over the
weight's rows, which are read, changed and quantised again for it: slower than once, and never more than some rows
stand in memory, of the scales neither.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export import sums
from lora_export.errors import InputRefused
from lora_export.graph.fold import Landing, alone, refuse_overflow
from lora_export.graph.quantised import layouts
from lora_export.graph.quantised.layouts import Dequantised, NBits, Quantised
from lora_export.graph.quantised.schemes import Groups, Numbers, Points, Reach, Rule, Scheme
from lora_export.graph.sites import Sites
from lora_export.lora import EVERY_ROW
from lora_export.plan import Plan
from lora_export.storage import block_copy
from lora_export.storage.block_copy import Block, Bytes
from lora_export.weights.apply_step import squared_column_norms
from lora_export.weights.merge_report import Statistics
from lora_export.weights.tensor_blocks import Patch, blocks_to_measure

INTEGERS = frozenset({"INT2", "UINT2", "INT4", "UINT4", "INT8", "UINT8", "INT16", "UINT16"})
MIRRORED_WITHOUT_LOWEST = 8  # bits from which a symmetric scheme of signed integers leaves out the lowest one


class Part(StrEnum):
    """What a quantised weight is made of."""

    LEVELS = "levels"  # the integers
    SCALES = "scales"
    ZEROS = "zeros"  # the zero points


class _Piece(NamedTuple):
    """What a step did to some of the rows at hand."""

    weight: str
    where: tuple[slice, ...]
    before: NDArray[Any]
    change: NDArray[np.float32]

    def statistics(self, merged: NDArray[np.float32] | None) -> Statistics:
        """What became of it; nothing is counted where nothing was measured."""
        statistics = Statistics(self.weight)
        if merged is not None:
            statistics.add_block(self.before, self.change, merged[self.where])
        return statistics


@dataclass(frozen=True, eq=False)
class Requantised:
    """A quantised weight and what is done to it. Holds the tensors that it was, whatever becomes of the graph's."""

    name: str
    shape: tuple[int, ...]  # as stored
    groups: Groups
    scheme: Scheme
    levels: Numbers
    scales: Numbers
    zeros: Numbers | None
    patches: tuple[Patch, ...]
    lengths: list[NDArray[np.float64] | None] = field(default_factory=list)  # of DoRA's outputs, where they run down
    recent: dict[int, Points] = field(default_factory=dict)  # of bands that are too long to be looked at at once

    @property
    def parts(self) -> tuple[Part, ...]:
        """The tensors that change: where zero stays where it is, its points are left alone."""
        return tuple(Part) if self.scheme.rule is Rule.SHIFTED else (Part.LEVELS, Part.SCALES)

    def numbers(self, part: Part) -> Numbers:
        found = {Part.LEVELS: self.levels, Part.SCALES: self.scales, Part.ZEROS: self.zeros}[part]
        assert found is not None
        return found

    def blocks(self, part: Part, start: int, place: int) -> Iterator[Block]:
        """Carry one of the tensors over, from a position in the source to one in the target. Made of levels, blocks
        return Tallies."""
        numbers, cuts = self.numbers(part), list(self._cuts(part))
        step = self.patches[0].step if len(self.patches) == 1 else None
        for rows, measured in zip(cuts, blocks_to_measure(step, cuts), strict=True):
            points = self._of_long_bands(rows) if self._is_long else None
            first, last = numbers.extent(rows if part is Part.LEVELS else self.groups.bands(rows))
            work = functools.partial(self._make, part, rows, points, measured)
            yield Block(start + first, start + last, place + first, place + last, work=work)

    def room(self, part: Part) -> int:
        """Bytes of the largest block."""
        numbers = self.numbers(part)
        ends = (numbers.extent(rows if part is Part.LEVELS else self.groups.bands(rows)) for rows in self._cuts(part))
        return max(last - first for first, last in ends)

    def made(self, part: Part) -> tuple[ir.TensorProtocol, list[Statistics]]:
        """One of the tensors, changed in memory."""
        numbers = self.numbers(part)
        after, nothing = np.empty(numbers.nbytes, np.uint8), np.empty(0, np.uint8)
        tallies: list[Statistics] = []
        for block in self.blocks(part, 0, 0):
            assert block.work is not None
            found = block.work(numbers.inside[block.start : block.stop], after[block.place : block.end], nothing)
            tallies += found
        old = numbers.tensor
        proto = onnx.TensorProto(
            name=old.name or "", data_type=int(old.dtype), dims=old.shape.numpy(), raw_data=after.tobytes()
        )
        return ir.serde.TensorProtoTensor(proto), tallies

    # --- rows at a time ---

    @property
    def _row_bytes(self) -> int:
        return 4 * math.prod(self.shape[1:])

    @property
    def _is_long(self) -> bool:
        """Whether a band must be read once more, before its first row is changed."""
        return self.groups.band * self._row_bytes > block_copy.BLOCK

    def _cuts(self, part: Part) -> Iterator[slice]:
        """The weight's rows in pieces, each of them whole bytes of the part."""
        unit = math.lcm(self.levels.unit, self.zeros.unit if self.zeros is not None else 1)
        if self._is_long and part is not Part.LEVELS:
            count = unit * self.groups.band
        else:
            unit = unit if self._is_long else math.lcm(unit, self.groups.band)
            count = max(block_copy.BLOCK // self._row_bytes // unit, 1) * unit
        for first in range(0, self.shape[0], count):
            yield slice(first, min(first + count, self.shape[0]))

    def _make(
        self, part: Part, rows: slice, points: Points | None, measured: bool, source: Bytes, target: Bytes, _: Bytes
    ) -> list[Statistics]:
        if points is not None and part is not Part.LEVELS:
            target[:] = self._stored(part, points, rows, source)
            return []
        held = self.levels.unpacked(source, rows) if part is Part.LEVELS else self.levels.read(rows)
        old = self._points(rows)
        weight = self._dequantised(held, old, rows)
        total, pieces = self._summed(weight, rows)
        new = points if points is not None else self._renewed(old, self._reach(total, rows), rows)
        if part is not Part.LEVELS:
            target[:] = self._stored(part, new, rows, source)
            return []
        scales, zeros = self._spread(new, rows)
        levels = self.scheme.levels(total, scales, zeros)
        after = held.copy()  # what fills up a row's last block stays
        width, flat = math.prod(self.shape[1:]), levels.reshape(len(levels), -1)
        touched = self._touched(rows)
        if touched is None:
            np.copyto(after[:, :width], flat, casting="unsafe")
        else:
            there = np.broadcast_to(self.groups.spread(touched, rows), levels.shape).reshape(flat.shape)
            np.copyto(after[:, :width], flat, where=there, casting="unsafe")
        target[:] = self.levels.packed(after, source)
        merged = (levels - zeros) * scales if measured else None
        return [piece.statistics(merged) for piece in pieces]

    def _stored(self, part: Part, points: Points, rows: slice, before: Bytes) -> Bytes:
        numbers, bands = self.numbers(part), self.groups.bands(rows)
        shape = bands.stop - bands.start, self.groups.width
        return numbers.packed(np.broadcast_to(points.scales if part is Part.SCALES else points.zeros, shape), before)

    def _points(self, rows: slice) -> Points:
        """The old ones of the bands that these rows lie in."""
        bands = self.groups.bands(rows)
        zeros = np.array(self.scheme.middle, np.float32)
        if self.scheme.rule is Rule.SHIFTED and self.zeros is not None:
            zeros = self.zeros.read(bands).astype(np.float32)
        return Points(self.scales.read(bands).astype(np.float32), zeros)

    def _spread(self, points: Points, rows: slice) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        zeros = self.groups.spread(points.zeros, rows) if points.zeros.ndim else points.zeros
        return self.groups.spread(points.scales, rows), zeros

    def _dequantised(self, held: NDArray[Any], points: Points, rows: slice) -> NDArray[np.float32]:
        weight = held[:, : math.prod(self.shape[1:])].astype(np.float32).reshape(-1, *self.shape[1:])
        scales, zeros = self._spread(points, rows)
        weight -= zeros
        weight *= scales
        return weight

    def _weight(self, rows: slice) -> NDArray[np.float32]:
        return self._dequantised(self.levels.read(rows), self._points(rows), rows)

    def _summed(self, weight: NDArray[np.float32], rows: slice) -> tuple[NDArray[np.float32], list[_Piece]]:
        """W + ΔW, as each step says, and what it was made of."""
        total, pieces = weight.copy(), []
        with np.errstate(over="ignore", invalid="ignore"):  # looked for below
            for patch, lengths in zip(self.patches, self.lengths, strict=True):
                first, last = max(rows.start, patch.rows.start), min(rows.stop, patch.rows.stop)
                if first >= last:
                    continue
                where = (slice(first - rows.start, last - rows.start), patch.columns)[: weight.ndim]
                own = slice(first - patch.rows.start, last - patch.rows.start)
                pieces.append(_sum_into(total[where], weight[where], patch, own, lengths, where))
        refuse_overflow(self.name, total, before=weight)
        return total, pieces

    def _reach(self, total: NDArray[np.float32], rows: slice) -> Reach:
        low = self.groups.reduced(np.minimum, total, rows)
        high = self.groups.reduced(np.maximum, total, rows)
        return Reach(np.minimum(low, 0), np.maximum(high, 0))

    def _renewed(self, old: Points, reach: Reach, rows: slice) -> Points:
        """The new points, and the old ones of groups in which nothing is to change."""
        new, touched = self.scheme.points(reach), self._touched(rows)
        refuse_overflow(self.name, new.scales.astype(self.scheme.scale_dtype))
        if touched is None:
            return new
        zeros = np.where(touched, new.zeros, old.zeros) if new.zeros.ndim else new.zeros
        return Points(np.where(touched, new.scales, old.scales), zeros)

    def _touched(self, rows: slice) -> NDArray[np.bool_] | None:
        """Which groups of the rows' bands a step changes; None where that is all."""
        if _cover(self.patches, self.shape):
            return None
        band, bands = self.groups.band, self.groups.bands(rows)
        picked = range(bands.start * band, bands.stop * band, band)  # a row of each: no patch tears a band
        marked = np.zeros((len(picked), *self.shape[1:]), np.bool_)
        for patch in self.patches:
            here = [number for number, row in enumerate(picked) if patch.rows.start <= row < patch.rows.stop]
            marked[(here, patch.columns)[: marked.ndim]] = True
        if self.groups.axis == 0 and self.groups.size:
            return marked.reshape(len(marked), -1)
        found: NDArray[np.bool_] = self.groups.reduced(np.logical_or, marked, slice(0, len(marked)))
        return found

    # --- before the first row ---

    def _of_long_bands(self, rows: slice) -> Points:
        """The new points of bands that these rows lie in, of which each is read whole, piece by piece."""
        bands = self.groups.bands(rows)
        numbers = range(bands.start, bands.stop)
        for band in [band for band in self.recent if band not in numbers]:
            del self.recent[band]
        for band in numbers:
            if band not in self.recent:
                self.recent[band] = self._of_long_band(band)
        zeros = [self.recent[band].zeros for band in numbers]
        scales = np.concatenate([self.recent[band].scales for band in numbers])
        return Points(scales, np.concatenate(zeros) if zeros[0].ndim else zeros[0])

    def _of_long_band(self, band: int) -> Points:
        every = slice(band * self.groups.band, min((band + 1) * self.groups.band, self.shape[0]))
        count = max(1, block_copy.BLOCK // self._row_bytes)
        pieces = [slice(first, min(first + count, every.stop)) for first in range(every.start, every.stop, count)]

        def of(rows: slice) -> Reach:
            return self._reach(self._summed(self._weight(rows), rows)[0], rows)

        low = high = np.zeros(1, np.float32)
        threads = block_copy.default_threads()
        with ThreadPoolExecutor(threads) as pool:
            for first in range(0, len(pieces), threads):  # all at once, what they found would be as large as the band
                for found in pool.map(of, pieces[first : first + threads]):
                    low, high = np.minimum(low, found.low), np.maximum(high, found.high)
        reach = Reach(low, high)
        return self._renewed(self._points(every), reach, every)

    def _column_norms(self, patch: Patch) -> NDArray[np.float64] | None:
        """See `apply_step.squared_column_norms`."""
        first, count = patch.rows.start, max(1, block_copy.BLOCK // self._row_bytes)
        ends = [*range(0, patch.rows.stop - first, count), patch.rows.stop - first]

        def read(own: slice) -> NDArray[np.float32]:
            return self._weight(slice(own.start + first, own.stop + first))[:, patch.columns]

        return squared_column_norms(patch.step, [slice(*pair) for pair in itertools.pairwise(ends)], read)


def _sum_into(
    total: NDArray[np.float32],
    weight: NDArray[np.float32],
    patch: Patch,
    rows: slice,
    lengths: NDArray[np.float64] | None,
    where: tuple[slice, ...],
) -> _Piece:
    """Carry out a step on its own part of some rows."""
    step = patch.step
    start = sums.starting_rows(step, rows, weight)
    if step.is_replacement:
        np.copyto(total, start, casting="unsafe")
        return _Piece(step.weight, where, weight, total - weight)
    change = sums.sum_rows(step, rows, start, total, column_norms=lengths)
    return _Piece(step.weight, where, start, change)


def notes_on(plan: Plan, model: ir.Model, sites: Sites) -> Iterator[str]:
    """What the user should know of a merge into quantised weights."""
    found = (site.quantised for step in plan.steps for site in sites.by_name[step.weight][:1])
    kinds = Counter(held.kind for held in found if held is not None)
    if not kinds:
        yield "--requantize has nothing to do: no weight that changes is quantised"
    for kind, count in kinds.items():
        yield f"{count} weights are quantised again: {kind}"
    nodes = [node for node in ir.traversal.RecursiveGraphIterator(model.graph) if node.op_type == "QuantizeLinear"]
    computed = sum(node.inputs[0] is not None and layouts.tensor_at(node, 0) is None for node in nodes if node.inputs)
    if kinds and computed:
        yield f"{computed} activations are quantised too, in ranges that were measured without the adapter"


def is_quantised(value: ir.Value) -> bool:
    """Whether a value is the integers of a weight."""
    return any(map(_held, *zip(*value.uses(), strict=True))) if value.uses() else False


def _held(node: ir.Node, index: int) -> Quantised | None:
    return layouts.of_node(node, index) or layouts.behind(node, index)


def take_over(
    model: ir.Model, value: ir.Value, landings: Sequence[Landing]
) -> tuple[Requantised, dict[Part, ir.Value]]:
    """A weight whose integers are `value`, which `fold.land` has made its own, and the values that will change.

    Scales and zero points that others read too are given to it anew; no data is copied. Raises InputRefused as
    `requantised` does, and where the same integers are read with several scales.
    """
    readers = list(value.uses())
    first = _held(*readers[0])
    assert first is not None
    places = dict(zip(Part, (0, 1, 2) if isinstance(first, Dequantised) else (1, 2, 3), strict=True))
    name = value.name or "" if landings[0].is_block else landings[0].step.weight
    told = {
        (type(_held(*reader)), *reader[0].inputs[places[Part.SCALES] : places[Part.ZEROS] + 1]) for reader in readers
    }
    if len(told) > 1:
        raise InputRefused(f"{name}: its integers are read with several scales: they cannot be quantised again for one")
    made = requantised(first, [_patch(landing, first.shape[0]) for landing in landings], name)
    owned = {Part.LEVELS: value}
    for part in made.parts[1:]:
        at = places[part]
        there = readers[0][0].inputs[at]
        assert there is not None
        owned[part] = alone(model, there, [(node, at) for node, _ in readers], f"{value.name}_{part}")
    return made, owned


def _patch(landing: Landing, rows: int) -> Patch:
    mine, *columns = landing.where
    first, last, _ = mine.indices(rows)
    return Patch(landing.step, slice(first, last), columns[0] if columns else EVERY_ROW)


def requantised(held: Quantised, patches: Sequence[Patch], name: str) -> Requantised:
    """A weight and what is to be done to it. Reads its scales and zero points, which tell the scheme, in pieces.

    Raises InputRefused for a scheme that has no rule here, and where a patch shares a scale with its neighbours.
    """
    if isinstance(held, NBits):
        made = _of_nbits(held, name)
    else:
        assert isinstance(held, Dequantised)
        made = _of_dequantised(held, name)
    if not _cover(patches, made.shape):
        for patch in patches:
            if made.groups.tears(patch):
                raise InputRefused(
                    f"{patch.step.weight} shares a scale with its neighbours in {name}: it cannot be quantised alone"
                )
    made = replace(made, patches=tuple(patches))
    made.lengths.extend(made._column_norms(patch) for patch in patches)
    return made


def refuse_unknown_scheme(held: Quantised, name: str) -> None:
    """Raise InputRefused for integers that no rule here makes. Reads nothing."""
    levels = layouts.tensor_at(held.node, 0 if isinstance(held, Dequantised) else 1)
    assert levels is not None
    if levels.dtype.name not in INTEGERS or 0 in held.shape or not held.shape:
        raise InputRefused(f"{name} is quantised in a way that is not done again here ({held.kind})")


def _of_nbits(held: NBits, name: str) -> Requantised:
    inner = held.shape[1]
    blocks = -(-inner // held.size)
    levels, scales, zeros = (layouts.tensor_at(held.node, at) for at in (1, 2, 3))
    assert levels is not None and scales is not None
    wide, packed = 8 * scales.dtype.numpy().itemsize, np.dtype(np.uint8)
    stored = Numbers(scales, scales.dtype.numpy(), wide, blocks, wide * blocks)
    if zeros is None:
        points = None
    elif zeros.dtype == ir.DataType.UINT8:
        points = Numbers(zeros, packed, held.bits, blocks, 8 * -(-blocks * held.bits // 8))
    else:
        points = replace(stored, tensor=zeros, dtype=zeros.dtype.numpy())
    scheme = Scheme(
        lowest=0,
        highest=(1 << held.bits) - 1,
        middle=1 << (held.bits - 1),
        rule=Rule.MIRRORED,
        scale_dtype=stored.dtype,
        zero_dtype=None if points is None else points.dtype,
        of_nothing=0,
    )
    width = blocks * held.size
    made = Requantised(
        name,
        held.shape,
        Groups(held.shape, 1, held.size),
        scheme,
        Numbers(levels, packed, held.bits, width, width * held.bits),
        stored,
        points,
        (),
    )
    return _with_rule(made)


def _of_dequantised(held: Dequantised, name: str) -> Requantised:
    refuse_unknown_scheme(held, name)
    levels, scales, zeros = (layouts.tensor_at(held.node, at) for at in (0, 1, 2))
    assert levels is not None and scales is not None
    bits, is_signed = levels.dtype.bitwidth, levels.dtype.name.startswith("INT")
    groups = Groups(held.shape, None if scales.size == 1 else held.axis, held.size)
    kind = np.dtype(f"{'i' if is_signed else 'u'}{max(bits // 8, 1)}")
    width, wide = math.prod(held.shape[1:]), 8 * scales.dtype.numpy().itemsize
    made = Requantised(
        name,
        held.shape,
        groups,
        Scheme(
            lowest=-(1 << (bits - 1)) if is_signed else 0,
            highest=(1 << (bits - is_signed)) - 1,
            middle=0 if is_signed else 1 << (bits - 1),
            rule=Rule.MIRRORED,
            scale_dtype=scales.dtype.numpy(),
            zero_dtype=None if zeros is None else kind,
            of_nothing=1,
        ),
        Numbers(levels, kind, bits, width, width * bits),
        Numbers(scales, scales.dtype.numpy(), wide, groups.width, wide * groups.width),
        None if zeros is None else Numbers(zeros, kind, bits, groups.width, bits * groups.width),
        (),
    )
    if zeros is None and not is_signed:
        raise InputRefused(f"{name} is quantised without zero points ({held.kind}): nothing below zero can be stored")
    return _with_rule(made)


def _with_rule(made: Requantised) -> Requantised:
    """The weight with the rule by which its scales, as they are, seem to have been made."""
    scheme = made.scheme
    if made.zeros is not None and not _all(made, made.zeros, scheme.middle):
        return replace(made, scheme=replace(scheme, rule=Rule.SHIFTED))
    if not _all(made, made.scales, None):
        return replace(made, scheme=replace(scheme, rule=Rule.SIGNED, of_nothing=0))
    if scheme.lowest < 0 and made.levels.bits >= MIRRORED_WITHOUT_LOWEST:
        scheme = replace(scheme, lowest=-scheme.highest)
    return replace(made, scheme=scheme)


def _all(made: Requantised, numbers: Numbers, equal: int | None) -> bool:
    """Whether all numbers are this one, or, without one, not negative. Read in pieces, up to the first that is not."""
    bands = -(-made.shape[0] // made.groups.band)
    count = max(1, block_copy.BLOCK // max(numbers.row_bits // 8, 1))
    for first in range(0, bands, count):
        found = numbers.read(slice(first, min(first + count, bands))).astype(np.float32)
        if not np.all(found == equal if equal is not None else found >= 0):
            return False
    return True


def _cover(patches: Sequence[Patch], shape: Sequence[int]) -> bool:
    """Whether every entry is in one of the patches, which do not overlap."""
    entries = 0
    for patch in patches:
        first, last, _ = patch.columns.indices(shape[1] if len(shape) > 1 else 1)
        entries += (patch.rows.stop - patch.rows.start) * (last - first)
    return entries == shape[0] * (shape[1] if len(shape) > 1 else 1)
