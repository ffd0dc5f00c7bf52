"""Schemes of quantised weights: which integers there are, which entries share a scale, and how both lie in bytes.

The rules are those of onnxruntime's quantisers (`matmul_nbits_quantizer` and `quant_utils`): nearest integers, and no
search for better scales.
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

from lora_export.graph.quantised import layouts
from lora_export.lora import EVERY_ROW
from lora_export.storage import block_copy
from lora_export.storage.block_copy import Bytes
from lora_export.weights.tensor_blocks import Patch


class Rule(StrEnum):
    """How scales come from weights. In all of them zero is exact."""

    SIGNED = "signed"  # what is largest, whatever its sign, becomes the lowest integer: half of the scales are negative
    MIRRORED = "mirrored"  # the range is as wide on both sides of zero
    SHIFTED = "shifted"  # the range is what the weights have, and zero points say where in it zero is


class Reach(NamedTuple):
    """How far groups reach down and up, zero among what they hold."""

    low: NDArray[np.float32]  # (bands, groups in a row)
    high: NDArray[np.float32]


class Points(NamedTuple):
    """Scales and zero points, as they compute."""

    scales: NDArray[np.float32]  # (bands, groups in a row)
    zeros: NDArray[np.float32]  # the same, or a scalar


@dataclass(frozen=True)
class Scheme:
    """Which integers there are, and how scales come from weights."""

    lowest: int
    highest: int
    middle: int  # what zero is where no zero points say it
    rule: Rule
    scale_dtype: np.dtype[Any]
    zero_dtype: np.dtype[Any] | None  # floats may stand between the integers; None: there are none
    of_nothing: float  # the scale of zeros

    def points(self, ends: Reach) -> Points:
        """Scales and zero points for groups that reach so far."""
        low, high = ends
        if self.rule is Rule.SIGNED:
            reach, steps = np.where(high > -low, high, low), (self.lowest - self.highest - 1) / 2
        elif self.rule is Rule.MIRRORED:
            reach, steps = np.maximum(high, -low), (self.highest - self.lowest) / 2
        else:
            reach, steps = high - low, self.highest - self.lowest
        scales = reach / np.float32(steps)
        stored: NDArray[np.float32] = scales.astype(self.scale_dtype).astype(np.float32)
        idle = stored == 0
        zeros = np.array(self.middle, np.float32)
        if self.rule is Rule.SHIFTED and self.zero_dtype is not None:
            exact = np.where(idle, 0, self.lowest - low / np.where(idle, 1, stored))
            if self.zero_dtype.kind in "iu":
                exact = np.clip(np.rint(exact), self.lowest, self.highest)
            zeros = exact.astype(self.zero_dtype).astype(np.float32)
        stored[idle] = self.of_nothing
        return Points(stored, zeros)

    def levels(self, weight: NDArray[np.float32], scales: NDArray[np.float32], zeros: NDArray[np.float32]) -> Any:
        """The nearest integers; as floats."""
        levels = weight / np.where(scales == 0, 1, scales)
        levels += zeros
        np.rint(levels, out=levels)
        return np.clip(levels, self.lowest, self.highest, out=levels)


@dataclass(frozen=True)
class Groups:
    """Which entries of a stored weight share a scale.

    Rows that do are a *band*; scales are stored band after band. Where each row has scales of its own, a band is a row.
    """

    shape: tuple[int, ...]
    axis: int | None  # None: one scale for all
    size: int  # of a block along the axis; 0: a scale for each place on the axis

    @property
    def band(self) -> int:
        """Rows of one."""
        if self.axis is None or (self.axis and not self.size):
            return self.shape[0]
        return 1 if self.axis else max(self.size, 1)

    @property
    def width(self) -> int:
        """Scales of one band."""
        if self.axis is None:
            return 1
        if not self.size:
            return self.shape[self.axis] if self.axis else 1
        return math.prod(-(-size // self.size) if at == self.axis else size for at, size in enumerate(self.shape) if at)

    def bands(self, rows: slice) -> slice:
        """The bands that these rows lie in."""
        return slice(rows.start // self.band, -(-rows.stop // self.band))

    def spread(self, points: NDArray[Any], rows: slice) -> NDArray[Any]:
        """What belongs to the bands of these rows (bands, width), over the rows' entries, or so that it broadcasts."""
        if self.axis is None:
            return points.reshape([1] * len(self.shape))
        if not self.size:
            return points.reshape([-1 if at == self.axis else 1 for at in range(len(self.shape))])
        there = [-(-size // self.size) if at == self.axis else size for at, size in enumerate(self.shape)]
        points = points.reshape([-1, *there[1:]])
        if self.axis:
            spread = np.repeat(points, self.size, axis=self.axis)
            return spread[(EVERY_ROW,) * self.axis + (slice(self.shape[self.axis]),)]
        if len(points) == 1:
            return points
        own: NDArray[Any] = points[np.arange(rows.start, rows.stop) // self.size - rows.start // self.size]
        return own

    def reduced(self, by: np.ufunc, entries: NDArray[Any], rows: slice) -> NDArray[Any]:
        """Each group's part of these rows, reduced to one: (bands, width)."""
        if self.size:
            last = entries.shape[self.axis or 0]
            first = 0 if self.axis else -(rows.start % self.size)
            starts = np.maximum(np.arange(first, last, self.size), 0)
            entries = by.reduceat(entries, starts, axis=self.axis or 0)
            return entries.reshape(len(entries), -1)
        if self.axis == 0:
            return np.asarray(by.reduce(entries.reshape(len(entries), -1), axis=1))[:, None]
        others = tuple(at for at in range(entries.ndim) if at != self.axis)
        return np.asarray(by.reduce(entries, axis=others)).reshape(1, -1)

    def tears(self, patch: Patch) -> bool:
        """Whether a patch ends in the middle of a group."""
        rows, columns = patch.rows, patch.columns
        in_rows = rows.start % self.band == 0 and (rows.stop % self.band == 0 or rows.stop == self.shape[0])
        if columns == EVERY_ROW or (self.axis == 1 and not self.size) or (self.axis == 0 and self.size):
            return not in_rows
        ends = (self.axis == 1) and columns.start % self.size == 0
        return not (in_rows and ends and (columns.stop % self.size == 0 or columns.stop == self.shape[1]))


@dataclass(frozen=True, eq=False)
class Numbers:
    """A stored tensor as rows of numbers of so many bits, the lowest bits of a byte first."""

    tensor: ir.TensorProtocol
    dtype: np.dtype[Any]  # of a number in memory; of one that is smaller than a byte, the byte
    bits: int
    width: int  # numbers in a row
    row_bits: int  # in NBits' zero points rows begin with bytes; elsewhere they may begin within one

    def extent(self, rows: slice) -> tuple[int, int]:
        """The bytes in which these rows lie."""
        return rows.start * self.row_bits // 8, -(-rows.stop * self.row_bits // 8)

    @property
    def unit(self) -> int:
        """So many rows are whole bytes."""
        return 8 // math.gcd(8, self.row_bits)

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    @functools.cached_property
    def inside(self) -> Bytes:
        """The bytes of a tensor that the graph holds itself."""
        return np.frombuffer(self.tensor.tobytes(), np.uint8)

    def read(self, rows: slice) -> NDArray[Any]:
        """These rows (rows, width). Reads their bytes only."""
        start, stop = self.extent(rows)
        if not isinstance(self.tensor, ir.ExternalTensor):
            return self.unpacked(self.inside[start:stop], rows)
        held, path = np.empty(stop - start, np.uint8), Path(self.tensor.path)
        with path.open("rb") as file:
            block_copy.read(path, file.fileno(), held, (self.tensor.offset or 0) + start)
        return self.unpacked(held, rows)

    def unpacked(self, held: Bytes, rows: slice) -> NDArray[Any]:
        """The numbers of these rows, of the bytes in which they lie."""
        count = rows.stop - rows.start
        if self.bits >= 8:
            return held.view(self.dtype).reshape(count, self.width)
        if self.row_bits % 8 == 0:
            found = layouts.unpacked(held.reshape(count, -1), self.bits)[:, : self.width]
        else:
            first = rows.start * self.row_bits % 8 // self.bits
            found = layouts.unpacked(held, self.bits)[first : first + count * self.width].reshape(count, self.width)
        if self.dtype.kind == "i":
            half = np.uint8(1 << (self.bits - 1))
            return (found ^ half).view(np.int8) - half.view(np.int8)
        return found

    def packed(self, numbers: NDArray[Any], before: Bytes) -> Bytes:
        """Rows that begin with a byte, as bytes; what fills up their last bytes is as it was before."""
        if self.bits >= 8:
            return np.ascontiguousarray(numbers, self.dtype).view(np.uint8).reshape(-1)
        count = 8 // self.bits
        rows = numbers.astype(self.dtype).view(np.uint8) & np.uint8((1 << self.bits) - 1)
        rows = rows if self.row_bits % 8 == 0 else rows.reshape(1, -1)
        every = layouts.unpacked(before.reshape(len(rows), -1), self.bits)
        every[:, : rows.shape[1]] = rows
        apart = every.reshape(-1, count) << np.arange(0, 8, self.bits, dtype=np.uint8)
        joined: Bytes = np.bitwise_or.reduce(apart, axis=1)
        return joined
