"""Quantising a changed weight again: W' = Q(D(W) + ΔW), in its own scheme.

D is what the graph's own node computes, in fp32. Q takes new scales, and zero points where the scheme has them, from
the new weights (see `scheme`). Scales are rounded to their stored dtype before the integers are computed, so that the
integers belong to the stored scales.

A weight consists of up to three tensors, each with a position of its own in a file of its own. Each tensor is made in a
separate pass over the weight's rows, which are read, changed and quantised again every time. This is slower than one
pass, but memory holds only some rows of the weight, and of the scales too.
"""

from __future__ import annotations

import functools
import itertools
import math
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
from lora_export.graph.quantised.scheme import Groups, PackedTensor, QuantParameters, Rule, Scheme, ValueRange
from lora_export.graph.refusals import refuse_not_finite
from lora_export.storage import block_copy
from lora_export.storage.block_copy import Block, Bytes
from lora_export.weights.apply_step import squared_column_norms
from lora_export.weights.merge_report import Statistics
from lora_export.weights.tensor_blocks import Patch, blocks_to_measure


class Component(StrEnum):
    """The tensors of a quantised weight."""

    LEVELS = "levels"  # the integers
    SCALES = "scales"
    ZEROS = "zeros"  # the zero points


class _AppliedPatch(NamedTuple):
    """What one step did to some rows of a weight."""

    weight: str
    slices: tuple[slice, ...]  # of the rows
    before: NDArray[Any]
    change: NDArray[np.float32]

    def statistics(self, merged: NDArray[np.float32] | None) -> Statistics:
        """Statistics of the change. Empty where `merged`, the quantised sum, was not measured."""
        statistics = Statistics(self.weight)
        if merged is not None:
            statistics.add_block(self.before, self.change, merged[self.slices])
        return statistics


@dataclass(frozen=True, eq=False)
class RequantisedWeight:
    """A quantised weight and the patches that are applied to it. Holds the old tensors, whatever the graph does."""

    name: str
    shape: tuple[int, ...]  # as stored
    groups: Groups
    scheme: Scheme
    levels: PackedTensor
    scales: PackedTensor
    zeros: PackedTensor | None
    patches: tuple[Patch, ...] = ()
    # For each patch, the squared norms of DoRA's outputs where these are columns of the stored weight; None elsewhere.
    column_norms: list[NDArray[np.float64] | None] = field(default_factory=list)
    # New parameters of recent bands that are too long for one block.
    cached_parameters: dict[int, QuantParameters] = field(default_factory=dict)

    def with_patches(self, patches: Sequence[Patch]) -> RequantisedWeight:
        """The weight with these patches. Raises InputRefused where a patch shares a scale with its neighbours."""
        if not _cover_all(patches, self.shape):
            for patch in patches:
                if self.groups.are_split_by(patch):
                    raise InputRefused(
                        f"{patch.step.weight} shares a scale with its neighbours in {self.name}: it cannot be "
                        "quantised again alone"
                    )
        patched = replace(self, patches=tuple(patches))
        patched.column_norms.extend(patched._column_norms(patch) for patch in patches)
        return patched

    @property
    def components(self) -> tuple[Component, ...]:
        """The tensors that change. Zero points change in an asymmetric scheme only."""
        return tuple(Component) if self.scheme.rule is Rule.ASYMMETRIC else (Component.LEVELS, Component.SCALES)

    def tensor(self, component: Component) -> PackedTensor:
        """The old tensor of a component."""
        tensors = {Component.LEVELS: self.levels, Component.SCALES: self.scales, Component.ZEROS: self.zeros}
        tensor = tensors[component]
        assert tensor is not None
        return tensor

    def blocks(self, component: Component, start: int, target_start: int) -> Iterator[Block]:
        """Blocks that carry one tensor from `start` in the source to `target_start` in the target, changed.

        The work of the blocks of levels returns Statistics.
        """
        tensor, pieces = self.tensor(component), list(self._row_pieces(component))
        step = self.patches[0].step if len(self.patches) == 1 else None
        for rows, measured in zip(pieces, blocks_to_measure(step, pieces), strict=True):
            parameters = self._parameters_of_long_bands(rows) if self._has_long_bands else None
            first, last = tensor.extent(self._rows_of(component, rows))
            work = functools.partial(self._make, component, rows, parameters, measured)
            yield Block(start + first, start + last, target_start + first, target_start + last, work=work)

    def max_block_bytes(self, component: Component) -> int:
        """The size of the largest block of a component."""
        tensor = self.tensor(component)
        extents = (tensor.extent(self._rows_of(component, rows)) for rows in self._row_pieces(component))
        return max(last - first for first, last in extents)

    def changed_in_memory(self, component: Component) -> tuple[ir.TensorProtocol, list[Statistics]]:
        """One of the tensors, changed, and the statistics of the change."""
        tensor = self.tensor(component)
        after, scratch = np.empty(tensor.nbytes, np.uint8), np.empty(0, np.uint8)
        statistics: list[Statistics] = []
        for block in self.blocks(component, 0, 0):
            assert block.work is not None
            before = tensor.inline_bytes[block.start : block.stop]
            statistics += block.work(before, after[block.target_start : block.target_stop], scratch)
        old = tensor.tensor
        proto = onnx.TensorProto(
            name=old.name or "", data_type=int(old.dtype), dims=old.shape.numpy(), raw_data=after.tobytes()
        )
        return ir.serde.TensorProtoTensor(proto), statistics

    # --- a piece of the rows at a time ---

    @property
    def _row_bytes(self) -> int:
        """Bytes of a row in fp32."""
        return 4 * math.prod(self.shape[1:])

    @property
    def _has_long_bands(self) -> bool:
        """Whether a band is longer than a block. It is then read once before its first row is changed."""
        return self.groups.band_rows * self._row_bytes > block_copy.BLOCK

    def _rows_of(self, component: Component, rows: slice) -> slice:
        """The rows of a component's tensor that belong to these rows of the weight."""
        return rows if component is Component.LEVELS else self.groups.bands(rows)

    def _row_pieces(self, component: Component) -> Iterator[slice]:
        """The weight's rows in pieces, each of them whole bytes of the component."""
        unit = math.lcm(self.levels.aligned_rows, self.zeros.aligned_rows if self.zeros is not None else 1)
        if self._has_long_bands and component is not Component.LEVELS:
            count = unit * self.groups.band_rows
        else:
            unit = unit if self._has_long_bands else math.lcm(unit, self.groups.band_rows)
            count = max(block_copy.BLOCK // self._row_bytes // unit, 1) * unit
        for first in range(0, self.shape[0], count):
            yield slice(first, min(first + count, self.shape[0]))

    def _make(
        self,
        component: Component,
        rows: slice,
        parameters: QuantParameters | None,
        measured: bool,
        source: Bytes,
        target: Bytes,
        _: Bytes,
    ) -> list[Statistics]:
        """Fill `target` with a component of some rows. `parameters` are the new ones where they are known already."""
        if parameters is not None and component is not Component.LEVELS:
            target[:] = self._packed_parameters(component, parameters, rows, source)
            return []
        old_levels = self.levels.unpack(source, rows) if component is Component.LEVELS else self.levels.read(rows)
        old_parameters = self._old_parameters(rows)
        weight = self._dequantised(old_levels, old_parameters, rows)
        total, applied = self._sum(weight, rows)
        new = parameters
        if new is None:
            new = self._new_parameters(old_parameters, self._value_range(total, rows), rows)
        if component is not Component.LEVELS:
            target[:] = self._packed_parameters(component, new, rows, source)
            return []
        scales, zeros = self._broadcast(new, rows)
        levels = self.scheme.levels(total, scales, zeros)
        target[:] = self.levels.pack(self._replaced_levels(old_levels, levels, rows), source)
        merged = (levels - zeros) * scales if measured else None
        return [patch.statistics(merged) for patch in applied]

    def _replaced_levels(self, old: NDArray[Any], new: NDArray[np.float32], rows: slice) -> NDArray[Any]:
        """The old levels with the new ones where a step changes their group. The padding of rows stays."""
        after = old.copy()
        width, flat = math.prod(self.shape[1:]), new.reshape(len(new), -1)
        changed = self._changed_groups(rows)
        if changed is None:
            np.copyto(after[:, :width], flat, casting="unsafe")
        else:
            is_changed = np.broadcast_to(self.groups.broadcast(changed, rows), new.shape).reshape(flat.shape)
            np.copyto(after[:, :width], flat, where=is_changed, casting="unsafe")
        return after

    def _packed_parameters(
        self, component: Component, parameters: QuantParameters, rows: slice, before: Bytes
    ) -> Bytes:
        tensor, bands = self.tensor(component), self.groups.bands(rows)
        shape = bands.stop - bands.start, self.groups.band_groups
        numbers = parameters.scales if component is Component.SCALES else parameters.zeros
        return tensor.pack(np.broadcast_to(numbers, shape), before)

    def _old_parameters(self, rows: slice) -> QuantParameters:
        """The old scales and zero points of the bands that contain these rows."""
        bands = self.groups.bands(rows)
        zeros = np.array(self.scheme.default_zero, np.float32)
        if self.scheme.rule is Rule.ASYMMETRIC and self.zeros is not None:
            zeros = self.zeros.read(bands).astype(np.float32)
        return QuantParameters(self.scales.read(bands).astype(np.float32), zeros)

    def _broadcast(self, parameters: QuantParameters, rows: slice) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        zeros = self.groups.broadcast(parameters.zeros, rows) if parameters.zeros.ndim else parameters.zeros
        return self.groups.broadcast(parameters.scales, rows), zeros

    def _dequantised(self, levels: NDArray[Any], parameters: QuantParameters, rows: slice) -> NDArray[np.float32]:
        weight = levels[:, : math.prod(self.shape[1:])].astype(np.float32).reshape(-1, *self.shape[1:])
        scales, zeros = self._broadcast(parameters, rows)
        weight -= zeros
        weight *= scales
        return weight

    def _weight(self, rows: slice) -> NDArray[np.float32]:
        return self._dequantised(self.levels.read(rows), self._old_parameters(rows), rows)

    def _sum(self, weight: NDArray[np.float32], rows: slice) -> tuple[NDArray[np.float32], list[_AppliedPatch]]:
        """W + ΔW of some rows, and what each patch did."""
        total, applied = weight.copy(), []
        with np.errstate(over="ignore", invalid="ignore"):  # refuse_not_finite checks the result
            for patch, column_norms in zip(self.patches, self.column_norms, strict=True):
                first, last = max(rows.start, patch.rows.start), min(rows.stop, patch.rows.stop)
                if first >= last:
                    continue
                slices = (slice(first - rows.start, last - rows.start), patch.columns)[: weight.ndim]
                patch_rows = slice(first - patch.rows.start, last - patch.rows.start)
                applied.append(_apply(total[slices], weight[slices], patch, patch_rows, column_norms, slices))
        refuse_not_finite(self.name, total, before=weight)
        return total, applied

    def _value_range(self, total: NDArray[np.float32], rows: slice) -> ValueRange:
        low = self.groups.reduce(np.minimum, total, rows)
        high = self.groups.reduce(np.maximum, total, rows)
        return ValueRange(np.minimum(low, 0), np.maximum(high, 0))

    def _new_parameters(self, old: QuantParameters, value_range: ValueRange, rows: slice) -> QuantParameters:
        """The new parameters, and the old ones of groups that no step changes."""
        new, changed = self.scheme.parameters(value_range), self._changed_groups(rows)
        refuse_not_finite(self.name, new.scales.astype(self.scheme.scale_dtype))
        if changed is None:
            return new
        zeros = np.where(changed, new.zeros, old.zeros) if new.zeros.ndim else new.zeros
        return QuantParameters(np.where(changed, new.scales, old.scales), zeros)

    def _changed_groups(self, rows: slice) -> NDArray[np.bool_] | None:
        """Which groups of the rows' bands a step changes. None where all groups change."""
        if _cover_all(self.patches, self.shape):
            return None
        band_rows, bands = self.groups.band_rows, self.groups.bands(rows)
        first_rows = range(bands.start * band_rows, bands.stop * band_rows, band_rows)  # no patch splits a band
        marked = np.zeros((len(first_rows), *self.shape[1:]), np.bool_)
        for patch in self.patches:
            inside = [number for number, row in enumerate(first_rows) if patch.rows.start <= row < patch.rows.stop]
            marked[(inside, patch.columns)[: marked.ndim]] = True
        if self.groups.axis == 0 and self.groups.block_size:
            return marked.reshape(len(marked), -1)
        changed: NDArray[np.bool_] = self.groups.reduce(np.logical_or, marked, slice(0, len(marked)))
        return changed

    # --- before the first row ---

    def _parameters_of_long_bands(self, rows: slice) -> QuantParameters:
        """The new parameters of the bands that contain these rows. Each band is read whole, piece by piece."""
        bands = self.groups.bands(rows)
        numbers = range(bands.start, bands.stop)
        for band in [band for band in self.cached_parameters if band not in numbers]:
            del self.cached_parameters[band]
        for band in numbers:
            if band not in self.cached_parameters:
                self.cached_parameters[band] = self._parameters_of_long_band(band)
        zeros = [self.cached_parameters[band].zeros for band in numbers]
        scales = np.concatenate([self.cached_parameters[band].scales for band in numbers])
        return QuantParameters(scales, np.concatenate(zeros) if zeros[0].ndim else zeros[0])

    def _parameters_of_long_band(self, band: int) -> QuantParameters:
        band_rows = self.groups.band_rows
        start, stop = band * band_rows, min((band + 1) * band_rows, self.shape[0])
        all_rows, count = slice(start, stop), max(1, block_copy.BLOCK // self._row_bytes)
        pieces = [slice(first, min(first + count, stop)) for first in range(start, stop, count)]

        def range_of(rows: slice) -> ValueRange:
            return self._value_range(self._sum(self._weight(rows), rows)[0], rows)

        low = high = np.zeros(1, np.float32)
        threads = block_copy.default_threads()
        with ThreadPoolExecutor(threads) as pool:
            for first in range(0, len(pieces), threads):  # the ranges of all pieces would be as large as the band
                for piece_range in pool.map(range_of, pieces[first : first + threads]):
                    low, high = np.minimum(low, piece_range.low), np.maximum(high, piece_range.high)
        return self._new_parameters(self._old_parameters(all_rows), ValueRange(low, high), all_rows)

    def _column_norms(self, patch: Patch) -> NDArray[np.float64] | None:
        """See `apply_step.squared_column_norms`."""
        first, count = patch.rows.start, max(1, block_copy.BLOCK // self._row_bytes)
        ends = [*range(0, patch.rows.stop - first, count), patch.rows.stop - first]

        def read(rows: slice) -> NDArray[np.float32]:
            return self._weight(slice(rows.start + first, rows.stop + first))[:, patch.columns]

        return squared_column_norms(patch.step, [slice(*pair) for pair in itertools.pairwise(ends)], read)


def _apply(
    total: NDArray[np.float32],
    weight: NDArray[np.float32],
    patch: Patch,
    rows: slice,
    column_norms: NDArray[np.float64] | None,
    slices: tuple[slice, ...],
) -> _AppliedPatch:
    """Apply a patch's step to some of its rows: `weight` in, `total` out."""
    step = patch.step
    start = sums.starting_rows(step, rows, weight)
    if step.is_replacement:
        np.copyto(total, start, casting="unsafe")
        return _AppliedPatch(step.weight, slices, weight, total - weight)
    change = sums.sum_rows(step, rows, start, total, column_norms=column_norms)
    return _AppliedPatch(step.weight, slices, start, change)


def _cover_all(patches: Sequence[Patch], shape: Sequence[int]) -> bool:
    """Whether every entry is in one of the patches, which do not overlap."""
    columns = shape[1] if len(shape) > 1 else 1
    entries = 0
    for patch in patches:
        first, last, _ = patch.columns.indices(columns)
        entries += (patch.rows.stop - patch.rows.start) * (last - first)
    return entries == shape[0] * columns
