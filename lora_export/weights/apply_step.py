"""What a step does to some rows of a weight: sum, round once, and measure what was stored.

`Backend` is where that is computed: here by NumPy on every core, in `compiled.py` by compiled code where that is
installed, in `cuda.py` by PyTorch on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lora_export import sums
from lora_export.errors import InputRefused, count, count_that_are
from lora_export.lora import TOGETHER
from lora_export.options.spelling import named
from lora_export.plan import FLOATS, Step
from lora_export.storage import block_copy
from lora_export.storage.block_copy import Block, Bytes, Memory, RunningHashes
from lora_export.weights import compiled
from lora_export.weights.merge_report import Statistics, is_in_range

if TYPE_CHECKING:
    from lora_export.pairs.transforms import WeightTransform
    from lora_export.storage.matrix_on_disk import MatrixOnDisk
    from lora_export.weights.calibrated_rounding import LayerInputs

HALF = 2  # bytes of a number in bf16 and fp16
# The bits of infinity in a type of 16 bits, without that of the sign: those of a value that is not finite are no less.
_INFINITY = {np.dtype(ml_dtypes.bfloat16): 0xFF00, np.dtype(np.float16): 0xF800}


@dataclass(frozen=True, eq=False)
class StepRows:
    """Some rows of a weight in memory, and the step that changes them."""

    step: Step
    name: str  # of the tensor, for errors and statistics
    rows: slice  # which rows of the step's weight these are
    stored: NDArray[Any]  # the rows of the base
    output: NDArray[Any]  # receives the changed rows, in the dtype of the output
    scratch: Bytes  # memory for the change and the sum, overwritten
    column_norms: NDArray[np.float64] | None = None  # see `sums.sum_rows`
    known_change: MatrixOnDisk | None = None  # see `change_by_columns`
    measured: bool = True  # whether the statistics count these rows
    inputs: LayerInputs | None = None  # of the layer, where 16 bits are rounded with feedback through them


ApplyStep = Callable[[StepRows], Statistics | None]


def apply_on_processor(part: StepRows) -> Statistics | None:
    """As `apply_by_numpy`, by compiled code where there is one for such rows."""
    if part.column_norms is None and part.known_change is None and part.inputs is None:
        weight = sums.starting_rows(part.step, part.rows, part.stored)
        found = compiled.merged_rows(part.step, part.rows, weight, part.output, measured=part.measured)
        if found is not None and (not part.measured or is_in_range(found[:2])):
            statistics = Statistics(part.name)
            if part.measured:
                statistics.add_sums(found, part.output.size)
            return statistics
    return apply_by_numpy(part)


def apply_by_numpy(part: StepRows) -> Statistics | None:
    """Fill `part.output`. Returns the statistics of the change, empty where it is not measured; None of a replacement.

    Raises InputRefused for values that the dtype of the output cannot hold, and as `sums.sum_rows` does.
    """
    step, output = part.step, part.output
    weight = sums.starting_rows(step, part.rows, part.stored)
    if step.is_replacement:
        sums.round_into(output, weight)
        if step.token_rows is not None:
            step.token_rows.write_into(output, part.rows.start)
        refuse_overflow(part.name, weight, output)
        return None
    change, sum_buffer = scratch_arrays(part.scratch, output.shape, sums.sum_dtype(weight.dtype))
    total = output if output.dtype == sum_buffer.dtype else sum_buffer  # a sum that is not rounded is made in place
    norms, known = part.column_norms, None if part.known_change is None else part.known_change[part.rows]
    change = sums.sum_rows(step, part.rows, weight, total, column_norms=norms, change=change, known=known)
    sums.round_into(output, total)
    statistics = Statistics(part.name)
    if part.inputs is not None and output.dtype.itemsize == HALF:
        statistics.outputs = _feed_back(part.inputs, step, total, change, output)
    if not _is_below_largest(total, output.dtype):
        refuse_overflow(part.name, weight, output)
    if part.measured:
        statistics.add_block(weight, change, output, sum_buffer)
    return statistics


def _feed_back(
    inputs: LayerInputs, step: Step, total: NDArray[Any], change: NDArray[np.float32], output: NDArray[Any]
) -> NDArray[np.float64]:
    """Replace rounded values of 16 bits by their neighbours on the other side of the sum: see `calibrated`."""
    from lora_export.weights.calibrated_rounding import calibrated  # few merges know the inputs of layers

    nearest = output.astype(np.float32)
    ends = np.where(total > nearest, np.inf, -np.inf).astype(output.dtype)
    other = np.where(total == nearest, output, np.nextafter(output, ends))
    other = np.where(np.isfinite(other), other, output)
    values = (total.astype(np.float32), change, nearest, other.astype(np.float32))
    takes_other, found = calibrated(inputs, *values, is_transposed=step.spec.layout.is_transposed)
    np.copyto(output, other, where=takes_other)
    return found


def scratch_arrays(
    scratch: Bytes, shape: tuple[int, ...], sum_dtype: np.dtype[Any]
) -> tuple[NDArray[np.float32], NDArray[Any]]:
    """Memory for a change and for a sum of this shape, each in one half of the scratch buffer."""
    half, count = scratch.size // 2, math.prod(shape)
    change = scratch[: 4 * count].view(np.float32).reshape(shape)
    return change, scratch[half : half + sum_dtype.itemsize * count].view(sum_dtype).reshape(shape)


def _is_below_largest(total: NDArray[Any], dtype: np.dtype[Any]) -> bool:
    """Whether the norm of a sum shows that each of its entries is finite in a dtype. Faster than a look at each."""
    flat = total.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(flat @ flat < np.float64(ml_dtypes.finfo(dtype).max) ** 2)


def _are_finite(values: NDArray[Any]) -> bool:
    """Whether every value is finite. Of 16 bits, comparing the bits takes a ninth of the time of `isfinite`."""
    least = _INFINITY.get(values.dtype)
    if least is None or not values.size:
        return bool(np.isfinite(values).all())
    return bool((values.view(np.uint16) << 1).max() < least)


def refuse_overflow(name: str, before: NDArray[Any], after: NDArray[Any]) -> None:
    """Raise InputRefused where a value of `after` is not finite; the message depends on whether one was in `before`."""
    if str(after.dtype) not in FLOATS or _are_finite(after):
        return
    bad = before.size - np.count_nonzero(np.isfinite(before))
    if bad:
        raise InputRefused(f"{name}: the base holds {count_that_are(bad, 'value')} not finite")
    limit = float(ml_dtypes.finfo(after.dtype).max)
    beyond = after.size - np.count_nonzero(np.isfinite(after))
    raise InputRefused(
        f"{name}: {count(beyond, 'value')} would exceed {limit:g}, the largest "
        f"{after.dtype}. Check the adapter's scale, or use {named('dtype', 'float32')}"
    )


def squared_column_norms(
    step: Step, pieces: Sequence[slice], read: Callable[[slice], NDArray[Any]]
) -> NDArray[np.float64] | None:
    """‖·‖² of the outputs of W + ΔW where DoRA needs them and outputs are columns of the stored weight; else None.

    `read` returns the stored rows of a piece. Each piece is read once, by several threads. The result does not depend
    on their number.
    """
    if step.magnitude is None or not step.spec.layout.is_transposed:
        return None

    def norms_of(rows: slice) -> NDArray[np.float64]:
        weight = sums.starting_rows(step, rows, read(rows))
        total = np.empty(weight.shape, sums.sum_dtype(weight.dtype))
        with np.errstate(over="ignore", invalid="ignore"):  # the sums that are stored are checked
            sums.add_into(total, weight, sums.stored_delta(step, rows, weight))
            return sums.squared_norms(total.T)

    with ThreadPoolExecutor(block_copy.default_threads()) as pool:
        norms: NDArray[np.float64] = sum(pool.map(norms_of, pieces), start=np.zeros(len(step.magnitude)))
    return norms


def change_by_columns(
    step: Step, pieces: Sequence[slice], read: Callable[[slice], NDArray[Any]]
) -> MatrixOnDisk | None:
    """The change of a stored weight that follows from all of its rows together; None of any other.

    `read` returns the stored rows of a piece. Each piece is read once, into a temporary file of the size of the weight
    in fp32, in which one block of columns after the other becomes its change, or all of them at once.
    """
    changes = [(term.strength, term.pair) for term in step.stored_terms if term.pair.rows_together == TOGETHER]
    if not changes:
        return None
    from lora_export.storage.matrix_on_disk import MatrixOnDisk

    ((strength, pair),) = changes  # no other term is allowed beside it
    transform = cast("WeightTransform", pair)
    first = sums.starting_rows(step, pieces[0], read(pieces[0]))
    shape = pieces[-1].stop, math.prod(first.shape[1:])
    matrix = MatrixOnDisk(shape, sums.sum_dtype(first.dtype))

    def store(rows: slice) -> None:
        weight = sums.starting_rows(step, rows, read(rows))
        matrix.write_rows(rows, weight.reshape(len(weight), -1))

    def change(columns: slice) -> None:
        with np.errstate(over="ignore", invalid="ignore"):  # the sums that are stored are checked
            found = transform.change(matrix.columns(columns), columns=columns, strength=strength)
        matrix.write_columns(columns, found)

    with ThreadPoolExecutor(block_copy.default_threads()) as pool:
        list(pool.map(store, pieces))
        if transform.is_whole:
            matrix.write_rows(every := slice(0, shape[0]), transform.change(matrix[every], strength=strength))
        else:
            list(pool.map(change, matrix.column_blocks))
    return matrix


@dataclass(frozen=True)
class Backend:
    """Where weights are changed: on every core of the processor, or on a GPU (see `cuda.py`)."""

    apply: ApplyStep = apply_on_processor
    threads: int | None = None  # None: as many as `block_copy.transfer` chooses
    memory: Memory = block_copy.memory
    device: str = ""  # its name; empty for the processor

    @property
    def settings(self) -> dict[str, str]:
        """What a record of provenance contains of it."""
        arithmetic = "" if self.device else compiled.name()
        return {name: value for name, value in (("device", self.device), ("arithmetic", arithmetic)) if value}

    def transfer(
        self, source: Path, target_fd: int, blocks: Iterable[Block], hashes: RunningHashes, *, buffer_bytes: int
    ) -> Iterator[tuple[Block, Any]]:
        """As `block_copy.transfer`, with the threads and the memory of this backend."""
        return block_copy.transfer(
            source, target_fd, blocks, hashes, buffer_bytes=buffer_bytes, threads=self.threads, memory=self.memory
        )
