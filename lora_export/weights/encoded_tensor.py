"""Quantised weights that are stored on new scales, a block of rows at a time."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.storage.block_copy import Block, Bytes, Work
from lora_export.storage.safetensors_file import Entry
from lora_export.weights.apply_step import Backend
from lora_export.weights.merge_report import Statistics
from lora_export.weights.tensor_blocks import OutputTensor, blocks_to_measure, changed_blocks, stored_rows

# What is stored of some rows, in fp32, where something needs it; and the sums of outputs (`OutputResult`), where known
WrittenRows = tuple[NDArray[np.float32] | None, NDArray[np.float64] | None]
# The packed bytes of some rows before, their sums in fp32, the bytes to fill, and whether the values are measured.
# Raises InputRefused for sums beyond the scales.
Encode = Callable[[Bytes, NDArray[np.float32], Bytes, bool], WrittenRows]
# The rows, their packed bytes before, the bytes to fill, and whether they are measured. Returns None where it fills
# nothing, and what has to be summed and encoded one after the other.
AtOnce = Callable[[slice, Bytes, Bytes, bool], list[Statistics] | None]


@dataclass(frozen=True, eq=False)
class EncodedTensor(OutputTensor):
    """A quantised weight, changed in fp32 (`dtype`) and stored on new scales: a graph's MatMulNBits, blocks of GGUF.

    The scales of a checkpoint's weight follow from all of its rows: see `kept_weights.rescaled`.
    """

    encode: Encode = field(kw_only=True)
    place: Callable[[int], int] = field(kw_only=True)  # a row -> the bytes before it in the output
    is_one: bool = field(default=False, kw_only=True)  # whether its parts are measured as one
    at_once: AtOnce = field(default=lambda *_: None, kw_only=True)

    @property
    def nbytes(self) -> int:
        return self.place(self.source.rows)

    @property
    def largest_row_bytes(self) -> int:
        return max(super().largest_row_bytes, self.place(1))

    def blocks_from(self, start: int, source: Path, read_fd: int, backend: Backend) -> Iterator[Block]:
        return (block for block, _ in self.blocks(source, read_fd, start, backend))

    def blocks(self, source: Path, read_fd: int, start: int, backend: Backend) -> Iterator[tuple[Block, bool]]:
        """The blocks of the tensor, which begins there in the output, and whether the statistics count each."""
        floats = Entry(self.name, self.dtype, self.source.shape, 0, math.prod(self.source.shape) * self.dtype.itemsize)
        found = list(changed_blocks(source, read_fd, self, floats, backend, may_measure=False))
        rows = [slice(each.target_start // floats.row_bytes, each.target_stop // floats.row_bytes) for each in found]
        step = self.step if self.is_one or len(self.patches) != 1 else self.patches[0].step
        for block, own, measured in zip(found, rows, blocks_to_measure(step, rows), strict=True):
            assert block.work is not None
            work = functools.partial(self._make, block.work, own, measured)
            first, last = start + self.place(own.start), start + self.place(own.stop)
            yield replace(block, target_start=first, target_stop=last, work=work), measured

    def _make(
        self, change: Work, rows: slice, measured: bool, source: Bytes, target: Bytes, scratch: Bytes
    ) -> list[Statistics]:
        """Store what `change` makes of some rows. Returns the statistics of what was stored."""
        done = self.at_once(rows, source, target, measured)
        if done is not None:
            return done
        total = np.empty(self.shape_of(rows), np.float32)
        change(source, total.reshape(-1).view(np.uint8), scratch)
        stored, outputs = self.encode(source, total, target, measured)
        if stored is None or not measured:
            return [] if outputs is None else [Statistics(self.name, outputs)]
        before, after = stored_rows(self, rows, source), stored.reshape(total.shape)
        parts: list[tuple[str, Any]] = [(self.name, ...)] if self.is_one else []
        for patch in () if self.is_one else self.patches:
            if (own := patch.within(rows)) is not None:
                first = patch.rows.start - rows.start
                parts.append((patch.step.weight, (slice(own.start + first, own.stop + first), patch.columns)))
        found = [Statistics(name, outputs) for name, _ in parts]
        for statistics, (_, here) in zip(found, parts, strict=True):
            statistics.add_block(before[here], total[here] - before[here], after[here])
        return found
