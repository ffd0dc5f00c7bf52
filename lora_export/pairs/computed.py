"""Pairs whose product follows from few trained numbers by a formula. It is computed when it is needed, row by row."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.lora import multiply, norm_of_product
from lora_export.pairs.structured import DensePair, StructuredPair

_Matrix = NDArray[np.float32]
_Indices = NDArray[np.int64]
RowChoice = _Indices | slice
PairFactors = tuple[_Matrix, _Matrix]  # A (rank, in) and some rows of B (out, rank)


class FactoredPair(StructuredPair):
    """B A of what is stored. `settings` has `shape` (rank, out, in), and `factors`: A, and chosen rows of B."""

    def _shape_of_whole(self) -> tuple[int, ...]:
        _, *shape = self.settings["shape"]
        return tuple(shape)

    @property
    def rank(self) -> int:
        return int(self.settings["shape"][0])

    @property
    def is_identity(self) -> bool:
        return self.scale == 0 or not self.a.any() or not self.b.any()

    @property
    def norm(self) -> float:
        return norm_of_product(self.scale, self.a, self.b)

    def _factors(self) -> PairFactors:
        return self._factors_of(slice(None))

    def _factors_of(self, rows: RowChoice) -> PairFactors:
        factors: Callable[[Mapping[str, _Matrix], RowChoice], PairFactors] = self.settings["factors"]
        return factors(self.stored, rows)

    def _product(self, rows: _Indices) -> _Matrix:
        a, b = self._factors_of(rows)
        product = np.empty((len(b), a.shape[1]), np.float32)
        multiply(np.ascontiguousarray(b), a, product)
        return product


class FourierPair(FactoredPair):
    """The real part of the inverse Fourier transform of few frequencies (Gao et al. 2024, eq. 4).

    `stored` has the coefficients c (n,), `settings` the `frequencies` (2, n) and `shape`. For A and B, the transform
    along the inputs is computed for the rows of frequencies that occur, U of them. That along the outputs is a matrix
    of cosines and sines, so that the rank is 2 U.
    """

    c: _Matrix
    is_made_whole = True

    @property
    def rank(self) -> int:
        return 2 * len(np.unique(self.settings["frequencies"][0]))

    def _shape_of_whole(self) -> tuple[int, ...]:
        return tuple(self.settings["shape"])

    def _factors_of(self, rows: RowChoice) -> PairFactors:
        out = self.shape_of_whole[0]
        vertical, lines = _lines(self)
        angles = np.outer(np.arange(out)[rows], vertical) % out * (2 * np.pi / out)
        b = np.concatenate([np.cos(angles), -np.sin(angles)], axis=1) / out
        return np.concatenate([lines.real, lines.imag]).astype(np.float32), b.astype(np.float32)

    def _product(self, rows: _Indices) -> _Matrix:
        with TRANSFORMING:
            return _inverse_transform(self)[rows]


TRANSFORMING = threading.Lock()  # threads that need rows of one transform share it


@functools.lru_cache(maxsize=1)
def _inverse_transform(pair: FourierPair) -> _Matrix:
    """All rows: a transform has none of its own. The last one is kept, since its rows are needed in turn."""
    vertical, lines = _lines(pair)
    spectrum = np.zeros(pair.shape_of_whole[::-1], np.complex64)  # of each input
    spectrum[:, vertical] = lines.T
    return np.ascontiguousarray(np.fft.ifft(spectrum).real.T)


def _lines(pair: FourierPair) -> tuple[_Indices, NDArray[Any]]:
    """The rows of frequencies that occur (U,), and their transforms along the inputs (U, in)."""
    vertical, position = np.unique(pair.settings["frequencies"][0], return_inverse=True)
    spectrum = np.zeros((len(vertical), pair.shape_of_whole[1]), np.float32)
    spectrum[position, pair.settings["frequencies"][1]] = pair.c
    return vertical, np.fft.ifft(spectrum)


class SparsePair(DensePair):
    """A change of few entries: `stored` has their values v (n,), `settings` their `places` (2, n) and `shape`."""

    v: _Matrix

    def _shape_of_whole(self) -> tuple[int, ...]:
        out, columns = self.settings["shape"]
        places = self.settings["places"]
        if places.shape != (2, *self.v.shape) or self.v.ndim != 1:
            raise InputRefused(f"{self.v.shape} values have places of the shape {places.shape}")
        if (places < 0).any() or (places >= np.array([[out], [columns]])).any():
            raise InputRefused(f"some of its places are outside of a weight {(out, columns)} (out, in)")
        if len(np.unique(places[0] * columns + places[1])) < len(self.v):
            raise InputRefused("two of its values have one place")
        return out, columns

    @property
    def norm(self) -> float:
        return abs(self.scale) * float(np.linalg.norm(self.v.astype(np.float64))) if self.is_whole else super().norm

    def _product(self, rows: _Indices) -> _Matrix:
        row_of, column_of, values = self._by_row
        first, last = (np.searchsorted(row_of, rows, side) for side in ("left", "right"))
        counts = last - first
        own = np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        product = np.zeros((len(rows), self.shape_of_whole[1]), np.float32)
        product[np.repeat(np.arange(len(rows)), counts), column_of[own]] = values[own]
        return product

    @functools.cached_property
    def _by_row(self) -> tuple[_Indices, _Indices, _Matrix]:
        """The entries by rows: these, the columns and the values."""
        order = np.argsort(self.settings["places"][0], kind="stable")
        row_of, column_of = self.settings["places"][:, order]
        return row_of, column_of, self.v[order]


def sparse_pair(values: NDArray[Any], places: _Indices, shape: tuple[int, ...], scale: float = 1.0) -> SparsePair:
    """The pair of these values at places (2, n); those of one place are added up."""
    one, position = np.unique(places[0] * shape[1] + places[1], return_inverse=True)
    summed = np.bincount(position, values.astype(np.float64), len(one))
    return SparsePair({"v": summed}, scale, settings={"places": np.stack(np.divmod(one, shape[1])), "shape": shape})


class CirculantPair(DensePair):
    """Blocks of circulant matrices (Chen et al. 2024): `stored` has w (block rows, block columns, size).

    Entry (k, s) of a block is its w[(s - k) mod size].
    """

    w: _Matrix

    def _shape_of_whole(self) -> tuple[int, ...]:
        if self.w.ndim != 3 or 0 in self.w.shape:
            raise InputRefused(f"the kernels of circulant blocks are {self.w.shape}; three dimensions are needed")
        return self.w.shape[0] * self.w.shape[2], self.w.shape[1] * self.w.shape[2]

    def _product(self, rows: _Indices) -> _Matrix:
        block, line = np.divmod(rows, self.w.shape[2])
        shifted = (np.arange(self.w.shape[2]) - line[:, None]) % self.w.shape[2]
        product: _Matrix = np.take_along_axis(self.w[block], shifted[:, None, :], axis=2).reshape(len(rows), -1)
        return product


class FlatKroneckerPair(DensePair):
    """What PEFT makes of LoKr's factors w1 (a, b) and w2 (c, d, kernel) for an nn.Conv1d.

    The Kronecker product of three axes aligns the kernel with the inputs of w1, and has the shape (c, a d, b kernel).
    Its entries in this order are those of the weight (a c, b d, kernel).
    """

    w1: _Matrix
    w2: _Matrix

    def _shape_of_whole(self) -> tuple[int, ...]:
        (a, b), (c, d, size) = self.w1.shape, self.w2.shape
        return a * c, b * d, size

    def _product(self, rows: _Indices) -> _Matrix:
        (a, b), (_, d, size) = self.w1.shape, self.w2.shape
        entries = rows[:, None] * (b * d * size) + np.arange(b * d * size)
        outer, rest = np.divmod(entries, a * d * b * size)
        line, column = np.divmod(rest, b * size)
        (p, j), (q, tap) = np.divmod(line, d), np.divmod(column, size)
        product: _Matrix = (self.w1[p, q] * self.w2[outer, j, tap]).reshape(len(rows), b * d, size)
        return product
