"""Pairs whose A and B are not what a file stores: Hadamard products (LoHa), Kronecker products (LoKr), whole changes.

Each is a `LoraPair`. Its A and B are made when they are needed, so that an adapter needs no more memory than its file.
Where their product has a faster form, `delta` uses that.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.isolation.limits import MAX_MEASURED
from lora_export.lora import EVERY_ROW, LoraPair, finite_fp32

PRODUCT_BLOCK = 1 << 22  # entries of a product that are computed at a time
_Indices = NDArray[np.int64]
_Factors = tuple[NDArray[np.float32], NDArray[np.float32]]


class StructuredPair(LoraPair):
    """A pair that is stored in another form. Like every pair it is read-only.

    `rows` and `columns` select a part of the whole product; None selects all. `settings` are what the form needs beside
    numbers that were trained, such as places and sizes. Raises InputRefused as LoraPair does.
    """

    stored: dict[str, NDArray[np.float32]]  # the factors, by their names
    shape_of_whole: tuple[int, ...]  # (out, in, ...)
    kernel: tuple[int, ...] | None  # the shape of the convolution's kernel, where the factors are matrices
    rows: _Indices | None
    columns: _Indices | None
    settings: Mapping[str, Any]
    is_structured = True

    def __init__(
        self,
        stored: Mapping[str, NDArray[Any]],
        scale: float,
        magnitude: NDArray[Any] | None = None,
        *,
        kernel: tuple[int, ...] | None = None,
        rows: _Indices | None = None,
        columns: _Indices | None = None,
        settings: Mapping[str, Any] = MappingProxyType({}),
    ):
        factors = {name: finite_fp32(name, value) for name, value in stored.items()}
        magnitude = None if magnitude is None else finite_fp32("magnitude", magnitude)
        vars(self).update(factors, stored=factors, scale=scale, magnitude=magnitude, embedding=False, as_stored=False)
        vars(self).update(kernel=kernel, rows=rows, columns=columns, settings=settings)
        vars(self).update(shape_of_whole=self._shape_of_whole())
        if not math.isfinite(scale):
            raise InputRefused(f"the scale is {scale}; it must be finite")
        if magnitude is not None and magnitude.shape != self.shape[:1]:
            raise InputRefused(f"the magnitude is {magnitude.shape}, the change is {self.shape}")

    # --- What each form defines ---

    def _shape_of_whole(self) -> tuple[int, ...]:
        """(out, in, ...) of the whole product. Raises InputRefused where the factors do not fit each other."""
        raise NotImplementedError

    def _factors(self) -> _Factors:
        """A and B of the whole product."""
        raise NotImplementedError

    def _product(self, rows: _Indices) -> NDArray[np.float32]:
        """These rows of the whole product, without the scale: (rows, in, ...)."""
        raise NotImplementedError

    # --- LoraPair ---

    @property
    def a(self) -> NDArray[np.float32]:
        a = self._factors()[0]
        a = a if self.columns is None else a[:, self.columns]
        return a if self.kernel is None else a.reshape(a.shape[0], -1, *self.kernel)

    @property
    def b(self) -> NDArray[np.float32]:
        b = self._factors()[1]
        b = b if self.rows is None else b[self.rows]
        dimensions = len(self.shape)
        return b.reshape(*b.shape[:2], *[1] * (dimensions - 2))

    @property
    def shape(self) -> tuple[int, ...]:
        out, columns, *rest = self.shape_of_whole
        out = out if self.rows is None else len(self.rows)
        columns = columns if self.columns is None else len(self.columns)
        if self.kernel is not None:
            return (out, columns * math.prod(rest) // math.prod(self.kernel), *self.kernel)
        return (out, columns, *rest)

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole product, and not a part of its rows or columns."""
        return self.rows is None and self.columns is None

    @property
    def parameters(self) -> int:
        return sum(each.size for each in self.stored.values()) + (0 if self.magnitude is None else self.magnitude.size)

    @property
    def is_identity(self) -> bool:
        return self.magnitude is None and (self.scale == 0 or not all(each.any() for each in self.stored.values()))

    @property
    def norm(self) -> float:
        total, rows = 0.0, max(1, PRODUCT_BLOCK // math.prod(self.shape[1:]))
        if math.prod(self.shape) > MAX_MEASURED:
            return math.nan
        for first in range(0, self.shape[0], rows):
            block = self.delta(slice(first, first + rows)).astype(np.float64)
            total += float(np.vdot(block, block))
        return math.sqrt(total)

    def part(self, rows: _Indices | None, columns: _Indices | None) -> LoraPair:
        if self.kernel and columns is not None:
            raise InputRefused("a part of the inputs of a convolution is not supported")
        own_rows = np.arange(self.shape_of_whole[0]) if self.rows is None else self.rows
        own_columns = np.arange(self.shape_of_whole[1]) if self.columns is None else self.columns
        return self._with(
            magnitude=self.magnitude if rows is None or self.magnitude is None else self.magnitude[rows],
            rows=self.rows if rows is None else own_rows[rows],
            columns=self.columns if columns is None else own_columns[columns],
        )

    def times(self, weight: float) -> LoraPair:
        return self._with(scale=weight * self.scale)

    def with_kernel(self, kernel: tuple[int, ...]) -> LoraPair:
        return self._with(kernel=kernel)

    def _with(self, **changed: Any) -> LoraPair:
        fields = {name: getattr(self, name) for name in ("scale", "magnitude", "kernel", "rows", "columns", "settings")}
        return type(self)(self.stored, **(fields | changed))

    def delta(
        self, rows: slice = EVERY_ROW, *, strength: float = 1.0, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        every_row = np.arange(self.shape_of_whole[0]) if self.rows is None else self.rows
        product = self._product(every_row[rows])
        product = product if self.columns is None else product[:, self.columns]
        product = product.reshape(len(product), *self.shape[1:])
        return np.multiply(product, np.float32(strength * self.scale), out=out)


class HadamardPair(StructuredPair):
    """(B1 A1) ∘ (B2 A2), entry by entry, as LoHa stores it (Hyeon-Woo et al. 2022, eq. 2).

    `stored` has a1 (rank 1, in, ...), b1 (out, rank 1), a2 (rank 2, in, ...) and b2 (out, rank 2). The rank of the
    product is at most rank 1 * rank 2: B is the row-wise Kronecker product of B1 and B2, A that of the columns.
    """

    a1: NDArray[np.float32]
    b1: NDArray[np.float32]
    a2: NDArray[np.float32]
    b2: NDArray[np.float32]

    def _shape_of_whole(self) -> tuple[int, ...]:
        shapes = [(self.b1.shape[0], *self.a1.shape[1:]), (self.b2.shape[0], *self.a2.shape[1:])]
        ranks = [(self.a1.shape[0], self.b1.shape[1:]), (self.a2.shape[0], self.b2.shape[1:])]
        if shapes[0] != shapes[1] or any(columns != (rank,) for rank, columns in ranks) or 0 in shapes[0]:
            text = ", ".join(f"{name} {value.shape}" for name, value in self.stored.items())
            raise InputRefused(f"the factors of a Hadamard product do not fit each other: {text}")
        return shapes[0]

    @property
    def rank(self) -> int:
        return int(self.a1.shape[0] * self.a2.shape[0])

    def factors_of_part(self) -> dict[str, NDArray[np.float32]]:
        """The factors for the rows and columns of this pair, by their names in `stored`."""
        rows = EVERY_ROW if self.rows is None else self.rows
        columns = EVERY_ROW if self.columns is None else self.columns
        own = {name: factor[rows] for name, factor in self.stored.items() if name.startswith("b")}
        return own | {name: factor[:, columns] for name, factor in self.stored.items() if name.startswith("a")}

    def _factors(self) -> _Factors:
        a = (self.a1[:, None] * self.a2[None]).reshape(-1, *self.a1.shape[1:])
        b = (self.b1[:, :, None] * self.b2[:, None, :]).reshape(len(self.b1), -1)
        return a, b

    def _product(self, rows: _Indices) -> NDArray[np.float32]:
        one = self.b1[rows] @ self.a1.reshape(self.a1.shape[0], -1)
        other = self.b2[rows] @ self.a2.reshape(self.a2.shape[0], -1)
        return (one * other).reshape(len(rows), *self.a1.shape[1:])


class KroneckerPair(StructuredPair):
    """kron(w1, w2), as LoKr stores it: w1 is (a, b) and w2 (c, d, ...); the product is (a c, b d, ...).

    `stored` has w1, or w1_a (a, rank) and w1_b (rank, b), whose product it is; and w2, or w2_a (c, rank) and w2_b
    (rank, d, ...). With t2 (rank, rank, ...), the core of a Tucker decomposition, w2_a is (rank, c) and w2_b (rank, d).
    """

    @functools.cached_property
    def w1(self) -> NDArray[np.float32]:
        return self._product_of_factor("w1")

    @functools.cached_property
    def w2(self) -> NDArray[np.float32]:
        return self._product_of_factor("w2")

    @property
    def decomposed_rank(self) -> int | None:
        """The rank of the factors that are decomposed; None where w1 and w2 are stored as wholes."""
        return next((len(self.stored[name]) for name in ("w1_b", "w2_b") if name in self.stored), None)

    def _shape_of_whole(self) -> tuple[int, ...]:
        w1, w2 = self._shape_of_factor("w1"), self._shape_of_factor("w2")
        if len(w1) != 2 or len(w2) < 2 or 0 in (*w1, *w2):
            raise InputRefused(f"the factors of a Kronecker product are {w1} and {w2}")
        (a, b), (c, d, *kernel) = w1, w2
        return (a * c, b * d, *kernel)

    def _shape_of_factor(self, name: str) -> tuple[int, ...]:
        if name in self.stored:
            return self.stored[name].shape
        up, down = self.stored[f"{name}_a"], self.stored[f"{name}_b"]
        if name == "w2" and "t2" in self.stored:
            return (up.shape[1], down.shape[1], *self.stored["t2"].shape[2:])
        return (up.shape[0], *down.shape[1:])

    def _product_of_factor(self, name: str) -> NDArray[np.float32]:
        if name in self.stored:
            return self.stored[name]
        up, down = self.stored[f"{name}_a"], self.stored[f"{name}_b"]
        product: NDArray[np.float32]
        if name == "w2" and "t2" in self.stored:
            product = np.einsum("pq...,po,qi->oi...", self.stored["t2"], up, down)
        else:
            product = (up @ down.reshape(len(down), -1)).reshape(self._shape_of_factor(name))
        return product

    @property
    def rank(self) -> int:
        return int(self._shape_of_factor("w1")[1] * self._shape_of_factor("w2")[0])

    @property
    def is_cheap(self) -> bool:
        """Whether x by w2, then by w1, costs less than x by the weight: c d b + a b c products to a b c d.

        Of a convolution, d counts the entries of the kernel, too.
        """
        (a, _), (_, *inner) = self._shape_of_factor("w1"), self._shape_of_factor("w2")
        d = math.prod(inner)
        return self.is_whole and self.magnitude is None and a + d < a * d

    @property
    def norm(self) -> float:
        if not self.is_whole:
            return super().norm
        return abs(self.scale) * self._norm_of_factor("w1") * self._norm_of_factor("w2")

    def _norm_of_factor(self, name: str) -> float:
        if name not in self.stored and math.prod(self._shape_of_factor(name)) > MAX_MEASURED:
            return math.nan
        return float(np.linalg.norm(self._product_of_factor(name).astype(np.float64)))

    def _factors(self) -> _Factors:
        (_, b), (c, *rest) = self.w1.shape, self.w2.shape
        # kron(w1, w2) = kron(w1, I) kron(I, w2). Each entry of the product is one product of two stored numbers.
        left = np.kron(self.w1, np.eye(c, dtype=np.float32))
        right = np.einsum("jk,c...->jck...", np.eye(b, dtype=np.float32), self.w2)  # (b, c, b, d, ...)
        return right.reshape(b * c, b * rest[0], *rest[1:]), left

    def _product(self, rows: _Indices) -> NDArray[np.float32]:
        outer, inner = np.divmod(rows, self.w2.shape[0])
        shape = (len(rows), *self.shape_of_whole[1:])
        product: NDArray[np.float32] = np.einsum("rb,r...->rb...", self.w1[outer], self.w2[inner])
        return product.reshape(shape)


class DensePair(StructuredPair):
    """A pair of full rank: A is the whole product, B the identity."""

    @property
    def rank(self) -> int:
        return int(self.shape_of_whole[0])

    def _factors(self) -> _Factors:
        return self._product(np.arange(self.rank)), np.eye(self.rank, dtype=np.float32)


class WholePair(DensePair):
    """A change of a weight that is stored as a whole: `stored` has change (out, in, ...)."""

    change: NDArray[np.float32]

    def _shape_of_whole(self) -> tuple[int, ...]:
        if self.change.ndim < 2 or 0 in self.change.shape:
            raise InputRefused(f"the change is {self.change.shape}; a matrix or the weight of a convolution is needed")
        return self.change.shape

    def _factors(self) -> _Factors:  # without a copy
        return self.change, np.eye(len(self.change), dtype=np.float32)

    def _product(self, rows: _Indices) -> NDArray[np.float32]:
        return self.change[rows]
