"""Matrices whose numbers are read piece by piece: in a file, in memory, quantised, or transposed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.graph.quantised_weights import QuantisedWeight
from lora_export.graph.site import Site
from lora_export.plan import Layout
from lora_export.storage import block_copy

Shape = tuple[int, int]
Positions = tuple[NDArray[np.int64], NDArray[np.int64]]  # row and column numbers


class Matrix(Protocol):
    """Numbers in rows and columns. Implementations differ in where the numbers are stored."""

    @property
    def shape(self) -> Shape: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def tile(self, rows: range, columns: range) -> NDArray[Any]: ...
    def at(self, positions: Positions) -> NDArray[Any]: ...


@dataclass(frozen=True, eq=False)
class FileMatrix:
    """A matrix in a file, row after row. Reads only the bytes that are requested."""

    path: Path
    start: int  # position of its first byte
    dtype: np.dtype[Any]
    shape: Shape

    def tile(self, rows: range, columns: range) -> NDArray[Any]:
        width = self.shape[1]
        if len(columns) == width:
            starts, length = [rows.start * width], len(rows) * width
        else:
            starts, length = [row * width + columns.start for row in rows], len(columns)
        return self._read(starts, length).reshape(len(rows), len(columns))

    def at(self, positions: Positions) -> NDArray[Any]:
        rows, columns = positions
        return self._read((rows * self.shape[1] + columns).tolist(), 1).reshape(-1)

    def _read(self, starts: Sequence[int], length: int) -> NDArray[Any]:
        """Read `length` numbers from each start, which counts numbers: (starts, length)."""
        size = self.dtype.itemsize
        data = np.empty((len(starts), length * size), np.uint8)
        with self.path.open("rb", buffering=0) as file:
            for row, start in zip(data, starts, strict=True):
                block_copy.read(self.path, file.fileno(), row, self.start + start * size)
        return data.view(self.dtype)


@dataclass(frozen=True, eq=False)
class MemoryMatrix:
    """A matrix that the graph holds in memory."""

    array: NDArray[Any]

    @property
    def shape(self) -> Shape:
        return self.array.shape[0], self.array.shape[1]

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    def tile(self, rows: range, columns: range) -> NDArray[Any]:
        return self.array[rows.start : rows.stop, columns.start : columns.stop]

    def at(self, positions: Positions) -> NDArray[Any]:
        return self.array[positions]


@dataclass(frozen=True, eq=False)
class DequantisedMatrix:
    """A quantised matrix, dequantised row by row."""

    quantised: QuantisedWeight

    @property
    def shape(self) -> Shape:
        return self.quantised.shape[0], self.quantised.shape[1]

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float32)

    def tile(self, rows: range, columns: range) -> NDArray[Any]:
        return self.quantised.rows(slice(rows.start, rows.stop))[:, columns.start : columns.stop]

    def at(self, positions: Positions) -> NDArray[Any]:
        rows, inverse = np.unique(positions[0], return_inverse=True)
        return self.quantised.rows(rows)[inverse, positions[1]]


@dataclass(frozen=True, eq=False)
class TransposedMatrix:
    """The transpose of another matrix."""

    inner: Matrix

    def simplified(self) -> Matrix:
        """The same numbers without a double transpose."""
        return self.inner.inner if isinstance(self.inner, TransposedMatrix) else self

    @property
    def shape(self) -> Shape:
        return self.inner.shape[::-1]

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.inner.dtype

    def tile(self, rows: range, columns: range) -> NDArray[Any]:
        return self.inner.tile(columns, rows).T

    def at(self, positions: Positions) -> NDArray[Any]:
        return self.inner.at(positions[::-1])


def matrix_of(site: Site) -> Matrix:
    """The weight of a linear layer as (out, in). Any other weight as its rows."""
    matrix: Matrix
    tensor = site.tensor
    if site.quantised is not None:
        matrix = DequantisedMatrix(site.quantised)
    elif isinstance(tensor, ir.ExternalTensor):
        path, offset, dtype = Path(tensor.path), tensor.offset or 0, tensor.dtype.numpy()
        before = (site.expert or 0) * math.prod(site.shape) * dtype.itemsize
        matrix = FileMatrix(path, offset + before, dtype, as_rows(site.shape))
    else:
        matrix = MemoryMatrix(site.array.reshape(as_rows(site.shape)))
    return TransposedMatrix(matrix) if site.layout is Layout.IN_OUT else matrix


def as_rows(shape: Sequence[int]) -> Shape:
    """The shape of a tensor as a matrix whose columns are all dimensions but the first."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)
