"""A weight in blocks of ggml that a step changes: each value against W + s·BA, and the gaps to its neighbours.

M is the nearest value that its code can have where V is within half the distance to the neighbour on its side, but for
the error bound of a sum in fp32, and what computing codes and values in fp32 rounds. Beyond the last code there is no
neighbour. In blocks with new scales V is nowhere beyond it: the largest number of a block has the last code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.storage.block_copy import Bytes
from lora_export.storage.file_pieces import read_piece
from lora_export.storage.gguf_blocks import CODECS
from lora_export.storage.gguf_file import GgufFile, GgufTensor
from lora_export.verification.against_checkpoint.block_scales import wrong_scales
from lora_export.verification.against_checkpoint.changed_weight import ChangedWeight, WeightRows
from lora_export.verification.against_checkpoint.fp64_sums import FP32_ROUNDOFF, Fp64Sum
from lora_export.verification.against_checkpoint.kept_numbers import half_distances
from lora_export.verification.parity import Wide

SUM_ROUNDINGS = 8  # in fp32 between a sum and its code, and between the code and its value
SMALLEST_HALF = float(np.finfo(np.float16).smallest_normal)  # below it, fp16 numbers have fewer bits
LAST_CODE = 127  # of Q8_0, in each block with a new scale


@dataclass(frozen=True, eq=False)
class StoredBlocks:
    """A tensor in blocks, or its rows from `first` on, in the base and in the candidate."""

    base_file: GgufFile
    base: GgufTensor
    candidate_file: GgufFile
    candidate: GgufTensor
    first: int = 0
    is_rescaled: bool = False  # in blocks of the base's type

    @property
    def has_new_scales(self) -> bool:
        return self.candidate.type != self.base.type

    def gaps(self, rows: slice, columns: int) -> tuple[Wide, Wide]:
        """Half the distance from each value of the candidate to the next smaller and to the next larger one.

        Both are (rows, columns). NaN: no sum has this value here.
        """
        codec, blocks = CODECS[self.candidate.type], self._blocks(self.candidate_file, self.candidate, rows, columns)
        codes, numbers = codec.codes_of(blocks), codec.numbers.astype(np.float64)
        steps, offsets = (
            None if each is None else np.repeat(each.astype(np.float64), codec.type.elements // each.shape[1], axis=1)
            for each in codec.scales(blocks)
        )
        assert steps is not None
        halves = half_distances(numbers)
        size, slack = np.abs(steps), np.abs(numbers[codes] * steps)
        slack += 0 if offsets is None else np.abs(offsets)
        below, above = (
            np.where(steps < 0, other[codes], own[codes]) * np.where(size, size, np.inf)
            for own, other in (halves, halves[::-1])
        )
        slack *= SUM_ROUNDINGS * FP32_ROUNDOFF
        if self.has_new_scales:
            below, above, more = self._of_new_scales(codes, size)
            slack += more
        else:
            old = codec.codes_of(self._blocks(self.base_file, self.base, rows, columns))
            is_same_value = (codes != old) & ((numbers[codes] == numbers[old]) | (size == 0))
            slack[is_same_value] = np.nan  # another code of the value that the base has there is no change of the sum
        shape = (rows.stop - rows.start, columns)
        return (below + slack).reshape(shape), (above + slack).reshape(shape)

    def wrong_scales(self, rows: slice, value: Wide, bound: Wide) -> int:
        """How many blocks of some rows have neither the base's scales nor the best ones for V; 0 where none are new."""
        if not self.is_rescaled:
            return 0
        codec, columns = CODECS[self.candidate.type], math.prod(value.shape[1:])
        base, blocks = (
            self._blocks(file, tensor, rows, columns)
            for file, tensor in ((self.base_file, self.base), (self.candidate_file, self.candidate))
        )
        return wrong_scales(codec, base, blocks, *(each.reshape(len(blocks), -1) for each in (value, bound)))

    @staticmethod
    def _of_new_scales(codes: NDArray[np.uint8], size: Wide) -> tuple[Wide, Wide, Wide]:
        """The gaps in blocks of Q8_0 with scales of their own, and what a scale below the normal numbers adds."""
        largest = np.abs(codes.astype(np.int16) - 128).max(axis=1, keepdims=True)
        is_small = size < SMALLEST_HALF
        half = np.where(is_small | (largest == LAST_CODE), size / 2, np.nan)
        return half, half, np.where(is_small, LAST_CODE * np.finfo(np.float16).smallest_subnormal, 0.0)

    def _blocks(self, file: GgufFile, tensor: GgufTensor, rows: slice, columns: int) -> Bytes:
        row_bytes = columns // tensor.type.elements * tensor.type.nbytes
        start = tensor.start + (self.first + rows.start) * row_bytes
        return bytes_at(file, start, (rows.stop - rows.start) * row_bytes).reshape(-1, tensor.type.nbytes)


def bytes_at(file: GgufFile, start: int, size: int) -> Bytes:
    """Some bytes of a file. Raises InputRefused where it became shorter."""
    found = np.empty(size, np.uint8)
    read_piece(file.path, found, start)
    return found


@dataclass(frozen=True, eq=False, kw_only=True)
class ChangedBlocks(ChangedWeight):
    """A weight that a step changes, whose candidate is in blocks."""

    stored_blocks: StoredBlocks

    @property
    def stored_as(self) -> str:
        return self.stored_blocks.candidate.type.name

    def blocks(self) -> Iterator[WeightRows]:
        """All rows, with the gaps around each value."""
        for one in super().blocks():
            columns = one.after.shape[-1]
            below, above = self.stored_blocks.gaps(one.rows, columns)
            gaps: tuple[Any, Any] = below.reshape(one.after.shape), above.reshape(one.after.shape)
            yield WeightRows(one.rows, one.before, one.after, one.stored, gaps, one.is_calibrated)

    def wrong_scales(self) -> int:
        """How many blocks have wrong scales. See `StoredBlocks.wrong_scales`."""
        if not self.stored_blocks.is_rescaled:
            return 0
        right = self.with_norms(Fp64Sum.right(self.step))
        return sum(self.stored_blocks.wrong_scales(rows, *right.rows(rows, self.before(rows))) for rows in self.pieces)
