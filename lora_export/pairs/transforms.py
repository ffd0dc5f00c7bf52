"""Changes of a weight that follow from the weight itself: W' = T(W), as rotations and scales of its entries are.

A `WeightTransform` takes the place of a pair. It has no A and B: `change` computes T(W) - W from rows of the weight.
With a strength s the weight becomes W + s (T(W) - W), so that 0 leaves it as it is, and 1 is what was trained.

A kind of transform is lowered to `Stage`s, which are applied one after the other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.lora import EVERY_ROW, TOGETHER, LoraPair, Scaling, finite_fp32
from lora_export.pairs.stages import EntryWise, OfMatrix, Stage

_Array = NDArray[Any]
_Indices = NDArray[np.int64]


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
        """As of a stage. Where it is TOGETHER, each column changes by itself, unless it `is_whole`."""
        sizes = [stage.rows_together for stage in self.stages]
        return TOGETHER if TOGETHER in sizes else math.lcm(*sizes)

    def scaling(self, strength: float = 1.0) -> Scaling | None:
        first, *others = self._lowered()
        pair = first.factor if isinstance(first, EntryWise) and first.addend is None and not others else None
        if pair is None or pair.rank != 1:
            return None
        of_inputs = not (pair.a == 1).all()
        if of_inputs and not (pair.b == 1).all():
            return None
        values = pair.a.reshape(max(1, self.shape[1]), -1)[:, 0] if of_inputs else pair.b.reshape(-1)
        return Scaling(1 + np.float32(strength * self.scale * pair.scale) * values, of_inputs)

    @property
    def is_whole(self) -> bool:
        """Whether nothing of the weight changes by itself."""
        return any(isinstance(stage, OfMatrix) and stage.is_whole for stage in self.stages)

    def change(
        self,
        weight: _Array,
        rows: slice = EVERY_ROW,
        *,
        columns: slice = EVERY_ROW,
        strength: float = 1.0,
        out: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """`strength * scale * (T(W) - W)` of these rows or columns of a weight, which `weight` has, in fp32 or fp64.

        Computed in the dtype of the weight from fp32 factors, and returned in fp32, in `out` where that is given.
        """
        flat = weight.reshape(len(weight), -1)
        own = None if columns == EVERY_ROW else np.arange(columns.start, columns.stop)
        total = np.zeros_like(flat)
        for number, stage in enumerate(each.part(None, own) for each in self.stages):
            total += stage.change(flat + total if number else flat, rows)
        result = np.empty(weight.shape, np.float32) if out is None else out
        np.multiply(total.reshape(weight.shape), total.dtype.type(strength * self.scale), out=result, casting="unsafe")
        return result
