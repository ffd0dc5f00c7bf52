"""Linear layers with a frozen weight: in 4 bits, as bitsandbytes stores it, and with one trained pair beside it.

The weight of a `bitsandbytes.nn.Linear4bit` is a parameter of packed bytes: nf4 or fp4, with their scales quantised
again or not. Its `quant_state` has the shape, the scales and the table of values. Here it is read as floats, one layer
at a time. Nothing of bitsandbytes is imported: only a module that was built with it has such weights.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_export.errors import count
from lora_export.layers.products import product
from lora_export.layers.torch_internals import (
    exchange_class,
    own_parameters,
    reshaped_alone,
    subclass,
    without_subclass_rules,
)

DEQUANTISED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that bitsandbytes writes

State = Any  # bitsandbytes.functional.QuantState


def four_bit_linear() -> tuple[type[nn.Module], ...]:
    """The Linear4bit class of bitsandbytes, or nothing while bitsandbytes is not loaded."""
    loaded = sys.modules.get("bitsandbytes.nn.modules")
    return (loaded.Linear4bit,) if loaded else ()


def has_four_bit_forward(original: type[nn.Module]) -> bool:
    """Whether a class computes as bitsandbytes' Linear4bit does."""
    return any(original.forward is known.forward for known in four_bit_linear())


def state_of_4bit(weight: Tensor) -> State | None:
    """The shape, scales and table of a weight in 4 bits; None for any other tensor."""
    loaded = sys.modules.get("bitsandbytes.nn.modules")
    return getattr(weight, "quant_state", None) if loaded and isinstance(weight, loaded.Params4bit) else None


def is_4bit(weight: Tensor) -> bool:
    """Whether a tensor has packed numbers of 4 bits."""
    return state_of_4bit(weight) is not None


def float_shape(weight: Tensor) -> tuple[int, ...]:
    """The shape of a weight as floats."""
    state = state_of_4bit(weight)
    return tuple(weight.shape) if state is None else tuple(state.shape)


def float_weight(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of a weight in 4 bits, in this dtype. Any other tensor as it is."""
    return values_of(weight, state_of_4bit(weight), dtype)


def values_of(weight: Tensor, state: State | None, dtype: torch.dtype) -> Tensor:
    """As `float_weight`, of a weight whose state was kept apart: autograd may return it as a plain tensor."""
    if state is None:
        return weight
    if dtype not in DEQUANTISED_DTYPES:
        return values_of(weight, state, torch.float32).to(dtype)
    operators = torch.ops.bitsandbytes
    scales = state.absmax
    if state.nested:
        outer = state.state2
        scales = operators.dequantize_blockwise(scales, outer.absmax, outer.code, outer.blocksize, torch.float32)
        scales = scales + state.offset
    with without_subclass_rules():  # the result is no parameter of bitsandbytes
        packed = weight.detach().view(-1, 1)
        floats = operators.dequantize_4bit(packed, scales, state.blocksize, state.quant_type, state.shape, dtype)
    return cast(Tensor, floats)


def scales_of_4bit(weight: Tensor) -> Iterator[Tensor]:
    """The tensors that a weight in 4 bits has besides its packed numbers; none for any other tensor."""
    state = state_of_4bit(weight)
    if state is None:
        return
    yield from (state.absmax, state.code)
    if state.nested:
        yield from (state.offset, state.state2.absmax, state.state2.code)


# --- Layers ---


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, also for a weight in 4 bits: its floats exist during the product alone, and again in the backward."""
    if not is_4bit(weight):
        return F.linear(x, weight, bias)
    y: Tensor = _FourBitProduct.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y


def in_shape(y: Tensor, x: Tensor) -> Tensor:
    """The rows of y (rows, out) as (..., out), for an x (..., in). It counts as no view, so that models may change it.

    y must not be used afterwards.
    """
    return reshaped_alone(y, [*x.shape[:-1], y.shape[-1]])


class _FourBitProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        ctx.state = state_of_4bit(weight)
        ctx.save_for_backward(weight)
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        y = F.linear(rows, values_of(weight, ctx.state, dtype), None if bias is None else bias.to(dtype))
        return in_shape(y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """The gradients in the dtype of the product. Autograd casts each to that of its input."""
        (weight,) = ctx.saved_tensors
        of_x, _, of_bias = ctx.needs_input_grad
        found_x = found_bias = None
        if of_x:
            found_x = gradient @ values_of(weight, ctx.state, gradient.dtype)
        if of_bias:
            found_bias = gradient.flatten(0, -2).sum(0)
        return found_x, None, found_bias


class FourBitLayer(nn.Module):
    """For the `forward` of bitsandbytes' Linear4bit, in the dtype of its input or of autocast.

    bitsandbytes' own one rounds to bf16 in eval mode, on processors that have instructions for it.
    """

    def forward(self, input: Tensor) -> Tensor:
        """W x + bias, of a frozen W."""
        return linear(input, cast(Tensor, own_parameters(self)["weight"]), own_parameters(self).get("bias"))


def compute_in_input_dtype(module: nn.Module) -> None:
    """Let every Linear4bit below a module compute as `FourBitLayer`, in place."""
    for part in module.modules():
        original = type(part)
        if has_four_bit_forward(original):
            exchange_class(part, subclass(f"Frozen{original.__name__}", (FourBitLayer, original)))


def four_bit_layers(module: nn.Module) -> str:
    """The weights in 4 bits below a module, as `14 layers in 4 bits (nf4, double quantisation)`; empty without any."""
    states = [state for parameter in module.parameters() if (state := state_of_4bit(parameter)) is not None]
    kinds = sorted({state.quant_type + (", double quantisation" if state.nested else "") for state in states})
    return f"{count(len(states), 'layer')} in 4 bits ({'; '.join(kinds)})" if states else ""


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
        y = product(rows, values_of(weight, state, x.dtype).to(x.dtype), bias).addmm_(inner, b.T, alpha=scale)
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
            found_x = product(g, values_of(weight, ctx.state, g.dtype).to(g.dtype).T)
            found_x = (found_x.addmm_(through_b, a, alpha=ctx.scale) if ctx.is_one else found_x).view(ctx.shape)
        if of_kept:
            assert through_b is not None
            found_kept = (through_b @ a).mul_(ctx.scale).view(ctx.shape)
        if of_a:
            assert through_b is not None
            found_a = (through_b.T @ of_pair).mul_(ctx.scale)
        found_b = (inner.T @ g).mul_(ctx.scale).T if of_b else None  # faster than gᵀ inner, by a third
        return found_x, found_kept, None, g.sum(0) if of_bias else None, found_a, found_b, None
