"""Quantised weights that change and stay quantised: each number becomes the nearest to W + ΔW on its own scale.

W is the product of number and scale, before a library rounds it to a dtype: so a number whose change is zero stays.
All rows here are those of the file. Some libraries store the transpose of a weight; its steps are turned, too.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
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
from lora_export.weights.apply_step import refuse_overflow, scratch_arrays, squared_column_norms
from lora_export.weights.merge_report import Statistics
from lora_export.weights.quantised.codes import Grid, StoredCodes, read_numbers
from lora_export.weights.quantised.stored_parts import QuantisedTensor
from lora_export.weights.tensor_blocks import OutputTensor, Patch, blocks_to_measure, rows_with_terms


@dataclass(frozen=True, eq=False)
class KeptTensor(OutputTensor):
    """The packed numbers of a quantised weight, and the steps on it. `source` is what the file has."""

    codes: StoredCodes = field(kw_only=True)
    weight: str = field(kw_only=True)  # the name of the weight in the output

    @property
    def rows_at_once(self) -> int:
        return rows_with_terms(self.patches, self.codes.layout.rows_together, self.codes.shape[0])

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


def kept_tensor(entry: Entry, tensor: QuantisedTensor, plan: Plan) -> KeptTensor | None:
    """The packed numbers of a weight with the steps of a plan; None where no step is on them.

    Raises InputRefused for a part of a weight that is no block of the file.
    """
    whole = plan.by_weight.get(tensor.name)
    steps = plan.by_part.get(tensor.name, ()) if whole is None else (whole,)
    if not steps:
        return None
    assert tensor.codes is not None
    patches = tuple(patch_in_file(tensor, step) for step in steps)
    name, weight = plan.output_name(entry.name), plan.output_name(tensor.name)
    return KeptTensor(entry, None, name, entry.dtype, patches, codes=tensor.codes, weight=weight)


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
        first, last = tensor.codes.layout.extent(rows)
        work = functools.partial(change.make, rows, measured)
        yield Block(old.start + first, old.start + last, target.start + first, target.start + last, work=work)


@dataclass(frozen=True, eq=False)
class KeptChange:
    """How the numbers of some rows become those of W + ΔW."""

    tensor: KeptTensor
    grid: Grid
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

        return cls(tensor, grid, [norms_of(patch) for patch in tensor.patches])

    def make(self, rows: slice, measured: bool, source: Bytes, target: Bytes, scratch: Bytes) -> list[Statistics]:
        """Fill `target`, the packed numbers of some rows, from `source`. Returns the statistics of each change."""
        codes = self.tensor.codes
        numbers = codes.layout.unpack(rows, source)
        scales, zeros = self.grid(rows)
        before, after = codes.weight(numbers, scales, zeros), numbers.copy()
        scales = np.broadcast_to(scales, before.shape)
        points = None if zeros is None else np.broadcast_to(zeros, before.shape)
        statistics = []
        for patch, norms in zip(self.tensor.patches, self.column_norms, strict=True):
            own = patch.within(rows)
            if own is None:
                continue
            first = patch.rows.start - rows.start
            here = slice(own.start + first, own.stop + first), patch.columns
            weight, old, own_scales = patch.shaped(before[here]), numbers[here], scales[here]
            own_points = None if points is None else points[here]
            change, total = scratch_arrays(scratch, weight.shape, np.dtype(np.float32))
            with np.errstate(over="ignore", invalid="ignore"):  # refuse_overflow checks, and names the tensor
                change = sums.sum_rows(patch.step, own, weight, total, column_norms=norms, change=change)
            refuse_overflow(self.tensor.weight, weight, total)
            new = codes.nearest(total.reshape(old.shape), own_scales, own_points, old)
            after[here] = new
            found = Statistics(patch.step.weight if patch.step.spec.region is not None else self.tensor.weight)
            if measured:
                rounded = patch.shaped(codes.weight(new, own_scales, own_points))
                found.add_block(weight, change, rounded, total)
            statistics.append(found)
        target[:] = source
        codes.layout.pack(after, target)
        return statistics
