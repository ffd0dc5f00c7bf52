"""Operations on a matrix, of which changes that follow from a weight are made, see `transforms`.

Each is written for the rows of a matrix. Turned, it acts on the columns: (W R)ᵀ = Rᵀ Wᵀ. So a weight that is stored
(in, out) needs no other code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.lora import EVERY_ROW, TOGETHER, LoraPair

_Array = NDArray[Any]
_Indices = NDArray[np.int64]
NO_CHANGE = 1e-6  # ‖T - I‖ up to which a product of reflections, computed in fp32, is the identity


@dataclass(frozen=True, eq=False)
class Stage:
    """One operation on a matrix. `turned`: it acts on columns as it is written for rows."""

    turned: bool = False

    def change(self, weight: _Array, rows: slice) -> _Array:
        """T(W) - W of these rows of the matrix, in the dtype of `weight`, which has them alone."""
        return self._along_rows(weight.T, EVERY_ROW).T if self.turned else self._along_rows(weight, rows)

    @property
    def transposed(self) -> Stage:
        """The stage of the transposed matrix."""
        return replace(self, turned=not self.turned)

    @property
    def rows_together(self) -> int:
        """How many rows are computed together, from a multiple of that on; TOGETHER for all of them."""
        return 1 if self.turned else self._together

    @property
    def is_identity(self) -> bool:
        raise NotImplementedError

    def part(self, rows: _Indices | None, columns: _Indices | None) -> Stage:
        """The stage for these rows and columns of the matrix. Raises InputRefused where it mixes them with others."""
        own = columns if self.turned else rows
        return self if own is None else self._part(own)

    @property
    def _together(self) -> int:
        return TOGETHER

    def _along_rows(self, weight: _Array, rows: slice) -> _Array:
        raise NotImplementedError

    def _part(self, _own: _Indices) -> Stage:
        raise InputRefused("it mixes all of them with each other: a part of the weight cannot be changed alone")


@dataclass(frozen=True, eq=False)
class EntryWise(Stage):
    """W + W ∘ F + D, entry by entry: F and D are products of pairs. It is never turned: its pairs are transposed."""

    factor: LoraPair | None = None
    addend: LoraPair | None = None

    def change(self, weight: _Array, rows: slice) -> _Array:
        total = np.zeros_like(weight)
        if self.factor is not None:
            total += weight * self.factor.delta(rows).reshape(weight.shape)
        if self.addend is not None:
            total += self.addend.delta(rows).reshape(weight.shape)
        return total

    @property
    def transposed(self) -> Stage:
        pairs = (None if pair is None else pair.transposed for pair in (self.factor, self.addend))
        return EntryWise(False, *pairs)

    @property
    def rows_together(self) -> int:
        return 1

    @property
    def is_identity(self) -> bool:
        return all(pair is None or pair.is_identity for pair in (self.factor, self.addend))

    def part(self, rows: _Indices | None, columns: _Indices | None) -> Stage:
        pairs = (None if pair is None else pair.part(rows, columns) for pair in (self.factor, self.addend))
        return EntryWise(False, *pairs)


@dataclass(frozen=True, eq=False, kw_only=True)
class Blocks(Stage):
    """Each block of rows times a matrix of its own: block i becomes L_i times itself. One matrix may serve all.

    `order` are the rows in the order in which they form blocks; None where that is their own.
    """

    less_identity: NDArray[np.float32]  # (blocks or 1, size, size): L_i - I
    order: _Indices | None = None

    @property
    def is_identity(self) -> bool:
        return not self.less_identity.any()

    @property
    def _size(self) -> int:
        return int(self.less_identity.shape[1])

    @property
    def _together(self) -> int:
        return self._size if self.order is None else TOGETHER

    def _along_rows(self, weight: _Array, rows: slice) -> _Array:
        matrices, ordered = self.less_identity, weight if self.order is None else weight[self.order]
        if len(matrices) > 1 and rows != EVERY_ROW:
            matrices = matrices[rows.start // self._size : rows.stop // self._size]
        product: _Array = np.matmul(matrices, ordered.reshape(-1, self._size, weight.shape[1])).reshape(weight.shape)
        if self.order is None:
            return product
        change: _Array = np.empty_like(product)
        change[self.order] = product
        return change

    def _part(self, own: _Indices) -> Stage:
        blocks = self._own(own)
        return self if len(self.less_identity) == 1 else replace(self, less_identity=self.less_identity[blocks])

    def _own(self, rows: _Indices) -> _Indices:
        """The numbers of the blocks that these rows are. Raises InputRefused where they are no whole blocks."""
        if self.order is not None or len(rows) % self._size:
            return super()._part(rows)  # type: ignore[return-value]
        blocks = rows.reshape(-1, self._size)
        if (blocks[:, 0] % self._size).any() or (blocks != blocks[:, :1] + np.arange(self._size)).any():
            super()._part(rows)
        return blocks[:, 0] // self._size


@dataclass(frozen=True, eq=False, kw_only=True)
class LowRank(Stage):
    """W + u (v W): what keeps all but a few directions of the columns, as reflections and projections do."""

    u: NDArray[np.float32]  # (rows, rank)
    v: NDArray[np.float32]  # (rank, rows)

    @property
    def is_identity(self) -> bool:
        gram = (self.u.T.astype(np.float64) @ self.u) * (self.v.astype(np.float64) @ self.v.T)
        return bool(abs(gram.sum()) <= NO_CHANGE**2 * len(self.u))

    def _along_rows(self, weight: _Array, rows: slice) -> _Array:
        del rows  # all of them
        change: _Array = self.u @ (self.v @ weight)
        return change


@dataclass(frozen=True, eq=False, kw_only=True)
class OfMatrix(Stage):
    """W + f(W), where f computes each column by itself; with `is_whole`, from all of them."""

    function: Callable[[_Array], _Array]
    is_neutral: bool = False
    is_whole: bool = False

    @property
    def is_identity(self) -> bool:
        return self.is_neutral

    @property
    def rows_together(self) -> int:
        return TOGETHER if self.is_whole else super().rows_together

    def part(self, rows: _Indices | None, columns: _Indices | None) -> Stage:
        if self.is_whole and not (rows is None and columns is None):
            self._part(np.zeros(0, np.int64))
        return super().part(rows, columns)

    def _along_rows(self, weight: _Array, rows: slice) -> _Array:
        del rows  # all of them
        return self.function(weight).astype(weight.dtype)


@dataclass(frozen=True, eq=False, kw_only=True)
class RowBlocks(Stage):
    """W + W_ij M_i + M_i for the square blocks W_ij of a matrix: those of one row of blocks share M_i."""

    matrices: NDArray[np.float32]  # (blocks of rows, size, size)

    @property
    def is_identity(self) -> bool:
        return not self.matrices.any()

    @property
    def rows_together(self) -> int:
        return int(self.matrices.shape[1])

    def _along_rows(self, weight: _Array, rows: slice) -> _Array:
        size = self.rows_together
        own = self.matrices if rows == EVERY_ROW else self.matrices[rows.start // size : rows.stop // size]
        blocks = weight.reshape(len(own), size, -1, size)  # (block of rows, row, block of columns, column)
        change: _Array = np.matmul(blocks, own[:, None]) + own[:, :, None]
        return change.reshape(weight.shape)

    def part(self, rows: _Indices | None, columns: _Indices | None) -> Stage:
        own, others = (columns, rows) if self.turned else (rows, columns)
        whole = Blocks(less_identity=self.matrices)
        if others is not None:
            whole._own(others)
        return self if own is None else replace(self, matrices=self.matrices[whole._own(own)])


def scales(change: NDArray[np.float32], shape: tuple[int, int], *, of_inputs: bool = False) -> EntryWise:
    """W + W ∘ change, with a number for each output of the weight (out, in), or for each input and all its kernel."""
    if of_inputs:
        a, b = np.repeat(change, max(1, shape[1] // len(change)))[None], np.ones((shape[0], 1), np.float32)
    else:
        a, b = np.ones((1, shape[1]), np.float32), change[:, None]
    return EntryWise(factor=LoraPair(a=a, b=b, scale=1.0))
