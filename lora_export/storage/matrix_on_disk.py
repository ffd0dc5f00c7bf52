"""A matrix in a temporary file: written in blocks of rows or of columns, and read in both, in memory that is bounded.

The file is in Python's folder for temporary files (`TMPDIR`). It has no name on Linux and macOS, and is gone when the
matrix is.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import OutputFailed
from lora_export.storage import block_copy

COLUMNS_BYTES = 1 << 20  # of a block of columns


class MatrixOnDisk:
    """Rows and columns of one dtype, zero until they are written. Threads may read and write at once.

    The file holds one block of columns after the other. `column_blocks` are those in which columns are read and
    written. Raises OutputFailed where the folder has no place for it.
    """

    def __init__(self, shape: Sequence[int], dtype: Any):
        import tempfile  # imported here: few merges need it

        self.rows, columns = map(int, shape)
        self.dtype = np.dtype(dtype)
        width = max(1, COLUMNS_BYTES // (max(1, self.rows) * self.dtype.itemsize))
        self.column_blocks = [slice(first, min(columns, first + width)) for first in range(0, columns, width)]
        self._size = self.rows * columns * self.dtype.itemsize
        with self._named_folder():
            file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the matrix is
            weakref.finalize(self, file.close)
            file.truncate(self._size)
        self._descriptor, self._columns = file.fileno(), columns

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        """These rows, (rows, columns)."""
        found = np.empty((rows.stop - rows.start, self._columns), self.dtype)
        for columns in self.column_blocks:
            found[:, columns] = self._read(columns, rows)
        return found

    def write_rows(self, rows: slice, values: NDArray[Any]) -> None:
        for columns in self.column_blocks:
            self._write(columns, rows, values[:, columns])

    def columns(self, columns: slice) -> NDArray[Any]:
        """One of the blocks of columns, (rows, columns)."""
        return self._read(columns, slice(0, self.rows))

    def write_columns(self, columns: slice, values: NDArray[Any]) -> None:
        self._write(columns, slice(0, self.rows), values)

    def _position(self, columns: slice, rows: slice) -> int:
        width = columns.stop - columns.start
        return int((self.rows * columns.start + rows.start * width) * self.dtype.itemsize)

    def _read(self, columns: slice, rows: slice) -> NDArray[Any]:
        found = np.empty((rows.stop - rows.start, columns.stop - columns.start), self.dtype)
        position = self._position(columns, rows)
        block_copy.read(Path("a temporary file"), self._descriptor, found.reshape(-1).view(np.uint8), position)
        return found

    def _write(self, columns: slice, rows: slice, values: NDArray[Any]) -> None:
        data = np.ascontiguousarray(values, self.dtype).reshape(-1).view(np.uint8)
        with self._named_folder():
            block_copy.write(self._descriptor, data.data, self._position(columns, rows))

    @contextlib.contextmanager
    def _named_folder(self) -> Iterator[None]:
        """Name the folder of temporary files where it fails: the output is not to blame."""
        try:
            yield
        except OSError as error:
            raise OutputFailed(
                f"a temporary file of {self._size:,} bytes could not be written: {error.strerror or error}. TMPDIR "
                "names the folder of temporary files"
            ) from error
