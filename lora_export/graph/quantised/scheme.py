"""Quantised tensors: how integers are packed, which there are, and how scales follow from the weights.

The rules are those of onnxruntime's quantisers (`matmul_nbits_quantizer` and `quant_utils`): nearest integers, without
a search for better scales.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.graph.quantised_weights import unpack_bits
from lora_export.lora import EVERY_ROW
from lora_export.storage import block_copy
from lora_export.storage.block_copy import Bytes
from lora_export.weights.tensor_blocks import Patch


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """A stored tensor as rows of numbers, the lowest bits of a byte first."""

    tensor: ir.TensorProtocol
    dtype: np.dtype[Any]  # of a number in memory; of a number smaller than a byte, a byte
    bits: int  # of a number
    width: int  # numbers in a row
    row_bits: int  # the rows of NBits' zero points begin with whole bytes; other rows may begin within a byte

    def extent(self, rows: slice) -> tuple[int, int]:
        """The bytes [start, stop) that contain these rows."""
        return rows.start * self.row_bits // 8, -(-rows.stop * self.row_bits // 8)

    @property
    def aligned_rows(self) -> int:
        """The smallest number of rows that fills whole bytes."""
        return 8 // math.gcd(8, self.row_bits)

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    @functools.cached_property
    def inline_bytes(self) -> Bytes:
        """The bytes of a tensor that is stored in the graph."""
        return np.frombuffer(self.tensor.tobytes(), np.uint8)

    def read(self, rows: slice) -> NDArray[Any]:
        """These rows (rows, width). Reads only their bytes."""
        start, stop = self.extent(rows)
        if not isinstance(self.tensor, ir.ExternalTensor):
            return self.unpack(self.inline_bytes[start:stop], rows)
        data, path = np.empty(stop - start, np.uint8), Path(self.tensor.path)
        with path.open("rb") as file:
            block_copy.read(path, file.fileno(), data, (self.tensor.offset or 0) + start)
        return self.unpack(data, rows)

    def unpack(self, data: Bytes, rows: slice) -> NDArray[Any]:
        """The numbers of these rows, from the bytes of their extent."""
        count = rows.stop - rows.start
        if self.bits >= 8:
            return data.view(self.dtype).reshape(count, self.width)
        if self.row_bits % 8 == 0:
            numbers = unpack_bits(data.reshape(count, -1), self.bits)[:, : self.width]
        else:
            first = rows.start * self.row_bits % 8 // self.bits
            numbers = unpack_bits(data, self.bits)[first : first + count * self.width].reshape(count, self.width)
        if self.dtype.kind == "i":
            half = np.uint8(1 << (self.bits - 1))
            return (numbers ^ half).view(np.int8) - half.view(np.int8)
        return numbers

    def pack(self, numbers: NDArray[Any], before: Bytes) -> Bytes:
        """Rows that begin with a whole byte, as bytes. The padding of their last bytes is that of `before`."""
        if self.bits >= 8:
            return np.ascontiguousarray(numbers, self.dtype).view(np.uint8).reshape(-1)
        count = 8 // self.bits
        rows = numbers.astype(self.dtype).view(np.uint8) & np.uint8((1 << self.bits) - 1)
        rows = rows if self.row_bits % 8 == 0 else rows.reshape(1, -1)
        padded = unpack_bits(before.reshape(len(rows), -1), self.bits)
        padded[:, : rows.shape[1]] = rows
        shifted = padded.reshape(-1, count) << np.arange(0, 8, self.bits, dtype=np.uint8)
        packed: Bytes = np.bitwise_or.reduce(shifted, axis=1)
        return packed


@dataclass(frozen=True)
class Groups:
    """Which entries of a stored weight share a scale.

    A *band* is the smallest set of consecutive rows whose scales no other row uses. Scales are stored band after band.
    Where each row has scales of its own, a band is one row.
    """

    shape: tuple[int, ...]
    axis: int | None  # None: one scale for all
    block_size: int  # along the axis; 0: one scale for each position on the axis

    @property
    def band_rows(self) -> int:
        """Rows of one band."""
        if self.axis is None or (self.axis and not self.block_size):
            return self.shape[0]
        return 1 if self.axis else max(self.block_size, 1)

    @property
    def band_groups(self) -> int:
        """Groups of one band."""
        if self.axis is None:
            return 1
        if not self.block_size:
            return self.shape[self.axis] if self.axis else 1
        return math.prod(self._sizes()[1:])

    def bands(self, rows: slice) -> slice:
        """The bands that contain these rows."""
        return slice(rows.start // self.band_rows, -(-rows.stop // self.band_rows))

    def broadcast(self, parameters: NDArray[Any], rows: slice) -> NDArray[Any]:
        """Scales or zero points of the rows' bands (bands, groups), in a shape that broadcasts over the rows."""
        if self.axis is None:
            return parameters.reshape([1] * len(self.shape))
        if not self.block_size:
            return parameters.reshape([-1 if at == self.axis else 1 for at in range(len(self.shape))])
        parameters = parameters.reshape([-1, *self._sizes()[1:]])
        if self.axis:
            repeated = np.repeat(parameters, self.block_size, axis=self.axis)
            return repeated[(EVERY_ROW,) * self.axis + (slice(self.shape[self.axis]),)]
        if len(parameters) == 1:
            return parameters
        numbers = np.arange(rows.start, rows.stop) // self.block_size - rows.start // self.block_size
        by_row: NDArray[Any] = parameters[numbers]
        return by_row

    def reduce(self, function: np.ufunc, entries: NDArray[Any], rows: slice) -> NDArray[Any]:
        """Reduce each group's entries in these rows to one number: (bands, groups)."""
        if self.block_size:
            last = entries.shape[self.axis or 0]
            first = 0 if self.axis else -(rows.start % self.block_size)
            starts = np.maximum(np.arange(first, last, self.block_size), 0)
            entries = function.reduceat(entries, starts, axis=self.axis or 0)
            return entries.reshape(len(entries), -1)
        if self.axis == 0:
            return np.asarray(function.reduce(entries.reshape(len(entries), -1), axis=1))[:, None]
        others = tuple(at for at in range(entries.ndim) if at != self.axis)
        return np.asarray(function.reduce(entries, axis=others)).reshape(1, -1)

    def are_split_by(self, patch: Patch) -> bool:
        """Whether a patch ends in the middle of a group."""
        rows, columns = patch.rows, patch.columns
        ends_at_band = rows.stop % self.band_rows == 0 or rows.stop == self.shape[0]
        fits_rows = rows.start % self.band_rows == 0 and ends_at_band
        if columns == EVERY_ROW or (self.axis == 1 and not self.block_size) or (self.axis == 0 and self.block_size):
            return not fits_rows
        if self.axis != 1:
            return True
        ends_at_group = columns.stop % self.block_size == 0 or columns.stop == self.shape[1]
        return not (fits_rows and columns.start % self.block_size == 0 and ends_at_group)

    def _sizes(self) -> list[int]:
        """The shape of the scales, where the axis is cut into blocks."""
        return [-(-size // self.block_size) if at == self.axis else size for at, size in enumerate(self.shape)]


class Rule(StrEnum):
    """How scales follow from weights. All rules represent zero exactly."""

    # The entry of largest magnitude becomes the lowest integer, whatever its sign: half of the scales are negative.
    SIGNED_SCALE = "signed"
    SYMMETRIC = "symmetric"  # the range is equally wide on both sides of zero
    ASYMMETRIC = "asymmetric"  # the range is that of the weights, and the zero point is its position of zero


class ValueRange(NamedTuple):
    """The lowest and highest value of each group, zero included."""

    low: NDArray[np.float32]  # (bands, groups in a band)
    high: NDArray[np.float32]


class QuantParameters(NamedTuple):
    """Scales and zero points, as numbers to compute with."""

    scales: NDArray[np.float32]  # (bands, groups in a band)
    zeros: NDArray[np.float32]  # the same shape, or a scalar


@dataclass(frozen=True)
class Scheme:
    """The range of the integers, and the rule for scales and zero points."""

    lowest: int
    highest: int
    default_zero: int  # the zero point where none are stored
    rule: Rule
    scale_dtype: np.dtype[Any]
    zero_dtype: np.dtype[Any] | None  # a float zero point may be between two integers; None: none are stored
    scale_of_zeros: float  # the scale of a group of zeros

    def parameters(self, value_range: ValueRange) -> QuantParameters:
        """Scales and zero points for groups with this range. Both are rounded to their stored dtypes."""
        low, high = value_range
        if self.rule is Rule.SIGNED_SCALE:
            extent, steps = np.where(high > -low, high, low), (self.lowest - self.highest - 1) / 2
        elif self.rule is Rule.SYMMETRIC:
            extent, steps = np.maximum(high, -low), (self.highest - self.lowest) / 2
        else:
            extent, steps = high - low, self.highest - self.lowest
        scales = extent / np.float32(steps)
        stored: NDArray[np.float32] = scales.astype(self.scale_dtype).astype(np.float32)
        is_zero = stored == 0
        zeros = np.array(self.default_zero, np.float32)
        if self.rule is Rule.ASYMMETRIC and self.zero_dtype is not None:
            exact = np.where(is_zero, 0, self.lowest - low / np.where(is_zero, 1, stored))
            if self.zero_dtype.kind in "iu":
                exact = np.clip(np.rint(exact), self.lowest, self.highest)
            zeros = exact.astype(self.zero_dtype).astype(np.float32)
        stored[is_zero] = self.scale_of_zeros
        return QuantParameters(stored, zeros)

    def levels(self, weight: NDArray[np.float32], scales: NDArray[np.float32], zeros: NDArray[np.float32]) -> Any:
        """The nearest integers, as floats."""
        levels = weight / np.where(scales == 0, 1, scales)
        levels += zeros
        np.rint(levels, out=levels)
        return np.clip(levels, self.lowest, self.highest, out=levels)
