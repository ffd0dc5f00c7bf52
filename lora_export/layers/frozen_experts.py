"""Experts with frozen weights in training, each with a pair: W x + B (A x) of the rows that the router gave to it.

W + ΔW of all experts is a pass over all weights, and its gradient another one, as long as the products themselves.
Not by oneDNN: it keeps code for each number of rows that it has met, and each expert has another one in each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_export.layers.torch_internals import grouped_products, tree_map, without_subclass_rules

# What may be read of W in place of W + ΔW
READ_OF_THE_BASE = {getattr(Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim")} | {
    Tensor.data_ptr,
    Tensor.size,
}


class ExpertPairs(NamedTuple):
    """One pair for each expert."""

    weight: Tensor  # (experts, out, in)
    a: Tensor  # (experts, rank, in)
    b: Tensor  # (experts, out, rank)
    scale: float

    def product(self, x: Tensor, ends: Tensor) -> Tensor:
        """x (rows, in), sorted by experts, to (rows, out). `ends` has the end of each expert's rows."""
        y: Tensor = _ExpertsProduct.apply(x, ends, *self)  # type: ignore[no-untyped-call]
        return y


class ExpertsWeight(Tensor):
    """A weight (experts, out, in) with pairs. Where it is no operand of PyTorch's product of experts, it is W + ΔW."""

    pairs: ExpertPairs
    whole: Callable[[], Tensor]
    is_turned: bool

    @classmethod
    def of(cls, pairs: ExpertPairs, whole: Callable[[], Tensor], *, is_turned: bool = False) -> ExpertsWeight:
        """`whole` returns W + ΔW. A turned weight is (experts, in, out)."""
        made = (pairs.weight.mT if is_turned else pairs.weight).detach().as_subclass(cls)
        made.pairs, made.whole, made.is_turned = pairs, whole, is_turned
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """`func` of W x + B (A x) where it is known, of W + ΔW elsewhere."""
        kwargs = kwargs or {}
        with without_subclass_rules():
            if func in READ_OF_THE_BASE:
                return func(*args, **kwargs)
            if func is Tensor.transpose and not kwargs and {axis % 3 for axis in args[1:]} == {1, 2}:
                one = cast(ExpertsWeight, args[0])
                return cls.of(one.pairs, one.whole, is_turned=not one.is_turned)
            if func is grouped_products() and _is_product_of_rows(args, kwargs):
                return args[1].pairs.product(args[0], kwargs["offs"])
            args, kwargs = tree_map(lambda value: value._summed() if isinstance(value, cls) else value, (args, kwargs))
            return func(*args, **kwargs)

    def _summed(self) -> Tensor:
        return self.whole().mT if self.is_turned else self.whole()


def _is_product_of_rows(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    if len(args) != 2 or not isinstance(args[1], ExpertsWeight) or isinstance(args[0], ExpertsWeight):
        return False
    given = {name for name, value in kwargs.items() if value is not None}
    if not args[1].is_turned or args[0].ndim != 2 or given != {"offs"}:
        return False
    return kwargs["offs"].dtype is torch.int32 and len(kwargs["offs"]) == len(args[1])  # PyTorch refuses others


class _ExpertsProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ends: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        y, inner = x.new_zeros(len(x), weight.shape[1]), x.new_zeros(len(x), a.shape[1])
        for expert, rows in _rows_of_experts(ends):
            inner[rows] = x[rows] @ a[expert].T
            torch.mm(x[rows], weight[expert].T, out=y[rows]).addmm_(inner[rows], b[expert].T, alpha=scale)
        ctx.save_for_backward(x, ends, inner, weight, a, b)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, ends, inner, weight, a, b = ctx.saved_tensors
        found_x, found_a, found_b = torch.zeros_like(x), torch.zeros_like(a), torch.zeros_like(b)
        for expert, rows in _rows_of_experts(ends):
            g = gradient[rows]
            through_b = (g @ b[expert]).mul_(ctx.scale)  # (rows, rank)
            found_a[expert] = through_b.T @ x[rows]
            found_b[expert] = (inner[rows].T @ g).T  # faster than gᵀ inner
            if ctx.needs_input_grad[0]:
                torch.mm(g, weight[expert], out=found_x[rows]).addmm_(through_b, a[expert])
        return found_x, None, None, found_a, found_b.mul_(ctx.scale), None


def _rows_of_experts(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, and which."""
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end
