"""Changes of a weight that follow from the weight itself: W' = T(W), as rotations and scales of its entries are.

A `WeightTransform` takes the place of a pair. It has no A and B: `change` computes T(W) - W from rows of the weight.
With a strength s the weight becomes W + s (T(W) - W), so that 0 leaves it as it is, and 1 is what was trained.

A kind of transform is lowered to `Stage`s, which are applied one after the other. Each is written for the rows of a
matrix. Turned, it acts on the columns: (W R)ᵀ = Rᵀ Wᵀ. So a weight that is stored (in, out) needs no other code.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.lora import EVERY_ROW, LoraPair, finite_fp32

_Array = NDArray[Any]
_Indices = NDArray[np.int64]
TOGETHER = 0  # of `rows_together`
NO_CHANGE = 1e-6  # ‖T - I‖ up to which a product of reflections, computed in fp32, is the identity


@dataclass(frozen=True, eq=False)
class Stage:
    """One operation on a matrix. `turned`: it acts on columns as it is written for rows."""

    turned: bool = False

    def change(self, weight: _Array, rows: slice) -> _Array:
        """T(W) - W of these rows of the matrix, in the dtype of `weight`, which has them alone."""
        return self._along_columns(weight) if self.turned else self._along_rows(weight, rows)

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

    def _along_columns(self, weight: _Array) -> _Array:
        return self._along_rows(weight.T, EVERY_ROW).T

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


Lower = Callable[["WeightTransform", tuple[int, int]], Sequence[Stage]]


class WeightTransform(LoraPair):
    """A change of a weight that follows from the weight. Like every pair it is read-only.

    `stored` are the tensors of the file, and `settings` what the config states: from these alone `exact_transforms`
    computes T(W) a second time. `lower` makes the stages for a weight of a (out, in) shape, a kernel among the inputs.
    `whole` is the shape of the weight, (out, in, ...), with 0 where the file does not show it: see `for_weight`.
    `bias` is the transform of the layer's bias, (out,), where there is one.
    """

    stored: dict[str, NDArray[np.float32]]
    settings: Mapping[str, Any]
    lower: Lower
    whole: tuple[int, ...]
    rows: _Indices | None
    columns: _Indices | None
    is_turned: bool  # it is that of the transposed weight
    needs_weight = True

    def __init__(
        self,
        kind: str,
        stored: Mapping[str, _Array],
        lower: Lower,
        whole: tuple[int, ...],
        *,
        settings: Mapping[str, Any] | None = None,
        rank: int = 1,
        scale: float = 1.0,
        embedding: bool = False,
        bias: WeightTransform | None = None,
        rows: _Indices | None = None,
        columns: _Indices | None = None,
        is_turned: bool = False,
    ):
        tensors = {name: finite_fp32(name, value) for name, value in stored.items()}
        vars(self).update(own_kind=kind, stored=tensors, lower=lower, whole=whole, settings=dict(settings or {}))
        vars(self).update(
            own_rank=rank, scale=scale, embedding=embedding, own_bias=bias, magnitude=None, as_stored=False
        )
        vars(self).update(rows=rows, columns=columns, is_turned=is_turned)
        if not math.isfinite(scale):
            raise InputRefused(f"the scale is {scale}; it must be finite")

    def _with(self, **changed: Any) -> WeightTransform:
        names = ("settings", "scale", "embedding", "bias", "rows", "columns", "is_turned")
        fields = {name: getattr(self, name) for name in names} | {"rank": self.rank}
        kept = {name: changed.pop(name, getattr(self, name)) for name in ("kind", "stored", "lower", "whole")}
        return WeightTransform(**kept, **(fields | changed))

    def __repr__(self) -> str:
        return f"WeightTransform({self.kind}, {self.shape})"

    # --- what there is no A and B for ---

    @property
    def a(self) -> NDArray[np.float32]:
        raise InputRefused(f"{self.kind} has no A and B: its change of a weight follows from the weight. Merge it")

    @property
    def b(self) -> NDArray[np.float32]:
        return self.a

    def delta(
        self, rows: slice = EVERY_ROW, *, strength: float = 1.0, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        del rows, strength, out
        return self.a

    @property
    def norm(self) -> float:
        return math.nan

    @property
    def is_low_rank(self) -> bool:
        return False

    # --- LoraPair ---

    @property
    def kind(self) -> str:
        return str(vars(self)["own_kind"])

    @property
    def bias(self) -> WeightTransform | None:
        found: WeightTransform | None = vars(self)["own_bias"]
        return found

    @property
    def rank(self) -> int:
        return int(vars(self)["own_rank"])

    @property
    def parameters(self) -> int:
        own = sum(each.size for each in self.stored.values())
        return own + (0 if self.bias is None else self.bias.parameters)

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in, ...), with 0 where the file does not show it; (out,) of a bias."""
        sizes = [size if part is None else len(part) for size, part in zip(self.whole, self._parts, strict=False)]
        shape = (*sizes, *self.whole[2:])
        return shape[::-1] if self.is_turned else shape

    @property
    def _parts(self) -> tuple[_Indices | None, _Indices | None]:
        return self.rows, self.columns

    @property
    def is_identity(self) -> bool:
        is_neutral = self.scale == 0 or all(stage.is_identity for stage in self._lowered())
        return is_neutral and (self.bias is None or self.bias.is_identity)

    @functools.cached_property
    def transposed(self) -> WeightTransform:
        """The transform of the transposed weight, for `change` alone."""
        return self._with(is_turned=not self.is_turned)

    def part(self, rows: _Indices | None, columns: _Indices | None) -> WeightTransform:
        own = [
            old if new is None else new if old is None else old[new]
            for old, new in zip(self._parts, (rows, columns), strict=True)
        ]
        bias = None if self.bias is None else self.bias.part(rows, None)
        found = self._with(rows=own[0], columns=own[1], bias=bias)
        found._lowered()  # refuses what mixes these entries with others
        return found

    def times(self, weight: float) -> WeightTransform:
        bias = None if self.bias is None else self.bias.times(weight)
        return self._with(scale=weight * self.scale, bias=bias)

    def with_kernel(self, kernel: tuple[int, ...]) -> WeightTransform:
        del kernel  # `for_weight` finds it
        return self

    def for_weight(self, shape: tuple[int, ...]) -> WeightTransform:
        """The transform for a weight of this (out, in, ...) shape; itself where what is known of it does not fit.

        A kernel may be among the inputs of the file, or be one more axis there.
        """
        known = self.shape
        is_flat = len(known) == 2 < len(shape) and known[1] in (0, math.prod(shape[1:]))
        if (known == shape and 0 not in self.whole) or not (is_flat or len(known) == len(shape)):
            return self
        if any(size not in (0, own) for size, own in zip(known[: 1 if is_flat else None], shape, strict=False)):
            return self
        pairs = zip((*self.whole, 0), shape[:2], self._parts, strict=False)
        whole = [new if part is None else max(old, int(part.max()) + 1) for old, new, part in pairs]
        found = self._with(whole=(*whole, *shape[2:]))
        found._lowered()  # refuses what the kind cannot change
        return found

    # --- T(W) - W ---

    def _lowered(self) -> tuple[Stage, ...]:
        """The stages for the (out, in) view, of the part. What the file does not show of the shape counts as 1."""
        sizes = [max(1, size) for size in (*self.whole, 1)]
        for axis, part in enumerate(self._parts):
            if part is not None:
                sizes[axis] = max(sizes[axis], int(part.max()) + 1)
        if self.columns is not None and len(self.whole) > 2:
            raise InputRefused("a part of the inputs of a convolution is not supported")
        stages = self.lower(self, (sizes[0], math.prod(sizes[1:])))
        return tuple(stage.part(*self._parts) for stage in stages)

    @functools.cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The stages, in the orientation of the weight that `change` gets."""
        stages = self._lowered()
        return tuple(stage.transposed for stage in stages) if self.is_turned else stages

    @property
    def rows_together(self) -> int:
        sizes = [stage.rows_together for stage in self.stages]
        return TOGETHER if TOGETHER in sizes else math.lcm(*sizes)

    def change(
        self, weight: _Array, rows: slice = EVERY_ROW, *, strength: float = 1.0, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """`strength * scale * (T(W) - W)` of these rows of a weight, which `weight` has, in fp32 or fp64.

        Computed in the dtype of the weight from fp32 factors, and returned in fp32, in `out` where that is given.
        """
        flat = weight.reshape(len(weight), -1)
        total = np.zeros_like(flat)
        for number, stage in enumerate(self.stages):
            total += stage.change(flat + total if number else flat, rows)
        result = np.empty(weight.shape, np.float32) if out is None else out
        np.multiply(total.reshape(weight.shape), total.dtype.type(strength * self.scale), out=result, casting="unsafe")
        return result
