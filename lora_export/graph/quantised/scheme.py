"""How the integers and scales of a quantised weight are packed, and which entries share a scale."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.graph.quantised_weights import unpack_bits
from lora_export.lora import EVERY_ROW
from lora_export.storage import block_copy
from lora_export.storage.block_copy import Bytes
from lora_export.weights.quantised.codes import Numbers
from lora_export.weights.quantised.packed_numbers import pack


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
            return data.view(self.dtype).reshape(count, -1)[:, : self.width]
        if self.row_bits % 8 == 0:
            numbers = unpack_bits(data.reshape(count, -1), self.bits)[:, : self.width]
        else:
            first = rows.start * self.row_bits % 8 // self.bits
            numbers = unpack_bits(data, self.bits)[first : first + count * self.width].reshape(count, self.width)
        if self.dtype.kind == "i":
            half = np.uint8(1 << (self.bits - 1))
            return (numbers ^ half).view(np.int8) - half.view(np.int8)
        return numbers


@dataclass(frozen=True)
class IntegerCodes:
    """The integers of a packed tensor as codes: 0 is the lowest integer."""

    packed: PackedTensor

    @property
    def rows_together(self) -> int:
        return self.packed.aligned_rows

    def extent(self, rows: slice) -> tuple[int, int]:
        return self.packed.extent(rows)

    def unpack(self, rows: slice, packed: Bytes) -> Numbers:
        integers = self.packed.unpack(packed, rows)
        return integers if integers.dtype.kind == "u" else self._flipped(integers.view(f"u{integers.itemsize}"))

    def pack(self, codes: Numbers, packed: Bytes) -> None:
        integers = codes if self.packed.dtype.kind == "u" else self._flipped(codes)
        if self.packed.bits > 8:
            packed[:] = np.ascontiguousarray(integers).view(np.uint8).reshape(-1)
            return
        count = len(codes) if self.packed.row_bits % 8 == 0 else 1  # rows that begin with a byte, or one long row
        pack(integers.reshape(count, -1), self.packed.bits, packed.reshape(count, -1))

    def _flipped(self, codes: Numbers) -> Numbers:
        """With their highest bit flipped, signed integers are in the order of their values; and back."""
        flipped: Numbers = (codes ^ (1 << (self.packed.bits - 1))) & ((1 << self.packed.bits) - 1)
        return flipped


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

    def _sizes(self) -> list[int]:
        """The shape of the scales, where the axis is cut into blocks."""
        return [-(-size // self.block_size) if at == self.axis else size for at, size in enumerate(self.shape)]
