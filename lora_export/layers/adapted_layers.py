"""The forward pass, `.weight` and `.bias` of layers that have adapters attached.

The `forward` of a linear layer, a convolution or an embedding computes `W x + factor * scale * B (A x)`. Code that
reads `.weight` or `.in_proj_weight` directly gets W + ΔW. The fast path of nn.TransformerEncoderLayer and
nn.MultiheadAttention do so. DoRA multiplies both by m / ‖W + factor * scale * B A‖. The bias is not multiplied, and
no gradient flows through the norm (Liu et al. 2024, section 4.3).

A and B are stored in fp32 (fp64 for fp64 weights). As in PEFT, a branch is computed in their dtype, and the result
is rounded once to the dtype of the layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor, nn

from lora_export.errors import InputRefused
from lora_export.layers.frozen_linear import (
    FourBitLayer,
    add_frozen_pair,
    float_weight,
    has_four_bit_forward,
    is_plain,
    linear,
    linear_with_pair,
)
from lora_export.layers.module_tensors import CONVOLUTION_TYPES, conv1d, is_in_shares, oriented
from lora_export.layers.torch_internals import own_buffers, own_modules, own_parameters, subclass
from lora_export.plan import Layout, StoredRegion

ATTACHMENT = "_lora_export"  # the key of an Attachment in the __dict__ of its module
BRANCH_PARTS = ("lora_A", "lora_B", "lora_magnitude")  # the nn.ParameterDicts that hold a layer's branches
TRAINED_ROWS, ROW_INDICES = "lora_rows", "lora_row_indices"  # of a table: a parameter, and a buffer of their indices
CONVOLVE = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}  # by the weight's dimensions


@dataclass(frozen=True)
class Branch:
    """One pair beside one weight."""

    adapter: str
    module: str  # the adapter's own name for the layer
    weight: str  # the attribute of the layer
    parameter: str  # the key of A in the layer's `lora_A`, of B in `lora_B`, of DoRA's magnitude in `lora_magnitude`
    scale: float  # the pair's scale times the adapter's strength
    layout: Layout
    dora: bool
    region: StoredRegion | None = field(default=None, compare=False)  # of the weight, where it changes a part alone
    frozen: bool = False  # not trained; its x is not dropped


@dataclass(frozen=True)
class ReplacedTensor:
    """A tensor that replaces one of the base. Without names, it is the base's own with some rows changed."""

    adapter: str
    name: str  # the adapter's own name for it
    attribute: str  # of the layer
    base: Tensor  # the tensor that it replaces


@dataclass(frozen=True)
class TrainedRows:
    """Rows of a table that are trained alone."""

    adapter: str
    name: str  # the adapter's own name for the table


@dataclass
class Attachment:
    """All that `attach` changed in one module, for `detach` to undo."""

    original: type[nn.Module]
    branches: tuple[Branch, ...] = ()
    replaced: tuple[ReplacedTensor, ...] = ()
    rows: TrainedRows | None = None
    factor: float = 1.0  # `scale_adapters` changes it
    dropout: float = 0.0  # of what A gets, in train mode


# The functions below read the owner's dictionaries. An AttributeError inside a property would make
# nn.Module.__getattr__ return the base's tensor, and the adapter would silently be missing.


def is_attached(owner: nn.Module) -> bool:
    """Whether `attach` has changed this one module."""
    return ATTACHMENT in owner.__dict__


def attachment_of(owner: nn.Module) -> Attachment:
    """The attachment of a module. Raises KeyError unless `is_attached`."""
    found: Attachment = owner.__dict__[ATTACHMENT]
    return found


def attached_modules(module: nn.Module) -> list[nn.Module]:
    """Every module below (and with) this one that has an attachment. Raises InputRefused where none has."""
    owners = [owner for owner in module.modules() if is_attached(owner)]
    if not owners:
        raise InputRefused("no adapter is attached to this module")
    return owners


def branch_parameter(owner: nn.Module, part: str, branch: Branch) -> Tensor:
    """The A, B or magnitude of a branch, by the `part` (see BRANCH_PARTS)."""
    found: Tensor = cast(nn.ParameterDict, own_modules(owner)[part])[branch.parameter]
    return found


def low_rank_factors(owner: nn.Module, branch: Branch) -> tuple[Tensor, Tensor]:
    """A (rank, in, ...) and B (out, rank, 1...)."""
    return branch_parameter(owner, "lora_A", branch), branch_parameter(owner, "lora_B", branch)


def branch_tensors(module: nn.Module) -> list[Tensor]:
    """The A, B and magnitudes of all branches below a module, trained or frozen."""
    parts = [own_modules(owner).get(part) for owner in attached_modules(module) for part in BRANCH_PARTS]
    return [parameter.data for part in parts if part is not None for parameter in part.parameters()]


def adapted_weight(owner: nn.Module, attribute: str) -> Tensor | None:
    """W + ΔW in the layout and dtype of W. Computed in the dtype of A, rescaled for DoRA, rounded once.

    Of a W in shares, the share: PyTorch reads it here, and nothing computes with it.
    """
    weight = own_parameters(owner)[attribute]
    if weight is not None and is_in_shares(weight):
        return weight
    attachment = attachment_of(owner)
    if weight is not None and attachment.rows is not None:  # never with branches
        rows, indices = _rows(owner)
        return weight.index_copy(0, indices, rows.to(weight.dtype))
    branches = [branch for branch in attachment.branches if branch.weight == attribute]
    if weight is None or not branches or not attachment.factor:
        return weight
    if branches[0].region is not None:
        return _sum_of_parts(owner, weight, branches).to(weight.dtype)
    total = _weight_sum(owner, weight, branches)  # (out, in, ...)
    for branch in branches:
        if branch.dora:
            total = total * per_output(_dora_factor(owner, branch, total), total.ndim)
    return oriented(total, branches[0].layout).to(weight.dtype)


def _sum_of_parts(owner: nn.Module, weight: Tensor, branches: Sequence[Branch]) -> Tensor:
    """W + ΔW in the dtype of A, in the shape of W. Each branch changes a part of W."""
    factor, dtype = attachment_of(owner).factor, low_rank_factors(owner, branches[0])[0].dtype
    total = weight.to(dtype).clone(memory_format=torch.contiguous_format)
    for branch in branches:
        assert branch.region is not None
        a, b = low_rank_factors(owner, branch)
        part_of(total, branch.region).add_(oriented(b @ a, branch.layout), alpha=factor * branch.scale)
    return total


def _rows(owner: nn.Module) -> tuple[Tensor, Tensor]:
    """The rows that are trained (count, width), and their indices (count,)."""
    rows, indices = own_parameters(owner)[TRAINED_ROWS], own_buffers(owner)[ROW_INDICES]
    assert rows is not None and indices is not None
    return rows, indices


def part_of(tensor: Tensor, region: StoredRegion) -> Tensor:
    """A view of a part of a contiguous tensor."""
    return tensor.view(region.shape)[region.rows, region.columns]


def _weight_sum(owner: nn.Module, weight: Tensor, branches: Sequence[Branch]) -> Tensor:
    """W + ΔW as (out, in, ...), in the dtype of A, before DoRA rescales it."""
    changes, factor = [], attachment_of(owner).factor
    for branch in branches:
        record_branch(branch)
        a, b = low_rank_factors(owner, branch)
        product = b.flatten(1) @ a.flatten(1)
        changes.append(product.reshape(b.shape[0], *a.shape[1:]) * (factor * branch.scale))
    change = sum(changes[1:], start=changes[0])
    total: Tensor = oriented(float_weight(weight, change.dtype), branches[0].layout).to(change.dtype) + change
    return total


def _dora_factor(owner: nn.Module, branch: Branch, total: Tensor) -> Tensor:
    """DoRA's factor for each output (out,): m / ‖W + ΔW‖. No gradient flows through the norm."""
    norm: Tensor = torch.linalg.vector_norm(total.detach().flatten(1), dim=1)
    return branch_parameter(owner, "lora_magnitude", branch) / norm


# Where a context asks for it, the branches that are computed. A proof must know which pairs its inputs reach.
_RECORDED: ContextVar[set[Branch] | None] = ContextVar("_RECORDED", default=None)


@contextlib.contextmanager
def recorded_branches() -> Iterator[set[Branch]]:
    """The branches that are computed while the context is active, for at least one row of input."""
    branches: set[Branch] = set()
    token = _RECORDED.set(branches)
    try:
        yield branches
    finally:
        _RECORDED.reset(token)


def is_recording() -> bool:
    """Whether a context asks for the branches that are computed. In a module that torch.compile traces, none does."""
    return not torch.compiler.is_compiling() and _RECORDED.get() is not None


def record_branch(branch: Branch) -> None:
    """Add a branch to the recorded ones, where a context asks for them."""
    if not torch.compiler.is_compiling() and (recorded := _RECORDED.get()) is not None:
        recorded.add(branch)


def per_output(values: Tensor, dimensions: int) -> Tensor:
    """Reshape one value per output (out,) to (out, 1, ...) with so many dimensions."""
    return values.reshape(-1, *[1] * (dimensions - 1))


def adapted_bias(owner: nn.Module) -> Tensor | None:
    """The bias plus the adapters' shift, rounded once to the dtype of the bias."""
    bias, shift = own_parameters(owner)["bias"], own_buffers(owner).get("lora_shift")
    factor = attachment_of(owner).factor
    if bias is None or shift is None or not factor:
        return bias
    return (bias.to(shift.dtype) + factor * shift).to(bias.dtype)


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
        return _forward_with_dora(owner, x, layer, pair, bias, output_axis)
    y = layer(x, bias)
    total = y
    for branch in attachment.branches:
        if x.numel():
            record_branch(branch)
        a, b = low_rank_factors(owner, branch)
        total = total + pair(_pair_input(owner, x, a, branch), a, b) * (attachment.factor * branch.scale)
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
    factor = per_output(_dora_factor(owner, branch, _weight_sum(owner, weight, [branch])), output_axis)
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
    if len(trained) != 1 or not attachment.factor or is_recording():
        return None
    a, b = low_rank_factors(owner, trained[0])
    if trained[0].dora or not is_plain(x, weight, a):
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
        if attachment_of(self).rows is not None:
            rows, indices = _rows(self)
            y = F.linear(input, weight, bias)
            own = F.linear(input, rows.to(input.dtype), None if bias is None else bias[indices])
            return y.index_copy(-1, indices, own.to(y.dtype))
        return _linear_with_branches(self, input, weight, bias)


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
        if attachment_of(self).rows is not None:
            return _embedded_with_rows(self, input, F.embedding(input, weight, pad))
        return _forward_with_branches(
            self, input, lambda x, _: F.embedding(x, weight, pad), lambda x, a, b: F.linear(F.embedding(x, a.T, pad), b)
        )


def _embedded_with_rows(owner: nn.Embedding, ids: Tensor, y: Tensor) -> Tensor:
    """y (..., width) of the frozen table, with the trained rows in place of theirs."""
    rows, indices = _rows(owner)
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


def adapted_class(original: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a layer's own class, so that isinstance, other methods and hooks keep working."""
    name = f"Lora{original.__name__}"
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
