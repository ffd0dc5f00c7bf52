"""The forward pass of layers that have adapters attached.

The `forward` of a linear layer, a convolution or an embedding computes `W x + factor * scale * B (A x)`. DoRA
multiplies it by m / ‖W + factor * scale * B A‖, but not the bias, and no gradient flows through the norm (Liu et al.
2024, section 4.3). As in PEFT, a branch is computed in the dtype of A and B, and the result is rounded once to the
dtype of the layer. Experts are slices of one stacked parameter (experts, ., .), which their module's own `forward`
reads: it gets W + ΔW, and computes those experts only that the router chose for a token.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor, nn

from lora_export.layers.activation import active_in
from lora_export.layers.attachments import (
    Branch,
    adapted_bias,
    adapted_weight,
    attachment_of,
    dora_factor,
    is_recording,
    low_rank_factors,
    pairs_of_experts,
    per_output,
    record_branch,
    trained_rows,
    weight_sum,
    where_on,
)
from lora_export.layers.frozen_experts import ExpertsWeight
from lora_export.layers.frozen_linear import (
    FourBitLayer,
    add_frozen_pair,
    has_four_bit_forward,
    is_plain,
    linear,
    linear_with_pair,
)
from lora_export.layers.module_tensors import CONVOLUTION_TYPES, conv1d
from lora_export.layers.torch_internals import own_parameters, subclass

CONVOLVE = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}  # by the weight's dimensions
# The parameter of `forward` that has the chosen experts of each token, in all classes of transformers.
CHOSEN_EXPERTS = ("top_k_index", "router_indices")
_Layer = Callable[[Tensor, Tensor | None], Tensor]  # of x and the bias
_Pair = Callable[[Tensor, Tensor, Tensor], Tensor]  # of x, A and B


def _forward_with_branches(
    owner: nn.Module, x: Tensor, layer: _Layer, pair: _Pair, bias: Tensor | None = None, output_axis: int = 1
) -> Tensor:
    """`layer(x, bias) + Σ factor * scale * pair(x, A, B)`, computed in the dtype of A and returned in the layer's.

    DoRA rescales both before the bias is added. `output_axis` is the axis of the outputs, counted from the last: 1
    is the last. In train mode, entries of the x of the pairs are dropped.
    """
    attachment = attachment_of(owner)
    if not attachment.factor or not attachment.branches:
        return layer(x, bias)
    if any(branch.dora for branch in attachment.branches):
        changed = _forward_with_dora(owner, x, layer, pair, bias, output_axis)
        return where_on(owner, attachment.branches[0], changed, layer(x, bias)) if attachment.is_on else changed
    y = layer(x, bias)
    total = y
    for branch in attachment.branches:
        active = active_in(x, branch.invocation) if branch.invocation else None
        if x.numel() if active is None else bool(active.any()):
            record_branch(branch)
        a, b = low_rank_factors(owner, branch)
        changed = total + pair(_pair_input(owner, x, a, branch), a, b) * (attachment.factor * branch.scale)
        changed = changed if active is None else torch.where(active, changed, total)
        total = where_on(owner, branch, changed, total)
    return total.to(y.dtype)


def _forward_with_dora(
    owner: nn.Module, x: Tensor, layer: _Layer, pair: _Pair, bias: Tensor | None, output_axis: int
) -> Tensor:
    attachment = attachment_of(owner)
    (branch,) = attachment.branches  # a plan allows no other branch beside DoRA's
    if x.numel():
        record_branch(branch)
    a, b = low_rank_factors(owner, branch)
    weight = cast(Tensor, own_parameters(owner)[branch.weight])
    factor = per_output(dora_factor(owner, branch, weight_sum(owner, weight, [branch])), output_axis)
    y, kept = layer(x, None), _pair_input(owner, x, a, branch)
    change = pair(kept, a, b) * (attachment.factor * branch.scale)
    if owner.training and attachment.dropout and x.is_floating_point():
        # As in PEFT: the share of W x in the change gets the dropped x, too.
        total = y + (factor - 1) * layer(kept.to(x.dtype), None) + factor * change
    else:
        total = (y + change) * factor
    return (total if bias is None else total + per_output(bias, output_axis)).to(y.dtype)


def _pair_input(owner: nn.Module, x: Tensor, a: Tensor, branch: Branch) -> Tensor:
    """The x of a pair: in the dtype of A, without dropped entries. Token ids as they are."""
    if not x.is_floating_point():
        return x
    wide = x.to(a.dtype)
    dropout = attachment_of(owner).dropout if owner.training and not branch.frozen else 0.0
    return F.dropout(wide, dropout) if dropout else wide


def _output_in_training(owner: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The output of a linear layer W (out, in) of which one pair is trained; None where more than this is computed."""
    attachment = attachment_of(owner)
    trained = [branch for branch in attachment.branches if not branch.frozen]
    if len(trained) != 1 or not attachment.factor or attachment.is_on or is_recording():
        return None
    a, b = low_rank_factors(owner, trained[0])
    if trained[0].dora or not is_plain(x, weight, a) or any(branch.invocation for branch in attachment.branches):
        return None
    dropout = attachment.dropout if owner.training else 0.0
    y = linear_with_pair(x, weight, bias, a, b, attachment.factor * trained[0].scale, dropout)
    for branch in attachment.branches:
        if branch.frozen:
            y = add_frozen_pair(y, x, *low_rank_factors(owner, branch), attachment.factor * branch.scale)
    return y


class _AdaptedLayer(nn.Module):
    """For any layer with a weight: its own `forward` reads W + ΔW."""

    weight = property(lambda self: adapted_weight(self, "weight"))
    bias = property(adapted_bias)


class _LinearBranches(_AdaptedLayer):
    """For `nn.Linear.forward`."""

    # W is never touched: the reference that judges a merge must not share the merge's arithmetic.
    def forward(self, input: Tensor) -> Tensor:
        weight, bias = cast(Tensor, own_parameters(self)["weight"]), self.bias
        if attachment_of(self).rows is None:
            return _linear_with_branches(self, input, weight, bias)
        rows, indices = trained_rows(self)

        def layer(x: Tensor, bias: Tensor | None) -> Tensor:
            y = F.linear(x, weight, bias)
            own = F.linear(x, rows.to(x.dtype), None if bias is None else bias[indices])
            return y.index_copy(-1, indices, own.to(y.dtype))

        return _forward_with_branches(self, input, layer, _linear_pair, bias)


def _linear_with_branches(owner: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if (trained := _output_in_training(owner, x, weight, bias)) is not None:
        return trained
    return _forward_with_branches(owner, x, lambda x, bias: linear(x, weight, bias), _linear_pair, bias)


def _linear_pair(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(F.linear(x, a), b)


class _FourBitBranches(nn.Module):
    """For `FourBitLayer.forward` and bitsandbytes' own. `.weight` stays the packed parameter, which they read."""

    bias = property(adapted_bias)

    def forward(self, input: Tensor) -> Tensor:
        return _linear_with_branches(self, input, cast(Tensor, own_parameters(self)["weight"]), self.bias)


class _Conv1DBranches(_AdaptedLayer):
    """For the `forward` of transformers' Conv1D, whose weight is (in, out)."""

    def forward(self, x: Tensor) -> Tensor:
        weight = cast(Tensor, own_parameters(self)["weight"])
        if (trained := _output_in_training(self, x, weight.T, self.bias)) is not None:
            return trained

        def layer(x: Tensor, bias: Tensor | None) -> Tensor:
            rows = x.view(-1, x.size(-1))
            # As in Conv1D, to the last bit.
            y = torch.mm(rows, weight) if bias is None else torch.addmm(bias, rows, weight)
            return y.view(*x.shape[:-1], weight.shape[1])

        return _forward_with_branches(self, x, layer, _linear_pair, self.bias)


class _ConvolutionBranches(_AdaptedLayer):
    """For the `forward` of nn.Conv1d, nn.Conv2d and nn.Conv3d. A is convolved as W is; B has a kernel of size 1."""

    def forward(self, input: Tensor) -> Tensor:
        weight = cast(Tensor, own_parameters(self)["weight"])
        convolve = cast(Callable[[Tensor, Tensor, Tensor | None], Tensor], self._conv_forward)

        def pair(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return CONVOLVE[b.ndim](convolve(x, a, None), b)

        return _forward_with_branches(
            self, input, lambda x, bias: convolve(x, weight, bias), pair, self.bias, weight.ndim - 1
        )


class _EmbeddingBranches(nn.Embedding):
    """For `nn.Embedding.forward`. Subclasses such as Gemma's, which scale its result, call this in its place."""

    def forward(self, input: Tensor) -> Tensor:
        weight = cast(Tensor, own_parameters(self)["weight"])
        pad = self.padding_idx  # whose row gets no gradient

        def layer(ids: Tensor, _: Tensor | None) -> Tensor:
            y = F.embedding(ids, weight, pad)
            return y if attachment_of(self).rows is None else _embedded_with_rows(self, ids, y)

        return _forward_with_branches(self, input, layer, lambda x, a, b: F.linear(F.embedding(x, a.T, pad), b))


def _embedded_with_rows(owner: nn.Embedding, ids: Tensor, y: Tensor) -> Tensor:
    """y (..., width) of the frozen table, with the trained rows in place of theirs."""
    rows, indices = trained_rows(owner)
    matches = ids[..., None] == indices  # (..., count)
    is_trained = matches.any(-1)
    if owner.padding_idx is not None:
        is_trained = is_trained & (ids != owner.padding_idx)
    own = F.embedding(matches.byte().argmax(-1), rows)
    return torch.where(is_trained[..., None], own.to(y.dtype), y)


class _AdaptedAttention(nn.Module):
    """For nn.MultiheadAttention. It passes its weights to functions, so that no layer's `forward` can add a branch."""

    in_proj_weight = property(lambda self: adapted_weight(self, "in_proj_weight"))
    q_proj_weight = property(lambda self: adapted_weight(self, "q_proj_weight"))
    k_proj_weight = property(lambda self: adapted_weight(self, "k_proj_weight"))
    v_proj_weight = property(lambda self: adapted_weight(self, "v_proj_weight"))


def adapted_class(original: type[nn.Module], *, whole: bool = False) -> type[nn.Module]:
    """A subclass of a layer's own class, so that isinstance, other methods and hooks keep working.

    With `whole`, the layer's own `forward` reads the changed weight: a change that follows from it has no branch.
    """
    name = f"{'Changed' if whole else 'Lora'}{original.__name__}"
    if whole and not issubclass(original, nn.MultiheadAttention):
        return subclass(name, (_AdaptedLayer, original))
    if not issubclass(original, nn.Embedding):
        return subclass(name, (_adapted_base(original), original))
    bases = (_EmbeddingBranches,) if original is nn.Embedding else (original, _EmbeddingBranches)
    return subclass(name, bases, {"weight": _AdaptedLayer.weight})


def has_own_branches(original: type[nn.Module]) -> bool:
    """Whether pairs of this class are branches beside W x. Otherwise its code reads W + ΔW."""
    return issubclass(original, nn.Embedding) or _adapted_base(original) not in (_AdaptedAttention, _AdaptedLayer)


def _adapted_base(original: type[nn.Module]) -> type[nn.Module]:
    if issubclass(original, nn.MultiheadAttention):
        return _AdaptedAttention
    if original.forward is nn.Linear.forward:
        return _LinearBranches
    if original.forward is FourBitLayer.forward or has_four_bit_forward(original):
        return _FourBitBranches
    if any(original.forward is known.forward for known in conv1d()):
        return _Conv1DBranches
    if any(original.forward is known.forward for known in CONVOLUTION_TYPES):
        return _ConvolutionBranches
    return _AdaptedLayer  # the layer has a `forward` of its own, which reads the adapted weight


# --- Experts ---


def adapted_experts_class(original: type[nn.Module], attributes: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of the class of experts. `attributes` are its stacked parameters."""
    properties = {name: property(functools.partial(_weight_in_forward, attribute=name)) for name in attributes}
    return subclass(f"Lora{original.__name__}", (_AdaptedExperts, original), properties)


# While a `forward` of experts runs, in its thread: W + ΔW, by module and attribute.
_SUMMED: ContextVar[dict[tuple[int, str], Tensor | None] | None] = ContextVar("_SUMMED", default=None)


def _weight_in_forward(owner: nn.Module, attribute: str) -> Tensor | None:
    """W + ΔW of all experts, summed once in a `forward`: one that loops over experts reads the weight for each."""
    summed, key = _SUMMED.get(), (id(owner), attribute)
    if summed is None:
        return adapted_weight(owner, attribute)
    if key not in summed:
        pairs, whole = pairs_of_experts(owner, attribute), functools.partial(adapted_weight, owner, attribute)
        if pairs is None:
            summed[key] = whole()
        else:  # whose first other use may be one without gradients
            summed[key] = ExpertsWeight.of(
                pairs, functools.cache(cast(Callable[[], Tensor], torch.enable_grad()(whole)))
            )
    return summed[key]


class _AdaptedExperts(nn.Module):
    """For the `forward` of a module with stacked parameters."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if is_recording():
            for branch in _computed(self, args, kwargs):
                record_branch(branch)
        before = _SUMMED.set({})
        try:
            return super().forward(*args, **kwargs)
        finally:
            _SUMMED.reset(before)


def _computed(owner: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Branch]:
    """The branches of the experts that get a token. Without chosen experts all of them do."""
    attachment = attachment_of(owner)
    forward: Callable[..., Any] = attachment.original.forward
    given = inspect.signature(forward).bind(owner, *args, **kwargs).arguments
    chosen = next((given[name] for name in CHOSEN_EXPERTS if isinstance(given.get(name), Tensor)), None)
    reached = None if chosen is None else set(chosen.unique().tolist())
    for branch in attachment.branches if attachment.factor else ():
        if reached is None or expert_of(branch, owner) in reached:
            yield branch


def expert_of(branch: Branch, owner: nn.Module) -> int:
    """The expert whose weight the branch changes."""
    region, weight = branch.region, own_parameters(owner)[branch.weight]
    assert region is not None and weight is not None
    return int(region.rows.start * weight.shape[0] // region.shape[0])
