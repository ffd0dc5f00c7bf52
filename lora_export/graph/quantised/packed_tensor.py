"""A stored tensor as rows of numbers of a few bits each."""

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
from lora_export.storage import block_copy
from lora_export.storage.block_copy import Bytes


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
