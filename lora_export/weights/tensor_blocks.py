"""Tensors on their way from one file into another, as the blocks that `block_copy.transfer` carries over.

Whatever holds weights in files (a safetensors file, a graph) describes each tensor of its output as an `OutputTensor`:
a copy, rounded to another dtype, replaced, or changed by a step.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from lora_export import sums
from lora_export.lora import EVERY_ROW, TOGETHER
from lora_export.plan import Step
from lora_export.storage import block_copy
from lora_export.storage.block_copy import Block, Bytes
from lora_export.storage.safetensors_file import Entry
from lora_export.weights.apply_step import (
    ApplyStep,
    Backend,
    StepRows,
    change_by_columns,
    refuse_overflow,
    squared_column_norms,
)
from lora_export.weights.merge_report import Statistics

if TYPE_CHECKING:
    from lora_export.storage.matrix_on_disk import MatrixOnDisk
    from lora_export.weights.calibrated_rounding import LayerInputs
    from lora_export.weights.quantised.stored_parts import QuantisedTensor

_T = TypeVar("_T")
_OfAllRows: TypeAlias = "tuple[NDArray[np.float64] | None, MatrixOnDisk | None]"  # DoRA's norms, a change by columns
LEAST_MEASURED = 1 << 20  # entries of a weight that its statistics count, at least


class Patch(NamedTuple):
    """A step on one block of a stored matrix that several weights share side by side."""

    step: Step  # its shape and layout are those of the block
    rows: slice
    columns: slice

    def within(self, rows: slice) -> slice | None:
        """Its rows that are among these rows of the tensor, counted from its first; None where none are."""
        first, last = max(rows.start, self.rows.start), min(rows.stop, self.rows.stop)
        return slice(first - self.rows.start, last - self.rows.start) if first < last else None

    def shaped(self, matrix: NDArray[Any]) -> NDArray[Any]:
        """Some rows of a matrix in the shape of the step's weight: a convolution has more axes, a bias has one."""
        return matrix.reshape(len(matrix), *self.step.spec.shape[1:])


@dataclass(frozen=True, eq=False)
class OutputTensor:
    """One tensor of the output: where in the base it comes from, and what happens to it on the way."""

    source: Entry  # of an added tensor: no bytes
    step: Step | None  # None: it is only copied, or rounded to another dtype
    name: str
    dtype: np.dtype[Any]
    patches: tuple[Patch, ...] = ()  # instead of a step; entries outside of them stay as they are
    quantised: QuantisedTensor | None = None  # `source` has its packed bytes, the shape of its rows, its float dtype
    shape: tuple[int, ...] | None = None  # in the output, where `source` has the same entries in another shape
    repeated: bool = False  # another tensor of the output has the same source
    inputs: LayerInputs | None = None  # of the layer of a weight, where it is rounded with feedback through them

    @property
    def takes_whole(self) -> bool:
        """Whether all rows change together: feedback runs from row to row."""
        return self.inputs is not None and self.all_patches[0].step.spec.layout.is_transposed

    def with_inputs(self, weight: str, layers: Mapping[str, LayerInputs]) -> Self:
        """The tensor with the inputs of its layer, where they are known and one step changes the whole of it."""
        if weight not in layers or len(self.all_patches) != 1:
            return self
        step = self.all_patches[0].step
        is_whole = step.spec.region is None and len(step.spec.shape) == 2 and not step.is_replacement
        return replace(self, inputs=layers[weight]) if is_whole else self

    @property
    def weight(self) -> str:
        """The name of the weight in the output that this is, or is a part of."""
        return self.name

    def blocks_into(self, source: Path, read_fd: int, target: Entry, backend: Backend) -> Iterator[Block]:
        """The blocks that make it, where it is no copy. The work of a block returns a list of Statistics, if any."""
        return changed_blocks(source, read_fd, self, target, backend)

    def blocks_from(self, start: int, source: Path, read_fd: int, backend: Backend) -> Iterator[Block]:
        """As `blocks_into`, from a position in the target on."""
        target = Entry(self.name, self.dtype, self.source.shape, start, start + self.nbytes)
        return self.blocks_into(source, read_fd, target, backend)

    @property
    def output_shape(self) -> tuple[int, ...]:
        return self.source.shape if self.shape is None else self.shape

    @property
    def is_copy(self) -> bool:
        is_changed = self.step is not None or self.patches or self.quantised is not None
        return not is_changed and self.source.dtype == self.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.output_shape) * self.dtype.itemsize

    @property
    def rows_at_once(self) -> int:
        """The least rows of a block; blocks begin at multiples of it."""
        if not self.source.rows:
            return 1
        rows = self.source.rows if self.takes_whole else 1
        if self.quantised is not None:
            rows = max(1, self.quantised.rows_at_once * self.source.rows // self.quantised.row_shape[0])
        return rows_with_terms(self.all_patches, rows, self.source.rows, by_columns=True)

    @property
    def largest_row_bytes(self) -> int:
        """The bytes of a row in the largest form that it takes on the way: stored, summed, or in the output."""
        replacement = self.step.replace if self.step is not None else None
        sizes = [self.source.dtype.itemsize, self.dtype.itemsize, np.dtype(np.float32).itemsize]
        sizes += [] if replacement is None else [replacement.itemsize]
        return math.prod(self.source.shape[1:]) * max(sizes)

    @property
    def all_patches(self) -> tuple[Patch, ...]:
        """The patches; a step on the whole tensor is one patch."""
        if self.step is None:
            return self.patches
        return (Patch(self.step, slice(0, self.source.rows), EVERY_ROW),)

    @property
    def needs_whole(self) -> bool:
        """Whether rows are made from what is made once of the whole weight: its scales, or a Fourier transform."""
        terms = (term for patch in self.all_patches for term in patch.step.terms)
        return self.quantised is not None or any(term.pair.is_made_whole for term in terms)

    def shape_of(self, rows: slice) -> tuple[int, ...]:
        return (rows.stop - rows.start, *self.source.shape[1:]) if self.source.shape else ()


def rows_with_terms(patches: Iterable[Patch], rows: int, most: int, *, by_columns: bool = False) -> int:
    """The least multiple of `rows` that no change of the patches splits, up to `most`, all rows.

    With `by_columns`, changes that need all rows are made apart (`change_by_columns`), and do not count.
    """
    of_terms = {(patch.rows.start, term.pair.rows_together) for patch in patches for term in patch.step.stored_terms}
    if by_columns:
        of_terms = {(start, count) for start, count in of_terms if count != TOGETHER}
    if any(count == TOGETHER or start % count for start, count in of_terms):
        return most
    return min(math.lcm(rows, *(count for _, count in of_terms)), most)


def block_size(tensors: Iterable[OutputTensor]) -> int:
    """The bytes of the largest block that these tensors need."""
    sizes = (tensor.largest_row_bytes * tensor.rows_at_once for tensor in tensors if not tensor.is_copy)
    return max((block_copy.BLOCK, *sizes))


def run_in_memory(
    source: Path, read_fd: int, tensor: OutputTensor, blocks: Iterable[Block], after: Bytes | None = None
) -> list[Statistics]:
    """Make blocks of a changed tensor, and return the statistics. `after` receives its bytes: its first has place 0."""
    scratch = np.empty(2 * block_size([tensor]), np.uint8)
    found: list[Statistics] = []
    for block in blocks:
        before = np.empty(block.stop - block.start, np.uint8)
        block_copy.read(source, read_fd, before, block.start)
        count = block.target_stop - block.target_start
        target = np.empty(count, np.uint8) if after is None else after[block.target_start :][:count]
        assert block.work is not None
        found += block.work(before, target, scratch) or ()
    return found


def runs(items: Iterable[_T], are_neighbours: Callable[[_T, _T], bool]) -> Iterator[list[_T]]:
    """The items in their order, each with the neighbours behind it: tensors that are copied as one range."""
    run: list[_T] = []
    for item in items:
        if run and not are_neighbours(run[-1], item):
            yield run
            run = []
        run.append(item)
    if run:
        yield run


def copied_blocks(read_fd: int, write_fd: int, start: int, target_start: int, count: int) -> Iterator[Block]:
    """Blocks that copy a range of the source; the target shares its disk blocks where the file system can."""
    shared = block_copy.share(read_fd, write_fd, start, target_start, count)
    offset = target_start - start
    ends = sorted({start, start + count, *((shared.start, shared.stop) if shared else ())})
    for one, other in itertools.pairwise(ends):
        for first in range(one, other, block_copy.BLOCK):
            last = min(first + block_copy.BLOCK, other)
            yield Block(first, last, first + offset, last + offset, shared=first in shared)


def skipped_blocks(start: int, target_start: int, count: int) -> Iterator[Block]:
    """Blocks that read a range of the source for its hash, and write nothing."""
    for first in range(start, start + count, block_copy.BLOCK):
        last = min(first + block_copy.BLOCK, start + count)
        yield Block(first, last, target_start, target_start, work=_write_nothing)


def _write_nothing(_source: Bytes, _target: Bytes, _scratch: Bytes) -> None:
    """The work of a block of which nothing is in the output."""


def changed_blocks(
    source: Path, read_fd: int, tensor: OutputTensor, target: Entry, backend: Backend, *, may_measure: bool = True
) -> Iterator[Block]:
    """Blocks of whole rows that change a tensor. The work of a block returns a list of Statistics.

    They count nothing without `may_measure`: for a caller that measures what it makes of the rows.
    Where DoRA's outputs are columns, or all rows change together, the tensor is read once more, before its first block.
    """
    target = replace(target, shape=tensor.source.shape)
    old, least = tensor.source, tensor.rows_at_once
    count = max(1, block_copy.BLOCK // max(1, tensor.largest_row_bytes) // least) * least
    cuts = [*range(0, target.rows, count), target.rows]
    pieces = [slice(first, last) for first, last in itertools.pairwise(cuts)]
    change = _RowChange(tensor, target, backend.apply, source, read_fd)
    parts: list[list[_Part]] = [[] for _ in pieces]  # by piece: a stack of experts has many patches
    for patch in tensor.all_patches:
        own = pieces[patch.rows.start // count : -(-patch.rows.stop // count)]
        part = _Part(patch, _of_all_rows(source, read_fd, tensor, patch, own))
        for here in parts[patch.rows.start // count :][: len(own)]:
            here.append(part)
    if change.reads_itself:  # the packed bytes of some rows are in many places
        yield from skipped_blocks(old.start, target.start, old.nbytes)
    for rows, own_parts, measured in zip(pieces, parts, blocks_to_measure(tensor.step, pieces), strict=True):
        yield Block(
            old.stop if change.reads_itself else old.start + rows.start * old.row_bytes,
            old.stop if change.reads_itself else old.start + rows.stop * old.row_bytes,
            target.start + rows.start * target.row_bytes,
            target.start + rows.stop * target.row_bytes,
            work=functools.partial(change.make, rows, own_parts, measured and may_measure),
        )


class _Part(NamedTuple):
    """A patch, and what was made of all of its rows."""

    patch: Patch
    of_all_rows: _OfAllRows


def _of_all_rows(source: Path, read_fd: int, tensor: OutputTensor, patch: Patch, pieces: Sequence[slice]) -> _OfAllRows:
    """What takes a pass over all rows. What is read here is not hashed: `transfer` reads and hashes it later."""
    old, offset = tensor.source, patch.rows.start

    def read(own: slice) -> NDArray[Any]:
        rows = slice(own.start + offset, own.stop + offset)
        if tensor.quantised is not None:
            return _columns(_read_quantised(tensor, tensor.quantised, rows, source, read_fd), patch)
        stored = np.empty((rows.stop - rows.start) * old.row_bytes, np.uint8)
        block_copy.read(source, read_fd, stored, old.start + rows.start * old.row_bytes)
        return _columns(stored_rows(tensor, rows, stored), patch)

    own = [own for rows in pieces if (own := patch.within(rows)) is not None]
    return squared_column_norms(patch.step, own, read), change_by_columns(patch.step, own, read)


def _read_quantised(
    tensor: OutputTensor, quantised: QuantisedTensor, rows: slice, source: Path, read_fd: int
) -> NDArray[Any]:
    own, old = quantised.rows_in(tensor.source.shape, rows), tensor.source
    return quantised.read(source, read_fd, old.start, old.nbytes, own).reshape(tensor.shape_of(rows))


def stored_rows(tensor: OutputTensor, rows: slice, stored: Bytes) -> NDArray[Any]:
    """Rows of the base's tensor, from their bytes in its file."""
    if tensor.quantised is not None:
        own = tensor.quantised.rows_in(tensor.source.shape, rows)
        return tensor.quantised.decode(own, stored).reshape(tensor.shape_of(rows))
    return stored.view(tensor.source.dtype).reshape(tensor.shape_of(rows))


def _columns(stored: NDArray[Any], patch: Patch) -> NDArray[Any]:
    """The columns of some rows that are in the patch."""
    return stored if patch.columns == EVERY_ROW else stored[:, patch.columns]


def _rows_beside(rows: slice, parts: Iterable[_Part]) -> Iterator[Any]:
    """Indices of the rows of a block that no part has whole, counted from the first row."""
    whole = [patch.rows for patch, _ in parts if patch.columns == EVERY_ROW]
    position = rows.start
    for own in sorted(whole, key=lambda own: own.start):
        if position < own.start:
            yield slice(position - rows.start, own.start - rows.start)
        position = max(position, own.stop)
    if not whole:
        yield ...  # a scalar has no rows
    elif position < rows.stop:
        yield slice(position - rows.start, None)


@dataclass(frozen=True, eq=False)
class _RowChange:
    """How rows of a tensor are changed between two files."""

    tensor: OutputTensor
    target: Entry
    apply: ApplyStep
    source: Path
    read_fd: int  # of the source

    @property
    def reads_itself(self) -> bool:
        """Whether the packed bytes of some rows are not one range, so that a block cannot have them."""
        return self.tensor.quantised is not None and self.tensor.quantised.pieces is not None

    def make(
        self, rows: slice, parts: Sequence[_Part], measured: bool, source: Bytes, target: Bytes, scratch: Bytes
    ) -> list[Statistics]:
        """Fill `target`, some rows of the output with these parts, from `source`. Returns the statistics of each."""
        shape, old = self.tensor.shape_of(rows), self.tensor.source
        output = target.view(self.target.dtype).reshape(shape)
        stored = self._stored(rows, source) if old.nbytes else output  # an added tensor has no stored rows
        statistics = []
        with np.errstate(over="ignore", invalid="ignore"):  # refuse_overflow checks, and names the tensor
            for others in () if self.tensor.step is not None else _rows_beside(rows, parts):
                sums.round_into(output[others], stored[others])
                refuse_overflow(self.target.name, stored[others], output[others])
            for patch, of_all_rows in parts:
                own = patch.within(rows)
                if own is None:
                    continue
                here: Any = ...  # a scalar has no rows
                if old.shape:
                    here = slice(own.start + patch.rows.start - rows.start, own.stop + patch.rows.start - rows.start)
                before, after = _columns(stored[here], patch), _columns(output[here], patch)
                name = patch.step.weight if self.tensor.patches else self.target.name
                part = StepRows(
                    patch.step, name, own, before, after, scratch, *of_all_rows, measured, self.tensor.inputs
                )
                found = self.apply(part)
                statistics += [] if found is None else [found]
        return statistics

    def _stored(self, rows: slice, block: Bytes) -> NDArray[Any]:
        """Rows of the base's tensor, from the bytes of a block or from the file."""
        quantised = self.tensor.quantised
        if quantised is not None and self.reads_itself:
            return _read_quantised(self.tensor, quantised, rows, self.source, self.read_fd)
        return stored_rows(self.tensor, rows, block)


def blocks_to_measure(step: Step | None, rows: Sequence[slice]) -> Sequence[bool]:
    """Which blocks of a weight the statistics count: all, or of a large weight a sample.

    Measuring a block costs as much as changing it, and a million entries determine a retention to a thousandth. The
    sample is spread evenly over the rows. All blocks are measured where the sample would miss half or more of its part
    of the change; with changes that depend on the weight, which are unknown before they are computed; and for changes
    whose factors are larger than the weight, or cost more than their product.
    """
    everything = [True] * len(rows)
    if step is not None and any(
        term.pair.is_made_whole or (term.pair.is_structured and not term.pair.is_low_rank) for term in step.terms
    ):
        return everything
    stride = math.prod(step.spec.shape) // LEAST_MEASURED if step is not None and step.terms else 0
    if step is None or stride < 2 or step.depends_on_weight:
        return everything
    sample = [number % stride == 0 for number in range(len(rows))]
    energies = sums.squared_row_norms(step)
    sampled = [part for part, is_sampled in zip(rows, sample, strict=True) if is_sampled]
    fraction = sum(part.stop - part.start for part in sampled) / len(energies)
    sampled_energy = sum(energies[part].sum() for part in sampled)
    return sample if sampled_energy >= fraction / 2 * energies.sum() else everything
