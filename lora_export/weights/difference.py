"""The difference of one tensor between two checkpoints, in blocks of rows, and its largest singular values.

Memory is one block and a few columns, whatever the size of the tensor. A small difference is kept, and read once.
Singular values come from a randomised SVD (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1), or,
where many are needed, from the eigenvectors of the smaller Gram matrix. Both project the difference on orthonormal
vectors, so the energy that they capture is measured, not estimated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_export.adapters.low_rank import SingularValues, Truncation
from lora_export.errors import InputRefused
from lora_export.storage import block_copy
from lora_export.storage.safetensors_file import Entry, TensorFile

BLOCK_ENTRIES = 1 << 22  # of a difference in memory at once: 16 MiB in fp32
CACHED_ENTRIES = 1 << 25  # of a difference that is kept: 128 MiB in fp32
OVERSAMPLING = 10  # columns beyond the rank, at least
ITERATIONS = 2  # of the subspace: the share that is captured is then within a thousandth of the best one
FIRST_RANK = 16  # that a search for a rank begins with
GRAM_FROM = 4  # a rank above 1/4 of the largest one is found faster by the Gram matrix


class TensorInFile(NamedTuple):
    """One tensor in its file."""

    file: TensorFile
    name: str

    @property
    def entry(self) -> Entry:
        return self.file.entries[self.name]


def have_equal_bits(base: TensorInFile, tuned: TensorInFile) -> bool:
    """Whether two tensors of one shape have the same dtype and the same bits."""
    if base.entry.dtype != tuned.entry.dtype:
        return False
    return all(np.array_equal(_bits(old), _bits(new)) for _, old, new in _stored_rows(base, tuned))


@dataclass(eq=False)
class Difference:
    """`tuned - base` of one tensor, as a matrix (rows, columns) of its first dimension and all others.

    Raises InputRefused where a value of either is not finite.
    """

    base: TensorInFile
    tuned: TensorInFile
    energy: float = field(init=False)  # ‖·‖²
    is_equal: bool = field(init=False)  # whether both have the same bits

    def __post_init__(self) -> None:
        self._kept: list[tuple[slice, NDArray[np.float32]]] = []
        self.energy, self.is_equal = 0.0, True
        entry = self.base.entry
        self.shape = (entry.rows, math.prod(entry.shape[1:]))
        for rows, old, new in _stored_rows(self.base, self.tuned):
            if old.dtype == new.dtype and np.array_equal(_bits(old), _bits(new)):
                continue
            self.is_equal = False
            change = self._subtracted(old, new)
            self.energy += float(np.einsum("ij,ij->", change, change, dtype=np.float64))
            if math.prod(self.shape) <= CACHED_ENTRIES and change.any():
                self._kept.append((rows, change))

    def _subtracted(self, old: NDArray[np.generic], new: NDArray[np.generic]) -> NDArray[np.float32]:
        with np.errstate(over="ignore", invalid="ignore"):
            change: NDArray[np.float32] = np.subtract(_wide(new), _wide(old)).astype(np.float32)
        if not np.isfinite(change).all():
            where = "BASE" if not np.isfinite(_wide(old)).all() else "TUNED"
            raise InputRefused(
                f"{self.tuned.name}: {where} holds values that are not finite, or too far apart for float32"
            )
        return change

    def _blocks(self) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """The blocks of rows that are not all zero."""
        if self._kept:
            yield from self._kept
            return
        for rows, old, new in _stored_rows(self.base, self.tuned):
            if old.dtype != new.dtype or not np.array_equal(_bits(old), _bits(new)):
                yield rows, self._subtracted(old, new)

    # --- products ---

    def times(self, right: NDArray[np.float32]) -> NDArray[np.float32]:
        """(rows, columns) @ (columns, k)."""
        product = np.zeros((self.shape[0], right.shape[1]), np.float32)
        for rows, block in self._blocks():
            product[rows] = block @ right
        return product

    def transposed_times(self, left: NDArray[np.float32]) -> NDArray[np.float32]:
        """(columns, rows) @ (rows, k), summed over the blocks in fp64."""
        product = np.zeros((self.shape[1], left.shape[1]), np.float64)
        for rows, block in self._blocks():
            product += block.T @ left[rows]
        return product.astype(np.float32)

    # --- singular values ---

    def singular_values(self, truncation: Truncation) -> SingularValues:
        """As many of the largest singular values as a truncation needs."""
        full = min(self.shape)
        largest = min(truncation.rank or full, full)
        rank = largest if truncation.energy is None else min(FIRST_RANK, largest)
        while True:
            width = rank + max(OVERSAMPLING, rank // 4)
            if width * GRAM_FROM >= full:
                return self._by_gram(largest)
            found = self._by_random_projection(width)
            reached = truncation.energy is None or found.rank_for(truncation.energy) or rank == largest
            if reached:
                return SingularValues(found.u[:, :largest], found.s[:largest], found.vt[:largest], self.energy)
            rank = min(2 * rank, largest)

    def _by_random_projection(self, width: int) -> SingularValues:
        """The largest singular values: the difference, projected on the span of Q (rows, width)."""
        generator = np.random.default_rng(0)
        q = _orthonormal(self.times(generator.standard_normal((self.shape[1], width), dtype=np.float32)))
        for _ in range(ITERATIONS):
            q = _orthonormal(self.times(_orthonormal(self.transposed_times(q))))
        projected = self.transposed_times(q).astype(np.float64)  # (columns, width): Q times its transpose is the result
        _, vectors = np.linalg.eigh(projected.T @ projected)
        return _from_basis(q.astype(np.float64) @ vectors[:, ::-1], projected @ vectors[:, ::-1], self.energy)

    def _by_gram(self, rank: int) -> SingularValues:
        """All singular values up to a rank: eigenvectors of the Gram matrix of the smaller side, (n, n) in fp64."""
        is_wide = self.shape[0] < self.shape[1]
        gram = np.zeros((min(self.shape),) * 2)
        if is_wide:
            gram = self._row_gram()
        else:
            for _, block in self._blocks():
                gram += block.T.astype(np.float64) @ block.astype(np.float64)
        _, vectors = np.linalg.eigh(gram)
        basis = np.ascontiguousarray(vectors[:, ::-1][:, :rank])
        other = (self.transposed_times if is_wide else self.times)(basis.astype(np.float32)).astype(np.float64)
        if is_wide:
            return _from_basis(basis, other, self.energy)
        turned = _from_basis(basis, other, self.energy)
        return SingularValues(turned.vt.T, turned.s, turned.u.T, self.energy)

    def _row_gram(self) -> NDArray[np.float64]:
        """The lower triangle of D Dᵀ, which `eigh` reads. Each block of rows is multiplied by each one before it."""
        gram = np.zeros((self.shape[0],) * 2)
        for rows, block in self._blocks():
            for others, other in self._blocks():
                if others.start <= rows.start:
                    gram[rows, others] = block.astype(np.float64) @ other.astype(np.float64).T
        return gram


def _from_basis(basis: NDArray[np.float64], products: NDArray[np.float64], energy: float) -> SingularValues:
    """The singular values of a matrix D from orthonormal U (rows, k), the largest first, and Dᵀ U (columns, k)."""
    s = np.linalg.norm(products, axis=0)
    return SingularValues(basis, s, (products / np.where(s, s, 1)).T, energy)


_Rows = tuple[slice, NDArray[np.generic], NDArray[np.generic]]


def _stored_rows(base: TensorInFile, tuned: TensorInFile) -> Iterator[_Rows]:
    """Blocks of rows of a tensor in both files, (rows, columns)."""
    entry = base.entry
    step = max(1, BLOCK_ENTRIES // max(1, math.prod(entry.shape[1:])))
    with base.file.path.open("rb") as first, tuned.file.path.open("rb") as second:
        for start in range(0, entry.rows, step):
            rows = slice(start, min(start + step, entry.rows))
            yield rows, _rows(base, first.fileno(), rows), _rows(tuned, second.fileno(), rows)


def _rows(tensor: TensorInFile, fd: int, rows: slice) -> NDArray[np.generic]:
    """Some rows of a tensor, (rows, columns), from its file."""
    entry = tensor.entry
    stored = np.empty((rows.stop - rows.start) * entry.row_bytes, np.uint8)
    block_copy.read(tensor.file.path, fd, stored, entry.start + rows.start * entry.row_bytes)
    return stored.view(entry.dtype).reshape(rows.stop - rows.start, -1)


def _bits(array: NDArray[np.generic]) -> NDArray[np.uint8]:
    return array.view(np.uint8)


def _wide(array: NDArray[np.generic]) -> NDArray[np.floating]:
    """The values in fp32, or in fp64 where they are stored so."""
    return array.astype(np.float64 if array.dtype == np.float64 else np.float32)


def _orthonormal(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """Orthonormal columns that span those of a tall matrix, but for directions below a millionth of the largest.

    By the eigenvectors of the small Gram matrix, twice: the second time mends what rounding left of the first. LAPACK's
    QR took half of the time of an extraction.
    """
    columns = matrix.astype(np.float64)
    for _ in range(2):
        values, vectors = np.linalg.eigh(columns.T @ columns)
        found = values > values[-1] * 1e-12
        columns = columns @ (vectors[:, found] / np.sqrt(values[found]))
    return columns.astype(np.float32)
