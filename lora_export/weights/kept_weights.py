"""Quantised weights that change and stay quantised: each number becomes the nearest to W + ΔW on its own scale.

W is the product of number and scale, before a library rounds it to a dtype: so a number whose change is zero stays.
All rows here are those of the file. Some libraries store the transpose of a weight; its steps are turned, too.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export import sums
from lora_export.errors import InputRefused
from lora_export.lora import EVERY_ROW
from lora_export.options.spelling import named
from lora_export.plan import Layout, Plan, Step
from lora_export.storage import block_copy
from lora_export.storage.block_copy import Block, Bytes
from lora_export.storage.safetensors_file import Entry
from lora_export.weights.apply_step import Backend, refuse_overflow, scratch_arrays, squared_column_norms
from lora_export.weights.calibrated_rounding import calibrated
from lora_export.weights.merge_report import Statistics, StatisticsByWeight, StepResult
from lora_export.weights.quantised.codes import Grid, StoredCodes, read_numbers
from lora_export.weights.quantised.new_grid import MOST_SCALES, NewGrid, NewPart, ScaleRule, new_parts
from lora_export.weights.quantised.stored_parts import QuantisedTensor
from lora_export.weights.tensor_blocks import (
    OutputTensor,
    Patch,
    blocks_to_measure,
    rows_with_terms,
    run_in_memory,
    skipped_blocks,
)


@dataclass(frozen=True, eq=False)
class KeptTensor(OutputTensor):
    """The packed numbers of a quantised weight, and the steps on it. `source` is what the file has."""

    codes: StoredCodes = field(kw_only=True)
    of_weight: str = field(kw_only=True)  # the name of the weight in the output
    grid: NewGrid | None = field(default=None, kw_only=True)  # what it is rounded to; None: the scales that it has

    @property
    def weight(self) -> str:
        return self.of_weight

    def blocks_into(self, source: Path, read_fd: int, target: Entry, _backend: Backend) -> Iterator[Block]:
        return kept_blocks(source, read_fd, self, target)

    @property
    def new_codes(self) -> StoredCodes:
        return self.codes if self.grid is None else self.grid.codes

    @property
    def is_copy(self) -> bool:
        return False

    def name_of(self, patch: Patch) -> str:
        """The name of what a patch changes: a part of the weight, or all of it."""
        is_whole = patch[1:] == (slice(0, self.codes.shape[0]), EVERY_ROW) and patch.step.spec.region is None
        return self.weight if is_whole else patch.step.weight

    @property
    def rows_at_once(self) -> int:
        together = math.lcm(self.codes.layout.rows_together, self.new_codes.layout.rows_together)
        together = self.codes.shape[0] if self.takes_whole else together
        return rows_with_terms(self.patches, together, self.codes.shape[0])

    @property
    def largest_row_bytes(self) -> int:
        return self.codes.shape[1] * np.dtype(np.float32).itemsize

    @property
    def pieces(self) -> list[tuple[slice, bool]]:
        """The rows of each block, and whether the statistics count them."""
        least, rows = self.rows_at_once, self.codes.shape[0]
        count = max(1, block_copy.BLOCK // self.largest_row_bytes // least) * least
        cuts = [*range(0, rows, count), rows]
        pieces = [slice(first, last) for first, last in itertools.pairwise(cuts)]
        whole = self.patches[0].step if len(self.patches) == 1 else None
        return list(zip(pieces, blocks_to_measure(whole, pieces), strict=True))


@dataclass(frozen=True, eq=False)
class ScalesOfGrid(OutputTensor):
    """Scales or zero points of a weight on another grid. `source` is what the file has."""

    part: NewPart = field(kw_only=True)

    @property
    def is_copy(self) -> bool:
        return False

    def blocks_into(self, _source: Path, _read_fd: int, target: Entry, _backend: Backend) -> Iterator[Block]:
        old = self.source
        yield from skipped_blocks(old.start, target.start, old.nbytes)
        made = functools.cache(lambda: np.ascontiguousarray(self.part.make()).reshape(-1).view(np.uint8))

        def fill(first: int, _source: Bytes, out: Bytes, _scratch: Bytes) -> None:
            out[:] = made()[first : first + len(out)]

        for first in range(0, target.nbytes, block_copy.BLOCK):
            last = min(first + block_copy.BLOCK, target.nbytes)
            place = target.start + first, target.start + last
            yield Block(old.stop, old.stop, *place, work=functools.partial(fill, first))


def kept_outputs(
    entries: Iterable[Entry], kept: Mapping[str, QuantisedTensor], grids: Mapping[str, NewGrid], plan: Plan
) -> dict[str, OutputTensor]:
    """Each stored tensor of the `kept` weights as a merge writes it: changed, of another grid, or as it is."""
    parts = new_scales(kept.values(), grids)
    found: dict[str, OutputTensor] = {}
    for entry in entries:
        tensor, part, name = kept.get(entry.name), parts.get(entry.name), plan.output_name(entry.name)
        if part is not None:
            found[entry.name] = ScalesOfGrid(entry, None, name, entry.dtype, shape=part.shape, part=part)
        elif tensor is not None:
            changed = kept_tensor(entry, tensor, plan, grids.get(tensor.name))
            found[entry.name] = changed or OutputTensor(entry, None, name, entry.dtype)
    return found


def kept_tensor(entry: Entry, tensor: QuantisedTensor, plan: Plan, grid: NewGrid | None = None) -> KeptTensor | None:
    """The packed numbers of a weight with the steps of a plan; None where no step is on them, and no other grid.

    Raises InputRefused for a part of a weight that is no block of the file.
    """
    steps = plan.steps_on(tensor.name)
    if not steps and grid is None:
        return None
    assert tensor.codes is not None
    patches = tuple(patch_in_file(tensor, step) for step in steps)
    name, weight = plan.output_name(entry.name), plan.output_name(tensor.name)
    shape = None if grid is None else grid.packed_shape
    of_file = (entry, None, name, entry.dtype, patches, None, shape)
    return KeptTensor(*of_file, codes=tensor.codes, of_weight=weight, grid=grid)


def new_scales(kept: Iterable[QuantisedTensor], grids: Mapping[str, NewGrid]) -> dict[str, NewPart]:
    """The stored tensors of weights on other grids that become others, by name."""
    return {name: part for one in kept if one.name in grids for name, part in grids[one.name].parts.items()}


def patch_in_file(tensor: QuantisedTensor, step: Step) -> Patch:
    """A step on a weight, on the rows of the file."""
    region, (rows, columns) = step.spec.region, tensor.row_shape
    patch = Patch(step, slice(0, rows), EVERY_ROW) if region is None else Patch(step, region.rows, region.columns)
    assert tensor.codes is not None
    # A row of a convolution is all of an output; of a bias, a number.
    has_rows = not tensor.codes.is_turned and step.spec.shape[:1] == (rows,)
    if (len(step.spec.shape) != 2 and not has_rows) or (region is not None and region.shape != tensor.row_shape):
        raise _unsupported_part(step)
    return _turned(patch, tensor.codes.shape[1], columns) if tensor.codes.is_turned else patch


def _turned(patch: Patch, rows: int, columns: int) -> Patch:
    """A patch on the transpose: of a matrix, or of the one of many experts of `rows` and `columns` that it is in."""
    expert = patch.rows.start // rows
    own = range(*patch.columns.indices(columns))
    if patch.rows.stop > (expert + 1) * rows or own.step != 1:
        raise _unsupported_part(patch.step)
    spec = patch.step.spec
    layout = Layout.OUT_IN if spec.layout.is_transposed else Layout.IN_OUT
    step = replace(patch.step, spec=replace(spec, shape=spec.shape[::-1], layout=layout))
    inside = slice(patch.rows.start - expert * rows, patch.rows.stop - expert * rows)
    first = expert * columns
    return Patch(step, slice(first + own.start, first + own.stop), EVERY_ROW if inside == slice(0, rows) else inside)


def _unsupported_part(step: Step) -> InputRefused:
    return InputRefused(
        f"{step.weight}: a change of such a part cannot be quantised again. Make the base a float model "
        f"({named('dequantize', True)})"
    )


def kept_blocks(source: Path, read_fd: int, tensor: KeptTensor, target: Entry) -> Iterator[Block]:
    """Blocks that change the numbers of a weight. The work of a block returns a list of Statistics."""
    change, old = KeptChange.of(tensor, source, read_fd), tensor.source
    for rows, measured in tensor.pieces:
        (first, last), (start, stop) = (each.layout.extent(rows) for each in (tensor.codes, tensor.new_codes))
        work = functools.partial(change.make, rows, measured)
        yield Block(old.start + first, old.start + last, target.start + start, target.start + stop, work=work)


@dataclass(frozen=True, eq=False)
class KeptChange:
    """How the numbers of some rows become those of W + ΔW."""

    tensor: KeptTensor
    grid: Grid
    new_grid: Grid  # of what is written
    column_norms: Sequence[NDArray[np.float64] | None]  # of each patch

    @classmethod
    def of(cls, tensor: KeptTensor, source: Path, read_fd: int) -> KeptChange:
        """Reads scales; and the whole weight where DoRA's outputs are columns of what is stored."""
        grid = tensor.codes.load()

        def norms_of(patch: Patch) -> NDArray[np.float64] | None:
            def read(own: slice) -> NDArray[Any]:
                rows = slice(own.start + patch.rows.start, own.stop + patch.rows.start)
                numbers = read_numbers(tensor.codes, source, read_fd, tensor.source.start, rows)
                return tensor.codes.weight(numbers, *grid(rows))[:, patch.columns]

            own = [part for rows, _ in tensor.pieces if (part := patch.within(rows)) is not None]
            return squared_column_norms(patch.step, own, read)

        new_grid = grid if tensor.grid is None else tensor.grid.codes.load()
        return cls(tensor, grid, new_grid, [norms_of(patch) for patch in tensor.patches])

    def sums(self, rows: slice, source: Bytes) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[Any] | None]:
        """Some rows before and after the change, in fp32, and their zero points."""
        codes = self.tensor.codes
        scales, zeros = self.grid(rows)
        before = codes.weight(codes.layout.unpack(rows, source), scales, zeros)
        after = before.copy()
        for patch, norms in zip(self.tensor.patches, self.column_norms, strict=True):
            own = patch.within(rows)
            if own is not None:
                first = patch.rows.start - rows.start
                here = slice(own.start + first, own.stop + first), patch.columns
                weight = patch.shaped(before[here])
                total = np.empty_like(weight)
                with np.errstate(over="ignore", invalid="ignore"):
                    sums.sum_rows(patch.step, own, weight, total, column_norms=norms)
                refuse_overflow(self.tensor.weight, weight, total)
                after[here] = total.reshape(after[here].shape)
        return before, after, zeros

    def make(self, rows: slice, measured: bool, source: Bytes, target: Bytes, scratch: Bytes) -> list[Statistics]:
        """Fill `target`, the packed numbers of some rows, from `source`. Returns the statistics of each change."""
        codes = self.tensor.codes
        numbers = codes.layout.unpack(rows, source)
        scales, zeros = self.grid(rows)
        before, after = codes.weight(numbers, scales, zeros), numbers.copy()
        if self.tensor.grid is not None:
            codes, (scales, zeros) = self.tensor.new_codes, self.new_grid(rows)
            start = numbers if self.tensor.grid.is_rescaled else np.zeros_like(numbers)
            after = codes.nearest(before.copy(), np.broadcast_to(scales, before.shape), zeros, start)
        scales = np.broadcast_to(scales, before.shape)
        points = None if zeros is None else np.broadcast_to(zeros, before.shape)
        statistics = []
        for patch, norms in zip(self.tensor.patches, self.column_norms, strict=True):
            own = patch.within(rows)
            if own is None:
                continue
            first = patch.rows.start - rows.start
            here = slice(own.start + first, own.stop + first), patch.columns
            weight, old, own_scales = patch.shaped(before[here]), after[here], scales[here]
            own_points = None if points is None else points[here]
            change, total = scratch_arrays(scratch, weight.shape, np.dtype(np.float32))
            with np.errstate(over="ignore", invalid="ignore"):  # refuse_overflow checks, and names the tensor
                change = sums.sum_rows(patch.step, own, weight, total, column_norms=norms, change=change)
            refuse_overflow(self.tensor.weight, weight, total)
            found = Statistics(self.tensor.name_of(patch))
            rounded = total.copy() if self.tensor.inputs is not None else total
            new = codes.nearest(rounded.reshape(old.shape), own_scales, own_points, old)
            if self.tensor.inputs is not None:
                other = codes.beyond(total, own_scales, own_points, new, old)
                values = (codes.weight(each, own_scales, own_points) for each in (new, other))
                is_transposed = patch.step.spec.layout.is_transposed
                takes, found.outputs = calibrated(
                    self.tensor.inputs, total, change, *values, is_transposed=is_transposed
                )
                np.copyto(new, other, where=takes)
            after[here] = new
            if measured:
                after_it = patch.shaped(codes.weight(new, own_scales, own_points))
                found.add_block(weight, change, after_it, total)
            statistics.append(found)
        target[:] = source if self.tensor.grid is None else 0
        codes.layout.pack(after, target)
        return statistics


def measured_results(kept: KeptTensor, path: Path, fd: int) -> list[StepResult]:
    """Quantise the rows of a weight again that are measured, in memory: what is left of each change."""
    blocks = zip(kept_blocks(path, fd, kept, kept.source), kept.pieces, strict=True)
    measured = (block for block, (_, is_measured) in blocks if is_measured)
    return list(StatisticsByWeight(run_in_memory(path, fd, kept, measured)).results)


# --- New scales: a pass over the weight finds them before it is written. Scales whose numbers do not change stay ---


def rescaled(tensor: KeptTensor, scheme: str, path: Path, scaling: ScaleRule | None) -> NewGrid | None:
    """The grid of a weight with new scales; None where its scheme has no rule. Reads the scales it has."""
    if scaling is None or scaling.read().size > MOST_SCALES:
        return None
    made = functools.cache(lambda: _new_scales(tensor, path, scaling))

    def load() -> Grid:
        old, of_rows = tensor.codes.load(), scaling.spread(scaling.decode(made()))
        return lambda rows: (of_rows(rows), old(rows)[1])

    codes = replace(tensor.codes, load=load)
    return NewGrid(scheme, codes, tensor.source.shape, new_parts(scaling, made), is_rescaled=True)


def _new_scales(tensor: KeptTensor, path: Path, scaling: ScaleRule) -> NDArray[Any]:
    """The stored scales after the change."""
    old = scaling.read()
    needed = NeededScales(tensor.codes, scaling, old.size)
    with path.open("rb") as reader:
        change = KeptChange.of(replace(tensor, grid=None), path, reader.fileno())
        for rows, _ in tensor.pieces:
            first, last = tensor.codes.layout.extent(rows)
            packed = np.empty(last - first, np.uint8)
            block_copy.read(path, reader.fileno(), packed, tensor.source.start + first)
            before, total, zeros = change.sums(rows, packed)
            needed.add(rows, before, total, zeros)
    factors, is_changed = needed.factors.reshape(old.shape), needed.change.reshape(old.shape) > 0
    return scaling.renewed(factors.astype(np.float32), is_changed, old)


class NeededScales:
    """What the rule of a scheme makes of each scale of a weight, from its rows."""

    def __init__(self, codes: StoredCodes, scaling: ScaleRule, count: int) -> None:
        self.factors, self.change = np.zeros((2, count))  # the scales, and the largest change of a number of each
        self._codes, self._scaling = codes, scaling
        self._place = scaling.spread(np.arange(count, dtype=np.float32))

    def add(self, rows: slice, before: NDArray[Any], after: NDArray[Any], zeros: NDArray[Any] | None) -> None:
        """Count some rows of the file, before and after a change."""
        places = np.broadcast_to(self._place(rows), before.shape).astype(np.intp)
        np.maximum.at(self.factors, places, self._needed(after, zeros))
        np.maximum.at(self.change, places, np.abs(after - before))

    def _needed(self, weight: NDArray[Any], zeros: NDArray[Any] | None) -> NDArray[Any]:
        """The scale on which each number is the last value, or `reach`."""
        if self._scaling.reach:
            magnitudes: NDArray[Any] = np.abs(weight)
            return magnitudes / self._scaling.reach
        points: Any = 0.0 if zeros is None else zeros
        ends = [np.nanmax(self._codes.values) - points, np.nanmin(self._codes.values) - points]
        with np.errstate(all="ignore"):
            found = [np.where(np.not_equal(end, 0), weight / end, 0) for end in ends]
        needed: NDArray[Any] = np.maximum(*found)
        return needed
