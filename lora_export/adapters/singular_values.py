"""Singular values and vectors: of a product of two factors, of a matrix, of a matrix of which blocks of rows are known.

With B = Q R and Aᵀ = P S (both reduced), B A = Q (R Sᵀ) Pᵀ, and R Sᵀ has only (rank, rank) entries. Its SVD gives that
of the product (Eckart and Young 1936: the first singular values and vectors are the best approximation).

Of blocks of rows, memory is one block and some columns, whatever the size of the matrix. Singular values come from a
randomised block Krylov method (Musco and Musco 2015, algorithm 2), which finds the best ones where many are nearly
equal, too; or, where many are needed, from the eigenvectors of the smaller Gram matrix. Both project the matrix on
orthonormal vectors, so the energy that they capture is measured, not estimated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import WrongUsage
from lora_export.options.spelling import named

OVERSAMPLING = 10  # columns beyond the rank, at least
CONVERGED = 1e-4  # part of the share that is captured which an iteration adds, at least
FIRST_RANK = 16  # that a search for a rank begins with
GRAM_FROM = 4  # a rank above 1/4 of the largest one is found faster by the Gram matrix
LEAST_OUTSIDE = 0.1  # length outside of a span of a unit vector that is a new direction, and no rounding
RowBlock = tuple[slice, NDArray[np.float32]]  # rows, and these rows of the matrix


@dataclass(frozen=True, eq=False)
class SingularValues:
    """U (out, k), s (k,) in falling order and Vᵀ (k, in) of a product or a difference, in fp64.

    `energy` is ‖·‖² of the whole matrix, of which these values may be a part.
    """

    u: NDArray[np.float64]
    s: NDArray[np.float64]
    vt: NDArray[np.float64]
    energy: float

    def captured(self, rank: int) -> float:
        """The share of ‖·‖² that the first `rank` singular values hold, 0 to 1; 1 of a zero matrix."""
        return float(min(1.0, np.sum(self.s[:rank] ** 2) / self.energy)) if self.energy else 1.0

    def rank_for(self, energy: float) -> int | None:
        """The least rank, 1 or more, that captures this share; None where these values do not reach it."""
        shares = np.cumsum(self.s**2)
        # A share that is reached up to the rounding of the sum counts: 1.0 of values that are all there.
        reached = np.flatnonzero(shares >= energy * self.energy * (1 - 1e-12))
        return int(reached[0]) + 1 if reached.size else None

    def factors(self, rank: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """A (rank, in) and B (out, rank) with B A the best approximation of this rank, in fp32.

        The singular values are shared: A has their roots, and B too. So neither is much smaller than the other.
        """
        roots = np.sqrt(self.s[:rank])
        return ((roots[:, None] * self.vt[:rank]).astype(np.float32), (self.u[:, :rank] * roots).astype(np.float32))


@dataclass(frozen=True)
class Truncation:
    """How many singular values are kept: a rank, or the fewest that hold a share of ‖ΔW‖², or that but at most a rank.

    Raises WrongUsage where neither is given.
    """

    rank: int | None = None
    energy: float | None = None  # above 0, at most 1

    def __post_init__(self) -> None:
        if self.rank is None and self.energy is None:
            raise WrongUsage(f"give {named('rank')}, or {named('energy')}: the share of each change that is kept")

    def rank_of(self, values: SingularValues) -> int:
        """The rank for a matrix of which all needed singular values are known."""
        least = None if self.energy is None else values.rank_for(self.energy)
        wanted = [len(values.s), *(rank for rank in (self.rank, least) if rank is not None)]
        return min(wanted)


def of_product(b: NDArray[np.float32], a: NDArray[np.float32], scale: float = 1.0) -> SingularValues:
    """The singular values and vectors of `scale * B @ A`, (out, rank) by (rank, in), in fp64."""
    q, r = np.linalg.qr(b.astype(np.float64))
    p, s = np.linalg.qr(a.astype(np.float64).T)
    u, values, vt = np.linalg.svd(scale * (r @ s.T), full_matrices=False)
    return SingularValues(q @ u, values, vt @ p.T, float(np.sum(values**2)))


def of_matrix(matrix: NDArray[np.floating]) -> SingularValues:
    """The singular values and vectors of a whole matrix, by LAPACK in its own precision."""
    u, values, vt = np.linalg.svd(matrix, full_matrices=False)
    s = values.astype(np.float64)
    return SingularValues(u, s, vt, float(np.sum(s**2)))


def of_kronecker(one: SingularValues, other: SingularValues, scale: float, truncation: Truncation) -> SingularValues:
    """The largest singular values and vectors of `scale * kron(w1, w2)` from those of both factors, exactly.

    The values are all products of one of each, and the vectors their Kronecker products.
    """
    values = abs(scale) * np.outer(one.s, other.s).ravel()
    count = len(values) if truncation.rank is None else min(truncation.rank, len(values))
    order = np.argsort(-values, kind="stable")[:count]
    i, j = np.divmod(order, len(other.s))
    u = np.einsum("ak,ck->ack", one.u[:, i], other.u[:, j]).reshape(-1, count) * np.sign(scale)
    vt = np.einsum("kb,kd->kbd", one.vt[i], other.vt[j]).reshape(count, -1)
    return SingularValues(u, values[order], vt, scale**2 * one.energy * other.energy)


class BlockedMatrix(ABC):
    """A matrix (rows, columns) of which blocks of rows are computed or read when they are needed."""

    shape: tuple[int, int]
    energy: float  # ‖·‖²

    @abstractmethod
    def blocks(self) -> Iterator[RowBlock]:
        """The blocks of rows that are not all zero, in fp32; the same ones each time."""

    # --- products ---

    def times(self, right: NDArray[np.float32]) -> NDArray[np.float32]:
        """(rows, columns) @ (columns, k)."""
        product = np.zeros((self.shape[0], right.shape[1]), np.float32)
        for rows, block in self.blocks():
            product[rows] = block @ right
        return product

    def transposed_times(self, left: NDArray[np.float32]) -> NDArray[np.float32]:
        """(columns, rows) @ (rows, k), summed over the blocks in fp64."""
        product = np.zeros((self.shape[1], left.shape[1]), np.float64)
        for rows, block in self.blocks():
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
            found = self._by_krylov(rank, width)
            reached = truncation.energy is None or found.rank_for(truncation.energy) or rank == largest
            if reached:
                return SingularValues(found.u[:, :largest], found.s[:largest], found.vt[:largest], self.energy)
            rank = min(2 * rank, largest)

    def _by_krylov(self, rank: int, width: int) -> SingularValues:
        """The largest singular values: the matrix, projected on the span of Q, (rows, width) more in each iteration.

        Ends where one more adds less than CONVERGED to what the first `rank` values hold.
        """
        generator = np.random.default_rng(0)
        q = _orthonormal(self.times(generator.standard_normal((self.shape[1], width), dtype=np.float32)))
        basis, projected = q, np.zeros((self.shape[1], 0), np.float32)  # Q, and the transpose of the matrix times Q
        held, before = 0.0, -1.0
        while held - before > CONVERGED * held:
            before, turned = held, self.transposed_times(q)
            projected = np.hstack([projected, turned])
            wide = projected.astype(np.float64)
            values, vectors = np.linalg.eigh(wide.T @ wide)
            held = float(np.sum(values[::-1][:rank]))
            if basis.shape[1] + width > min(self.shape):
                break
            q = self.times(_orthonormal(turned))
            q = _orthonormal(q - basis @ (basis.T @ q))
            # What rounding left of the first time may be inside of the span: next to nothing of that is left now.
            q = _orthonormal(q - basis @ (basis.T @ q), least=LEAST_OUTSIDE)
            basis = np.hstack([basis, q])
        best = vectors[:, ::-1][:, :width]
        own = basis[:, : len(best)]
        return _from_basis(own.astype(np.float64) @ best, wide @ best, self.energy)

    def _by_gram(self, rank: int) -> SingularValues:
        """All singular values up to a rank: eigenvectors of the Gram matrix of the smaller side, (n, n) in fp64."""
        is_wide = self.shape[0] < self.shape[1]
        gram = np.zeros((min(self.shape),) * 2)
        if is_wide:
            gram = self._row_gram()
        else:
            for _, block in self.blocks():
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
        for rows, block in self.blocks():
            for others, other in self.blocks():
                if others.start <= rows.start:
                    gram[rows, others] = block.astype(np.float64) @ other.astype(np.float64).T
        return gram


def _from_basis(basis: NDArray[np.float64], products: NDArray[np.float64], energy: float) -> SingularValues:
    """The singular values of a matrix D from orthonormal U (rows, k), the largest first, and Dᵀ U (columns, k)."""
    s = np.linalg.norm(products, axis=0)
    return SingularValues(basis, s, (products / np.where(s, s, 1)).T, energy)


def _orthonormal(matrix: NDArray[np.float32], *, least: float = 0) -> NDArray[np.float32]:
    """Orthonormal columns that span those of a tall matrix, but for directions below a millionth of the largest.

    Directions shorter than `least` are left out, too. There may be none.
    By the eigenvectors of the small Gram matrix, twice: the second time mends what rounding left of the first. LAPACK's
    QR took half of the time of an extraction.
    """
    columns = matrix.astype(np.float64)
    for _ in range(2):
        values, vectors = np.linalg.eigh(columns.T @ columns)
        found = values > max(values.max(initial=0) * 1e-12, least**2)
        columns = columns @ (vectors[:, found] / np.sqrt(values[found]))
    return columns.astype(np.float32)
