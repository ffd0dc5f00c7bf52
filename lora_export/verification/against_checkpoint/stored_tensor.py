"""A tensor in its file, read in pieces."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.storage import block_copy
from lora_export.storage.safetensors_file import Entry, TensorFile

PIECE_BYTES = 1 << 22  # of a tensor in fp64 that is compared at once


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in its file."""

    file: TensorFile
    entry: Entry

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.entry.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    def rows(self, rows: slice) -> NDArray[Any]:
        """Some rows, as they are stored; a scalar is one row. Raises InputRefused where the file became shorter."""
        start, count = self.entry.start + rows.start * self.entry.row_bytes, rows.stop - rows.start
        found = np.empty(count * self.entry.row_bytes, np.uint8)
        with self.file.path.open("rb") as file:
            block_copy.read(self.file.path, file.fileno(), found, start)
        return found.view(self.dtype).reshape(count, *self.shape[1:])

    def pieces(self) -> Iterator[slice]:
        """The rows, in pieces of PIECE_BYTES."""
        row_bytes = max(np.dtype(np.float64).itemsize * math.prod(self.shape[1:]), 1)
        count = max(1, PIECE_BYTES // row_bytes)
        for first in range(0, self.entry.rows, count):
            yield slice(first, min(first + count, self.entry.rows))
