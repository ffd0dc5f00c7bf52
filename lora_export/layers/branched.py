"""Layers with branches: what stands in a module's `forward` and behind its `.weight` while adapters are attached.

The `forward` of a linear layer, a convolution or an embedding computes `W x + strength * scale * B (A x)`, and
whoever reads `.weight` or `.in_proj_weight` directly, as nn.TransformerEncoderLayer's fast path and
nn.MultiheadAttention do, finds W + ΔW there. With DoRA both are multiplied by m / ‖W + strength * scale * B A‖,
which does not touch the bias; the norm takes no part in gradients (Liu et al. 2024, section 4.3).

A and B are kept in fp32 (fp64 beside fp64 weights) and a branch is computed in their dtype, as PEFT
does it; the result is rounded once to the layer's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor, nn

from lora_export.errors import InputRefused
from lora_export.layers.module_tensors import CONVOLUTIONS, conv1d, oriented
from lora_export.plan import Layout

STATE = "_lora_export"  # where an Attachment stands in the __dict__ of the module it belongs to
PARTS = ("lora_A", "lora_B", "lora_magnitude")  # what an owner's branches are made of
CONVOLVE = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}  # by the weight's dimensions


@dataclass(frozen=True)
class Branch:
    """One pair beside one weight."""

    adapter: str
    module: str  # the adapter's own name for the place
    weight: str  # the owner's attribute
    name: str  # of A in the owner's `lora_A`, of B in its `lora_B`, of DoRA's lengths in its `lora_magnitude`
    scale: float  # the pair's scale times the adapter's strength
    layout: Layout
    dora: bool


@dataclass(frozen=True)
class Whole:
    """A whole tensor that stands in the base's place. Without names: the base's own, but for some rows."""

    adapter: str
    tensor: str  # the adapter's own name for it
    attribute: str  # of the owner
    base: Tensor  # what stood there before


@dataclass
class Attachment:
    """All that `attach` did to one module, for `detach` to undo."""

    original: type[nn.Module]
    branches: tuple[Branch, ...] = ()
    wholes: tuple[Whole, ...] = ()
    factor: float = 1.0  # `strength` turns it


# The functions below look in the owner's dictionaries: an AttributeError inside a property would make
# nn.Module.__getattr__ answer with the base's tensor, and the adapter would be gone without a word.


def attachment_of(owner: nn.Module) -> Attachment:
    found: Attachment = owner.__dict__[STATE]
    return found


def attached_in(module: nn.Module) -> list[nn.Module]:
    owners = [owner for owner in module.modules() if STATE in owner.__dict__]
    if not owners:
        raise InputRefused("no adapter is attached to this module")
    return owners


def part_of(owner: nn.Module, part: str, branch: Branch) -> Tensor:
    found: Tensor = cast(nn.ParameterDict, owner._modules[part])[branch.name]
    return found


def factors_of(owner: nn.Module, branch: Branch) -> tuple[Tensor, Tensor]:
    """A (rank, in, ...) and B (out, rank, 1...)."""
    return part_of(owner, "lora_A", branch), part_of(owner, "lora_B", branch)


def adapted_weight(owner: nn.Module, attribute: str) -> Tensor | None:
    """W + ΔW, rescaled where DoRA asks for it, in A's dtype; rounded once to W's."""
    weight = owner._parameters[attribute]
    attachment = attachment_of(owner)
    branches = [branch for branch in attachment.branches if branch.weight == attribute]
    if weight is None or not branches or not attachment.factor:
        return weight
    total = _total(owner, weight, branches)  # (out, in, ...)
    for branch in branches:
        if branch.dora:
            total = total * spread(_length_factor(owner, branch, total), total.ndim)
    return oriented(total, branches[0].layout).to(weight.dtype)


def _total(owner: nn.Module, weight: Tensor, branches: Sequence[Branch]) -> Tensor:
    """W + ΔW in the (out, in, ...) view, in A's dtype."""
    changes = []
    for branch in branches:
        a, b = factors_of(owner, branch)
        product = b.flatten(1) @ a.flatten(1)
        changes.append(product.reshape(b.shape[0], *a.shape[1:]) * (attachment_of(owner).factor * branch.scale))
    change = sum(changes[1:], start=changes[0])
    total: Tensor = oriented(weight, branches[0].layout).to(change.dtype) + change
    return total


def _length_factor(owner: nn.Module, branch: Branch, total: Tensor) -> Tensor:
    """What DoRA multiplies each output by (out,): m / ‖W + ΔW‖, the norm a constant for gradients."""
    norm: Tensor = torch.linalg.vector_norm(total.detach().flatten(1), dim=1)
    return part_of(owner, "lora_magnitude", branch) / norm


def spread(outputs: Tensor, dimensions: int) -> Tensor:
    """A number for each output, so that it multiplies what has its outputs first of so many dimensions."""
    return outputs.reshape(-1, *[1] * (dimensions - 1))


def adapted_bias(owner: nn.Module) -> Tensor | None:
    bias, shift = owner._parameters["bias"], owner._buffers.get("lora_shift")
    factor = attachment_of(owner).factor
    if bias is None or shift is None or not factor:
        return bias
    return (bias.to(shift.dtype) + factor * shift).to(bias.dtype)


def _with_branches(
    owner: nn.Module,
    x: Tensor,
    layer: Callable[[Tensor | None], Tensor],
    pair: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    bias: Tensor | None = None,
    outputs: int = 1,
) -> Tensor:
    """`layer(bias) + Σ strength * scale * pair(x, A, B)`, in A's dtype; in the end the dtype of the layer again.

    With DoRA both are rescaled before the bias is added. `outputs` says at which dimension, from the last, they lie.
    """
    attachment = attachment_of(owner)
    if not attachment.factor or not attachment.branches:
        return layer(bias)
    dora = any(branch.dora for branch in attachment.branches)
    y = layer(None if dora else bias)
    total = y
    for branch in attachment.branches:
        a, b = factors_of(owner, branch)
        total = total + pair(x.to(a.dtype) if x.is_floating_point() else x, a, b) * (attachment.factor * branch.scale)
    if dora:
        (branch,) = attachment.branches  # a plan lets no other stand beside it
        weight = cast(Tensor, owner._parameters[branch.weight])
        factor = _length_factor(owner, branch, _total(owner, weight, [branch]))
        total = total * spread(factor, outputs)
        total = total if bias is None else total + spread(bias, outputs)
    return total.to(y.dtype)


class _AdaptedLayer(nn.Module):
    """For any layer with a weight: its own `forward` reads W + ΔW."""

    weight = property(lambda self: adapted_weight(self, "weight"))
    bias = property(adapted_bias)


class _LinearBranches(_AdaptedLayer):
    """For `nn.Linear.forward`."""

    # W is never touched: the reference that judges a merge must not share the merge's arithmetic.
    def forward(self, input: Tensor) -> Tensor:
        weight = cast(Tensor, self._parameters["weight"])
        return _with_branches(
            self,
            input,
            lambda bias: F.linear(input, weight, bias),
            lambda x, a, b: F.linear(F.linear(x, a), b),
            bias=self.bias,
        )


class _Conv1DBranches(_AdaptedLayer):
    """For the `forward` of transformers' Conv1D, whose weight is (in, out)."""

    def forward(self, x: Tensor) -> Tensor:
        weight = cast(Tensor, self._parameters["weight"])

        def layer(bias: Tensor | None) -> Tensor:
            rows = x.view(-1, x.size(-1))
            y = (
                torch.mm(rows, weight) if bias is None else torch.addmm(bias, rows, weight)
            )  # as Conv1D, to the last bit
            return y.view(*x.shape[:-1], weight.shape[1])

        return _with_branches(self, x, layer, lambda x, a, b: F.linear(F.linear(x, a), b), bias=self.bias)


class _ConvolutionBranches(_AdaptedLayer):
    """For the `forward` of nn.Conv1d, nn.Conv2d and nn.Conv3d: A is convolved as W is, B takes each place by itself."""

    def forward(self, input: Tensor) -> Tensor:
        weight = cast(Tensor, self._parameters["weight"])
        convolve = cast(Callable[[Tensor, Tensor, Tensor | None], Tensor], self._conv_forward)
        return _with_branches(
            self,
            input,
            lambda bias: convolve(input, weight, bias),
            lambda x, a, b: CONVOLVE[b.ndim](convolve(x, a, None), b),
            bias=self.bias,
            outputs=weight.ndim - 1,
        )


class _EmbeddingBranches(nn.Embedding):
    """For `nn.Embedding.forward`, which subclasses such as Gemma's call and scale: it stands between them and it."""

    def forward(self, input: Tensor) -> Tensor:
        weight = cast(Tensor, self._parameters["weight"])
        pad = self.padding_idx  # whose row gets no gradient
        return _with_branches(
            self,
            input,
            lambda _: F.embedding(input, weight, pad),
            lambda x, a, b: F.linear(F.embedding(x, a.T, pad), b),
        )


class _AdaptedAttention(nn.Module):
    """For nn.MultiheadAttention, which hands its weights to functions and has no layer to branch from."""

    in_proj_weight = property(lambda self: adapted_weight(self, "in_proj_weight"))
    q_proj_weight = property(lambda self: adapted_weight(self, "q_proj_weight"))
    k_proj_weight = property(lambda self: adapted_weight(self, "k_proj_weight"))
    v_proj_weight = property(lambda self: adapted_weight(self, "v_proj_weight"))


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}  # a layer's class -> its adapted subclass


def adapted_class(original: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a layer's own class, so that isinstance, other methods and hooks keep working."""
    if original not in _CLASSES:
        name = f"Lora{original.__name__}"
        if issubclass(original, nn.Embedding):
            bases = (_EmbeddingBranches,) if original is nn.Embedding else (original, _EmbeddingBranches)
            _CLASSES[original] = type(name, bases, {"weight": _AdaptedLayer.weight})
        else:
            _CLASSES[original] = type(name, (_behaviour(original), original), {})
    return _CLASSES[original]


def _behaviour(original: type[nn.Module]) -> type[nn.Module]:
    if issubclass(original, nn.MultiheadAttention):
        return _AdaptedAttention
    if original.forward is nn.Linear.forward:
        return _LinearBranches
    if any(original.forward is known.forward for known in conv1d()):
        return _Conv1DBranches
    if any(original.forward is known.forward for known in CONVOLUTIONS):
        return _ConvolutionBranches
    return _AdaptedLayer  # somebody's own forward: what it makes of its weight is its own affair
