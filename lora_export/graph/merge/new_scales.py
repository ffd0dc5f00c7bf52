"""A changed weight with new scales, for onnxruntime's MatMulNBits.

The scheme is the symmetric one of onnxruntime's quantiser: an entry is (integer - half) * scale, and the entry of
largest magnitude of a block becomes the lowest integer, 0, whatever its sign. So half of the scales are negative.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lora_export.storage.block_copy import Block, Bytes, Work
from lora_export.storage.safetensors_file import Entry
from lora_export.weights import tensor_blocks
from lora_export.weights.apply_step import Backend, refuse_overflow
from lora_export.weights.merge_report import Statistics
from lora_export.weights.quantised.packed_numbers import pack
from lora_export.weights.tensor_blocks import OutputTensor


@dataclass(frozen=True, eq=False)
class NewScales(OutputTensor):
    """The integers of a weight (out, in) in blocks of its rows, or their scales. `source` has the old integers."""

    bits: int = field(kw_only=True)
    block_size: int = field(kw_only=True)
    scale_dtype: np.dtype[Any] = field(kw_only=True)
    is_scales: bool = field(kw_only=True)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in the output."""
        blocks = -(-self.source.shape[1] // self.block_size)
        return blocks * (self.scale_dtype.itemsize if self.is_scales else self.block_size * self.bits // 8)

    @property
    def nbytes(self) -> int:
        return self.source.rows * self.row_bytes

    @property
    def largest_row_bytes(self) -> int:
        return max(super().largest_row_bytes, self.row_bytes)

    def blocks(self, source: Path, read_fd: int, start: int, backend: Backend) -> Iterator[tuple[Block, bool]]:
        """The blocks of the tensor, which begins there in the output, and whether the statistics count each."""
        floats = Entry(self.name, self.dtype, self.source.shape, 0, math.prod(self.source.shape) * self.dtype.itemsize)
        found = list(tensor_blocks.changed_blocks(source, read_fd, self, floats, backend))
        rows = [slice(each.target_start // floats.row_bytes, each.target_stop // floats.row_bytes) for each in found]
        step = self.patches[0].step if len(self.patches) == 1 else None
        for block, own, measured in zip(found, rows, tensor_blocks.blocks_to_measure(step, rows), strict=True):
            assert block.work is not None
            work = functools.partial(self._encode, block.work, own, measured and not self.is_scales)
            first, last = (start + row * self.row_bytes for row in (own.start, own.stop))
            yield replace(block, target_start=first, target_stop=last, work=work), measured

    def _encode(
        self, change: Work, rows: slice, measured: bool, source: Bytes, target: Bytes, scratch: Bytes
    ) -> list[Statistics]:
        """Store what `change` makes of some rows, in fp32. Returns the statistics of what was stored."""
        count, columns = rows.stop - rows.start, self.source.shape[1]
        total = np.empty((count, columns), np.float32)
        change(source, total.reshape(-1).view(np.uint8), scratch)
        padded = np.pad(total, [(0, 0), (0, -columns % self.block_size)]).reshape(count, -1, self.block_size)
        low, high, half = padded.min(-1), padded.max(-1), 1 << (self.bits - 1)
        stored = (np.where(high > -low, high, low) / -half).astype(self.scale_dtype)
        refuse_overflow(self.name, total, stored)
        scales = stored.astype(np.float32)[..., None]
        padded /= np.where(scales, scales, 1)
        levels = np.clip(np.rint(padded, out=padded), -half, half - 1, out=padded)
        if self.is_scales:
            target[:] = stored.reshape(-1).view(np.uint8)
        else:
            pack((levels + half).astype(np.uint8).reshape(count, -1), self.bits, target.reshape(count, -1))
        if not measured:
            return []
        assert self.quantised is not None
        before, after = self.quantised.decode(rows, source), (levels * scales).reshape(count, -1)[:, :columns]
        found = []
        for patch in self.patches:
            inside, first = patch.within(rows), patch.rows.start - rows.start
            if inside is not None:
                here = slice(inside.start + first, inside.stop + first), patch.columns
                found.append(Statistics(patch.step.weight))
                found[-1].add_block(before[here], total[here] - before[here], after[here])
        return found
