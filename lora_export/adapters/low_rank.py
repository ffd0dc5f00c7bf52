"""The best factors of lower rank for a product of two factors, without computing the product.

With B = Q R and Aᵀ = P S (both reduced), B A = Q (R Sᵀ) Pᵀ, and R Sᵀ has only (rank, rank) entries. Its SVD gives that
of the product (Eckart and Young 1936: the first singular values and vectors are the best approximation).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


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
        return (
            (roots[:, None] * self.vt[:rank]).astype(np.float32),
            (self.u[:, :rank] * roots).astype(np.float32),
        )


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
