"""A frozen linear layer with one trained pair beside it, as one step of autograd.

Composed of its parts, `W x + scale * (B A x)` takes four passes over the outputs and two over the gradient of x. Here
the pair's product is added into the output of W in place, and so is its share of the gradient. Saved are x and A x:
W x needs nothing saved, and B A x is not made. A W in 4 bits or in another dtype is converted again in the backward
pass: nothing of its size is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_export.layers.four_bit_weights import in_shape, is_4bit, state_of_4bit, values_of


def is_plain(x: Tensor, weight: Tensor, a: Tensor) -> bool:
    """Whether the step may be taken: a frozen W, something to train, and one dtype, of all or of autocast."""
    if not torch.is_grad_enabled() or weight.requires_grad or not a.requires_grad:
        return False
    if torch.is_autocast_enabled(x.device.type):  # which leaves fp64 as it is
        return x.dtype is not torch.float64 and x.is_floating_point()
    return x.dtype is a.dtype and (weight.dtype is a.dtype or is_4bit(weight))


def linear_with_pair(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """`x Wᵀ + bias + scale * x Aᵀ Bᵀ` for x (..., in), W (out, in), A (rank, in) and B (out, rank).

    `dropout` is the part of the x of the pair that is dropped. Under autocast all are computed in its dtype. A W in
    another one is converted again in the backward pass.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, a, b = x.to(dtype), a.to(dtype), b.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    kept = F.dropout(x, dropout) if dropout else None
    y: Tensor = _FrozenLinear.apply(x, kept, weight, bias, a, b, scale)  # type: ignore[no-untyped-call]
    return y


def add_frozen_pair(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`y + scale * x Aᵀ Bᵀ` in one pass over y (..., out), for an A and a B that are not trained. Saves nothing."""
    inner = F.linear(x.reshape(-1, x.shape[-1]), a)  # (rows, rank)
    return torch.addmm(y.reshape(-1, y.shape[-1]), inner, b.T, alpha=scale).view(y.shape)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kept: Tensor | None,  # the x of the pair, where that is another one
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        of_pair = rows if kept is None else kept.reshape(rows.shape)
        inner = of_pair @ a.T  # (rows, rank)
        state = state_of_4bit(weight)
        y = F.linear(rows, values_of(weight, state, x.dtype).to(x.dtype), bias).addmm_(inner, b.T, alpha=scale)
        ctx.save_for_backward(of_pair, inner, weight, a, b)
        ctx.scale, ctx.shape, ctx.state, ctx.is_one = scale, x.shape, state, kept is None
        return in_shape(y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        of_pair, inner, weight, a, b = ctx.saved_tensors
        of_x, of_kept, _, of_bias, of_a, of_b, _ = ctx.needs_input_grad
        g = gradient.reshape(-1, gradient.shape[-1])
        through_b = g @ b if of_x or of_kept or of_a else None  # (rows, rank)
        found_x = found_kept = found_a = None
        if of_x:
            assert through_b is not None
            found_x = g @ values_of(weight, ctx.state, g.dtype).to(g.dtype)
            found_x = (found_x.addmm_(through_b, a, alpha=ctx.scale) if ctx.is_one else found_x).view(ctx.shape)
        if of_kept:
            assert through_b is not None
            found_kept = (through_b @ a).mul_(ctx.scale).view(ctx.shape)
        if of_a:
            assert through_b is not None
            found_a = (through_b.T @ of_pair).mul_(ctx.scale)
        found_b = (inner.T @ g).mul_(ctx.scale).T if of_b else None  # faster than gᵀ inner, by a third
        return found_x, found_kept, None, g.sum(0) if of_bias else None, found_a, found_b, None
