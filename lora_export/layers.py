"""A plan over an nn.Module: attach its adapters as branches, or fold them into the weights.

An attached layer stays what it was (an `nn.Linear` is still one, under its own name, with its own
weight in its state_dict), but its instance gets a subclass: the `forward` of a linear layer, a
convolution or an embedding computes `W x + strength * scale * B (A x)`, and whoever reads `.weight`
or `.in_proj_weight` directly, as nn.TransformerEncoderLayer's fast path and nn.MultiheadAttention do,
finds W + ΔW there. With DoRA both are multiplied by m / ‖W + strength * scale * B A‖, which does not
touch the bias; the norm takes no part in gradients (Liu et al. 2024, section 4.3).

A and B are kept in fp32 (fp64 beside fp64 weights) and a branch is computed in their dtype, as PEFT
does it; the result is rounded once to the layer's own. `.double()` and `.to()` take them along.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import ml_dtypes
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from numpy.typing import NDArray
from torch import Tensor, nn

from lora_export.errors import InputRefused
from lora_export.lora import Adapter, LoraPair, fresh_pair
from lora_export.plan import Layout, Plan, Step, TensorSpec

STATE = "_lora_export"  # where an _Attachment stands in the __dict__ of the module it belongs to
FP32_SUM = 2.0**-18  # of its terms' size: how far off W + ΔW may be when fp32 sums it (64 products, half an eps each)
PARTS = ("lora_A", "lora_B", "lora_magnitude")  # what an owner's branches are made of
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONVOLVE = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}  # by the weight's dimensions
ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


# --- What the module holds ---


class _Place(NamedTuple):
    """One name of a tensor: a tied tensor has several."""

    name: str
    owner: nn.Module
    attribute: str
    tensor: Tensor


def _places(module: nn.Module) -> Iterator[_Place]:
    """Every parameter and persistent buffer, in the order of the state_dict."""
    for path, owner in module.named_modules(remove_duplicate=False):
        for attribute, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None and attribute not in owner._non_persistent_buffers_set:
                yield _Place(f"{path}.{attribute}" if path else attribute, owner, attribute, tensor)


def specs(module: nn.Module) -> list[TensorSpec]:
    """Name, shape, dtype and layout of every tensor in the module's state_dict; both names of a tied one."""
    found = []
    for name, owner, attribute, tensor in _places(module):
        if nn.parameter.is_lazy(tensor):
            raise InputRefused(f"{name} has no shape yet: run the lazy module on an example first")
        found.append(
            TensorSpec(
                name=name,
                shape=tuple(tensor.shape),
                dtype=str(tensor.dtype).removeprefix("torch."),
                layout=_layout(owner, attribute),
                nbytes=tensor.nbytes,
            )
        )
    return found


def _layout(owner: nn.Module, attribute: str) -> Layout:
    if isinstance(owner, (nn.Linear, *CONVOLUTIONS)) and attribute == "weight":
        return Layout.OUT_IN
    if isinstance(owner, nn.Embedding) and attribute == "weight":
        return Layout.EMBEDDING
    if isinstance(owner, nn.MultiheadAttention) and attribute in ATTENTION_WEIGHTS:
        return Layout.OUT_IN
    if isinstance(owner, _conv1d()) and attribute == "weight":
        return Layout.IN_OUT
    if attribute == "weight" and isinstance(told := getattr(owner, "lora_layout", None), Layout):
        return told  # a program's matrix, of whose layer nothing but its name is left
    return Layout.OTHER


def _conv1d() -> tuple[type[nn.Module], ...]:
    """transformers' Conv1D where transformers is loaded: no module can hold one otherwise."""
    loaded = sys.modules.get("transformers.pytorch_utils")
    return (loaded.Conv1D,) if loaded else ()


class Plain(NamedTuple):
    """A weight whose module makes x Wᵀ of one input, adds a bias at most, and hands that out."""

    name: str
    owner: nn.Module  # that holds the tensor
    attribute: str
    layout: Layout
    attention: nn.MultiheadAttention | None = None  # that computes with it, where its owner is never called

    @property
    def tensor(self) -> Tensor:
        """What is stored, without what is attached."""
        return cast(Tensor, self.owner._parameters[self.attribute])

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in), a convolution's kernel flattened."""
        first, *others = self.tensor.shape
        return (math.prod(others), first) if self.layout.is_turned else (first, math.prod(others))

    @property
    def has_bias(self) -> bool:
        return self.owner._parameters.get(self._bias) is not None

    @property
    def bias(self) -> Tensor | None:
        """(out,), with what an adapter adds to it."""
        return cast(Tensor, getattr(self.owner, self._bias)) if self.has_bias else None

    @property
    def _bias(self) -> str:
        return "in_proj_bias" if self.attribute == "in_proj_weight" else "bias"


def plain(module: nn.Module) -> list[Plain]:
    """The weights of linear layers, convolutions and embeddings that compute nothing else, attached or not.

    Each tensor's first name; a subclass with a `forward` of its own is left out.
    """
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Embedding, *CONVOLUTIONS, *_conv1d())
    known = {kind.forward for kind in kinds}
    parents = {child: parent for parent in module.modules() for child in parent.children()}
    found = []
    for path, owner in module.named_modules():
        original = _attachment(owner).original if STATE in owner.__dict__ else type(owner)
        attention = owner if isinstance(owner, nn.MultiheadAttention) else parents.get(owner)
        attention = attention if isinstance(attention, nn.MultiheadAttention) else None
        attribute = "in_proj_weight" if attention is owner else "weight"
        if (attention is owner or original.forward in known) and owner._parameters.get(attribute) is not None:
            name = f"{path}.{attribute}" if path else attribute
            found.append(Plain(name, owner, attribute, _layout(owner, attribute), attention))
    return found


@dataclass(frozen=True)
class ParameterCount:
    """How many of a module's parameters an optimiser would train."""

    trained: int
    total: int

    def __str__(self) -> str:
        share = 100 * self.trained / self.total if self.total else 0.0
        return f"trainable parameters: {self.trained:,} of {self.total:,} ({share:.3g} %)"


def trainable(module: nn.Module) -> ParameterCount:
    """Count the parameters that require gradients, and all of them. A tied tensor counts once."""
    sizes = [(parameter.requires_grad, parameter.numel()) for parameter in module.parameters()]
    return ParameterCount(sum(size for trained, size in sizes if trained), sum(size for _, size in sizes))


# --- Layers with branches ---


@dataclass(frozen=True)
class _Branch:
    """One pair beside one weight."""

    adapter: str
    module: str  # the adapter's own name for the place
    weight: str  # the owner's attribute
    name: str  # of A in the owner's `lora_A`, of B in its `lora_B`, of DoRA's lengths in its `lora_magnitude`
    scale: float  # the pair's scale times the adapter's strength
    layout: Layout
    dora: bool


@dataclass(frozen=True)
class _Whole:
    """A whole tensor that stands in the base's place. Without names: the base's own, but for some rows."""

    adapter: str
    tensor: str  # the adapter's own name for it
    attribute: str  # of the owner
    base: Tensor  # what stood there before


@dataclass
class _Attachment:
    """All that `attach` did to one module, for `detach` to undo."""

    original: type[nn.Module]
    branches: tuple[_Branch, ...] = ()
    wholes: tuple[_Whole, ...] = ()
    factor: float = 1.0  # `strength` turns it


# The functions below look in the owner's dictionaries: an AttributeError inside a property would make
# nn.Module.__getattr__ answer with the base's tensor, and the adapter would be gone without a word.


def _attachment(owner: nn.Module) -> _Attachment:
    found: _Attachment = owner.__dict__[STATE]
    return found


def _part(owner: nn.Module, part: str, branch: _Branch) -> Tensor:
    found: Tensor = cast(nn.ParameterDict, owner._modules[part])[branch.name]
    return found


def _factors(owner: nn.Module, branch: _Branch) -> tuple[Tensor, Tensor]:
    """A (rank, in, ...) and B (out, rank, 1...)."""
    return _part(owner, "lora_A", branch), _part(owner, "lora_B", branch)


def _adapted_weight(owner: nn.Module, attribute: str) -> Tensor | None:
    """W + ΔW, rescaled where DoRA asks for it, in A's dtype; rounded once to W's."""
    weight = owner._parameters[attribute]
    attachment = _attachment(owner)
    branches = [branch for branch in attachment.branches if branch.weight == attribute]
    if weight is None or not branches or not attachment.factor:
        return weight
    total = _total(owner, weight, branches)  # (out, in, ...)
    for branch in branches:
        if branch.dora:
            total = total * _spread(_length_factor(owner, branch, total), total.ndim)
    return _oriented(total, branches[0].layout).to(weight.dtype)


def _total(owner: nn.Module, weight: Tensor, branches: Sequence[_Branch]) -> Tensor:
    """W + ΔW in the (out, in, ...) view, in A's dtype."""
    changes = []
    for branch in branches:
        a, b = _factors(owner, branch)
        product = b.flatten(1) @ a.flatten(1)
        changes.append(product.reshape(b.shape[0], *a.shape[1:]) * (_attachment(owner).factor * branch.scale))
    change = sum(changes[1:], start=changes[0])
    total: Tensor = _oriented(weight, branches[0].layout).to(change.dtype) + change
    return total


def _length_factor(owner: nn.Module, branch: _Branch, total: Tensor) -> Tensor:
    """What DoRA multiplies each output by (out,): m / ‖W + ΔW‖, the norm a constant for gradients."""
    norm: Tensor = torch.linalg.vector_norm(total.detach().flatten(1), dim=1)
    return _part(owner, "lora_magnitude", branch) / norm


def _spread(outputs: Tensor, dimensions: int) -> Tensor:
    """A number for each output, so that it multiplies what has its outputs first of so many dimensions."""
    return outputs.reshape(-1, *[1] * (dimensions - 1))


def _adapted_bias(owner: nn.Module) -> Tensor | None:
    bias, shift = owner._parameters["bias"], owner._buffers.get("lora_shift")
    factor = _attachment(owner).factor
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
    attachment = _attachment(owner)
    if not attachment.factor or not attachment.branches:
        return layer(bias)
    dora = any(branch.dora for branch in attachment.branches)
    y = layer(None if dora else bias)
    total = y
    for branch in attachment.branches:
        a, b = _factors(owner, branch)
        total = total + pair(x.to(a.dtype) if x.is_floating_point() else x, a, b) * (attachment.factor * branch.scale)
    if dora:
        (branch,) = attachment.branches  # a plan lets no other stand beside it
        weight = cast(Tensor, owner._parameters[branch.weight])
        factor = _length_factor(owner, branch, _total(owner, weight, [branch]))
        total = total * _spread(factor, outputs)
        total = total if bias is None else total + _spread(bias, outputs)
    return total.to(y.dtype)


class _AdaptedLayer(nn.Module):
    """For any layer with a weight: its own `forward` reads W + ΔW."""

    weight = property(lambda self: _adapted_weight(self, "weight"))
    bias = property(_adapted_bias)


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

    in_proj_weight = property(lambda self: _adapted_weight(self, "in_proj_weight"))
    q_proj_weight = property(lambda self: _adapted_weight(self, "q_proj_weight"))
    k_proj_weight = property(lambda self: _adapted_weight(self, "k_proj_weight"))
    v_proj_weight = property(lambda self: _adapted_weight(self, "v_proj_weight"))


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}  # a layer's class -> its adapted subclass


def _adapted_class(original: type[nn.Module]) -> type[nn.Module]:
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
    if any(original.forward is known.forward for known in _conv1d()):
        return _Conv1DBranches
    if any(original.forward is known.forward for known in CONVOLUTIONS):
        return _ConvolutionBranches
    return _AdaptedLayer  # somebody's own forward: what it makes of its weight is its own affair


# --- Attach and detach ---


def attach(module: nn.Module, plan: Plan, *, trainable: bool = False) -> None:
    """Attach a plan's adapters, in place: pairs and bias shifts as branches, whole tensors in the base's place.

    A and B are registered as `X.lora_A.NAME` and `X.lora_B.NAME`, DoRA's lengths as `X.lora_magnitude.NAME`;
    all other names stay. A convolution's A has its stride, padding and dilation, so that the branch is W + ΔW
    (PEFT gives it no dilation, and cannot run it then). With `trainable`, the base is frozen, and A, B, the
    lengths and the whole tensors require gradients.
    Raises InputRefused, with the module untouched: tied weights, adapters that are attached already,
    tensors that the module lacks, values that the module's dtype cannot hold.
    """
    places = _places_of(module, plan)
    for step in plan.steps:
        _refuse_attaching(step, places[step.weight])
        if step.magnitude is not None:
            _result(step, places[step.weight].tensor)  # an output without a direction would become NaN
    wholes = {
        step.weight: _whole(step, places[step.weight].tensor)
        for step in plan.steps
        if step.replace is not None or step.rows is not None
    }
    if trainable:
        module.requires_grad_(False)
    names = _parameter_names(adapter.name for adapter in plan.adapters)
    for step in plan.steps:
        place = places[step.weight]
        place.owner.__dict__.setdefault(STATE, _Attachment(type(place.owner)))
        if step.brings_rows:
            _put_rows(module, place, wholes[step.weight])
        elif step.weight in wholes:
            _put_whole(place, plan, step, wholes[step.weight], trainable=trainable and not step.terms)
        if step.shift is not None:
            _adapt(place.owner)
            place.owner.register_buffer("lora_shift", _beside(place.tensor, step.shift))
        if step.terms:
            _adapt(place.owner)
            _add_branches(place, step, names, trainable=trainable)


def _adapt(owner: nn.Module) -> None:
    owner.__class__ = _adapted_class(_attachment(owner).original)


def _beside(base: Tensor, array: NDArray[np.float32]) -> Tensor:
    """An adapter's array where the base's tensor lives: in fp32, or fp64 where the base is."""
    return torch.tensor(array, dtype=_wide(base.dtype), device=base.device)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _add_branches(place: _Place, step: Step, names: Mapping[str, str], *, trainable: bool) -> None:
    owner = place.owner
    for term in step.terms:
        name = names[term.adapter]
        if place.attribute not in ("weight", "in_proj_weight"):  # q, k and v of one attention
            name = f"{place.attribute}_{name}"
        for part, array in zip(PARTS, (term.pair.a, term.pair.b, term.pair.magnitude), strict=True):
            if array is None:
                continue
            if part not in owner._modules:
                owner.register_module(part, nn.ParameterDict())
            parameter = nn.Parameter(_beside(place.tensor, array), requires_grad=trainable)
            cast(nn.ParameterDict, owner._modules[part])[name] = parameter
        scale, dora = term.strength * term.pair.scale, term.pair.magnitude is not None
        branch = _Branch(term.adapter, term.module, place.attribute, name, scale, step.spec.layout, dora)
        _attachment(owner).branches += (branch,)


def _parameter_names(adapters: Iterable[str]) -> dict[str, str]:
    """Adapters' names as names of parameters: no dots, and none that nn.ParameterDict has itself."""
    names: dict[str, str] = {}
    for adapter in adapters:
        name = re.sub(r"\W", "_", adapter, flags=re.ASCII)
        while name in names.values() or hasattr(nn.ParameterDict, name) or not name:
            name += "_"
        names[adapter] = name
    return names


def _put_whole(place: _Place, plan: Plan, step: Step, value: Tensor, *, trainable: bool) -> None:
    adapter, key = next(
        (adapter.name, key)
        for adapter in plan.adapters
        for key, array in adapter.replaced.items()
        if array is step.replace
    )
    _attachment(place.owner).wholes += (_Whole(adapter, key, place.attribute, place.tensor),)
    if isinstance(place.tensor, nn.Parameter):
        value = nn.Parameter(value, requires_grad=trainable and value.is_floating_point())
    _slots(place.owner, place.attribute)[place.attribute] = value


def _put_rows(module: nn.Module, place: _Place, value: Tensor) -> None:
    """Put a table with some rows of its own wherever the old one stands: PEFT trains them for tied tensors as one."""
    table = nn.Parameter(value, requires_grad=False)
    for twin in [twin for twin in _places(module) if twin.tensor is place.tensor]:
        twin.owner.__dict__.setdefault(STATE, _Attachment(type(twin.owner)))
        _attachment(twin.owner).wholes += (_Whole("", "", twin.attribute, twin.tensor),)
        _slots(twin.owner, twin.attribute)[twin.attribute] = table


def _slots(owner: nn.Module, attribute: str) -> dict[str, Any]:
    return owner._parameters if attribute in owner._parameters else owner._buffers


def detach(module: nn.Module) -> None:
    """Take everything that `attach` put there out again: the base's classes and tensors, bit for bit.

    What training froze stays frozen. Raises InputRefused where nothing is attached.
    """
    for owner in _attached(module):
        attachment = _attachment(owner)
        owner.__class__ = attachment.original
        for whole in attachment.wholes:
            slots = _slots(owner, whole.attribute)
            slots[whole.attribute] = _moved(whole.base, slots[whole.attribute])
        for part in PARTS:
            owner._modules.pop(part, None)
        owner._buffers.pop("lora_shift", None)
        del owner.__dict__[STATE]


def _moved(base: Tensor, like: Tensor) -> Tensor:
    """The base's tensor, where `.to()` or `.double()` have taken the module since it was put aside."""
    if base.dtype is like.dtype and base.device == like.device:
        return base
    moved = base.detach().to(like.device, like.dtype)
    return nn.Parameter(moved, requires_grad=base.requires_grad) if isinstance(base, nn.Parameter) else moved


def _attached(module: nn.Module) -> list[nn.Module]:
    owners = [owner for owner in module.modules() if STATE in owner.__dict__]
    if not owners:
        raise InputRefused("no adapter is attached to this module")
    return owners


@contextlib.contextmanager
def strength(module: nn.Module, factor: float, *, keep_whole: bool = False, turn_whole: bool = False) -> Iterator[None]:
    """Multiply every branch and bias shift by `factor` while active, whoever reads the weights, and however.

    At 0 the output is the base's, bit for bit: the whole tensors go too, unless `keep_whole`. At any
    other factor they stay: a whole tensor has no strength; with `turn_whole` what it changes is multiplied.
    Raises InputRefused where nothing is attached.
    """
    owners = _attached(module)
    before = [_attachment(owner).factor for owner in owners]
    put_aside: list[tuple[dict[str, Any], str, Tensor]] = []
    for owner in owners:
        attachment = _attachment(owner)
        attachment.factor *= factor
        for whole in attachment.wholes if (factor == 0 and not keep_whole) or turn_whole else ():
            slots = _slots(owner, whole.attribute)
            put_aside.append((slots, whole.attribute, slots[whole.attribute]))
            slots[whole.attribute] = _turned(whole, slots[whole.attribute], factor)
    try:
        yield
    finally:
        for owner, factor_before in zip(owners, before, strict=True):
            _attachment(owner).factor = factor_before
        for slots, attribute, tensor in reversed(put_aside):
            slots[attribute] = tensor


def _turned(whole: _Whole, there: Tensor, factor: float) -> Tensor:
    """The base's tensor and `factor` times what the whole one changes in it."""
    base = _moved(whole.base, there)
    if factor == 0 or not there.is_floating_point():
        return base
    turned = base.detach() + factor * (there.detach() - base.detach())
    return nn.Parameter(turned, requires_grad=False) if isinstance(there, nn.Parameter) else turned


def settle(
    module: nn.Module,
    stored: Mapping[str, str],
    chosen: Mapping[str, Tensor],
    *,
    factor: float = 1.0,
    turn_whole: bool = False,
) -> None:
    """Turn every branch into a weight: W + ΔW in the module's own precision, rounded once to its `stored` dtype.

    `stored` maps names of tensors, those that no branch changes included, to NumPy dtypes; a tensor that it
    lacks is not rounded. For a referee in fp64, this is what a merged checkpoint should hold, computed without
    the merge's arithmetic. Where a sum lies so near the middle of two neighbours that fp32 may take either,
    the one that stands in `chosen` is taken. Nothing is attached any more then. `factor` and `turn_whole` are
    those of `strength`; whole tensors are kept.
    """
    owners = _attached(module)
    paths = {owner: path for path, owner in module.named_modules()}
    for owner in owners:
        attachment = _attachment(owner)
        attachment.factor *= factor
        settled = {whole.attribute: _slots(owner, whole.attribute)[whole.attribute] for whole in attachment.wholes}
        if turn_whole:
            settled |= {
                there.attribute: _turned(there, settled[there.attribute], factor) for there in attachment.wholes
            }
        settled |= {branch.weight: _adapted_weight(owner, branch.weight) for branch in attachment.branches}
        if "lora_shift" in owner._buffers:
            settled["bias"] = _adapted_bias(owner)
        owner.__dict__[STATE] = dataclasses.replace(attachment, wholes=())  # they stay where they are
        for attribute, value in settled.items():
            if value is None:
                continue
            name = f"{paths[owner]}.{attribute}"
            rounded = value.detach().to(getattr(torch, stored[name])).to(value.dtype) if name in stored else value
            if name in stored and name in chosen:
                other = chosen[name].to(value.dtype)
                size = value.abs() + _slots(owner, attribute)[attribute].abs()
                as_near = (other - value).abs() <= (rounded - value).abs() + FP32_SUM * size
                rounded = torch.where(as_near, other, rounded)
            _slots(owner, attribute)[attribute] = nn.Parameter(rounded.detach(), requires_grad=False)
    detach(module)
    with torch.no_grad():
        for place in _places(module):
            if place.name in stored:  # a sum that is rounded already stays as it is
                place.tensor.copy_(place.tensor.to(getattr(torch, stored[place.name])))


# --- Fold ---


def fold(module: nn.Module, plan: Plan) -> None:
    """Add a plan's changes to the weights, in place, and put its whole tensors there.

    ΔW and the sum in fp32 (fp64 for fp64 weights), one rounding to the weight's dtype. In fp32 the ΔW is
    the array that a merge of the checkpoint adds. Each ΔW is computed twice, so that everything is checked
    before anything is changed. Raises InputRefused as `attach` does, and for results that are not finite.
    """
    places = _places_of(module, plan)
    for step in plan.steps:
        _result(step, places[step.weight].tensor)
    with torch.no_grad():
        for step in plan.steps:
            tensor = places[step.weight].tensor
            tensor.copy_(_result(step, tensor))


def _result(step: Step, base: Tensor) -> Tensor:
    """What a step makes of the base's tensor, in its dtype. Raises InputRefused unless all is finite."""
    if step.is_whole:
        return _whole(step, base)
    start = base.detach() if step.replace is None else _tensor(np.asarray(step.replace)).to(base.device)
    change = _change(step, _wide(base.dtype)).to(base.device)
    total = _oriented(start, step.spec.layout).to(change.dtype) + change
    if step.magnitude is not None:
        length = total.double().flatten(1).norm(dim=1)
        if not length.all():
            raise InputRefused(
                f"{step.weight}: W + sBA is zero in {int((length == 0).sum())} of its outputs, to which DoRA cannot "
                "give a length. Nothing was changed."
            )
        total = total * _spread((_tensor(step.magnitude).to(length) / length).to(total.dtype), total.ndim)
    return _finite(step, start, _oriented(total, step.spec.layout), base.dtype)


def _whole(step: Step, base: Tensor) -> Tensor:
    """The tensor that takes the base's place, in its dtype. Raises InputRefused unless all is finite."""
    whole = base.detach().clone() if step.replace is None else _tensor(step.replace).to(base.device)
    if step.rows is not None:
        places = torch.from_numpy(step.rows.indices).to(base.device)
        whole[places] = _tensor(step.rows.values).to(whole)
    return _finite(step, whole, whole, base.dtype)


def _finite(step: Step, before: Tensor, wide: Tensor, dtype: torch.dtype) -> Tensor:
    result = wide.to(dtype)
    if result.is_floating_point() and not result.isfinite().all():
        bad = result.numel() - int(result.isfinite().sum())
        if wide.isfinite().all():
            limit = torch.finfo(dtype).max
            why = f"the largest is {wide.abs().max():.4g}, {step.spec.dtype} holds up to {limit:.4g}"
        else:
            why = "the base's own tensor has some" if not before.isfinite().all() else "the sum overflows"
        raise InputRefused(f"{step.weight}: {bad} values would not be finite: {why}. Nothing was changed.")
    return result


def _change(step: Step, wide: torch.dtype) -> Tensor:
    """ΔW in the (out, in, ...) view before DoRA rescales the sum, or a bias's shift."""
    if step.shift is not None or wide is torch.float32:
        return _tensor(step.delta()).to(wide)
    deltas = []
    for term in step.terms:
        a, b = (_tensor(side).to(wide) for side in (term.pair.a, term.pair.b))
        product = (b.flatten(1) @ a.flatten(1)) * (term.strength * term.pair.scale)
        deltas.append(product.reshape(term.pair.shape))
    return torch.stack(deltas).sum(0)


def _oriented(weight: Tensor, layout: Layout) -> Tensor:
    """Between a weight as it is stored and its (out, in, ...) view, either way."""
    return weight.T if layout.is_turned else weight


# --- What is refused ---


def _places_of(module: nn.Module, plan: Plan) -> dict[str, _Place]:
    """Where each step lands. Raises InputRefused for what neither `attach` nor `fold` can do."""
    attachments = [_attachment(owner) for owner in module.modules() if STATE in owner.__dict__]
    names = {branch.adapter for there in attachments for branch in there.branches}
    names |= {whole.adapter or "rows of tokens" for there in attachments for whole in there.wholes}
    if attachments:
        raise InputRefused(
            f"adapters are attached already ({', '.join(sorted(names))}): detach first, or make one plan of all of them"
        )
    added = [step.weight for step in plan.steps if step.added]
    if added:
        raise InputRefused(f"the module has no {', '.join(added)}: load it with the head that the adapter was made for")
    refuse_tied(module, plan)
    return {place.name: place for place in _places(module)}


def refuse_tied(module: nn.Module, plan: Plan) -> None:
    """Raises InputRefused where a step lands on a tensor that the module has under several names."""
    names: dict[int, list[str]] = {}
    for place in _places(module):
        tensor = place.tensor
        # The address also finds two parameters that share their memory; meta tensors have none.
        names.setdefault(tensor.data_ptr() or id(tensor), []).append(place.name)
    steps = {step.weight for step in plan.steps if not step.brings_rows}  # PEFT trains rows for all names at once
    tied = [group for group in names.values() if len(group) > 1 and any(name in steps for name in group)]
    if tied:
        groups = "; ".join(" and ".join(group) for group in tied)
        raise InputRefused(
            f"one tensor under several names: {groups}. Changing it under one name would change the others without a "
            "word. Untie them explicitly (a copy for each; tie_word_embeddings: false in a Hugging Face config), or "
            "leave the layer out of the adapter. Nothing was changed."
        )


def _refuse_attaching(step: Step, place: _Place) -> None:
    owner = place.owner
    if step.shift is not None and not isinstance(owner, (nn.Linear, *CONVOLUTIONS, *_conv1d())):
        raise InputRefused(
            f"{step.weight}: only the bias of a linear layer or a convolution can be shifted, not "
            f"{type(owner).__name__}'s"
        )
    if step.terms and isinstance(owner, CONVOLUTIONS) and owner.groups > 1:
        raise InputRefused(f"{step.weight}: a pair has no meaning beside a convolution of {owner.groups} groups")
    if step.terms and isinstance(owner, nn.Embedding) and owner.max_norm is not None:
        raise InputRefused(f"{step.weight}: an embedding with max_norm changes its rows whenever it is used")
    clashes = [name for name in (*PARTS, "lora_shift") if hasattr(owner, name)]
    if not step.is_whole and clashes:
        raise InputRefused(
            f"{place.name} stands in a {type(owner).__name__} that has its own {', '.join(clashes)}: "
            "give the model without its LoRA layers"
        )


# --- Adapters from modules ---


def fresh_adapter(
    module: nn.Module,
    *,
    targets: Literal["all-linear"] | Sequence[str],
    rank: int,
    alpha: float,
    seed: int,
    name: str = "default",
    rslora: bool = False,
    whole: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Adapter:
    """A new adapter for this module: A Kaiming-uniform, B zero, so that it is the identity until it is trained.

    `targets` are module names or their endings (`query` means every `….query`), or "all-linear": every
    linear layer and packed attention projection, except a Hugging Face model's output embeddings.
    `whole` names modules, such as a classification head, that are trained as a whole; `exclude` names
    layers to leave alone. The scale is alpha / rank, or alpha / √rank with `rslora`.
    Raises InputRefused with every name that matches nothing, and the nearest that would.
    """
    if rank < 1 or not math.isfinite(alpha) or alpha <= 0:
        raise InputRefused(f"rank {rank} and alpha {alpha}: both must be positive")
    tensors = specs(module)
    linear = {_module_of(spec.name): spec for spec in tensors if _is_linear(spec)}
    wanted = () if targets == "all-linear" else tuple([targets] if isinstance(targets, str) else targets)
    modules = [path for path, _ in module.named_modules() if path]
    _refuse_unmatched(wanted, linear, "linear layer", modules)
    _refuse_unmatched(whole, modules, "module", modules)
    _refuse_unmatched(exclude, modules, "module", modules)

    saved = _below(whole, modules)
    replaced = {place.name: _array(place.tensor) for place in _places(module) if place.name.startswith(saved)}
    excluded = _below(exclude, modules)
    left_out = {path for path, spec in linear.items() if spec.name.startswith((*saved, *excluded))}
    if targets == "all-linear":
        left_out |= _output_embeddings(module)
    matched = [path for path in linear if targets == "all-linear" or _matches(path, wanted)]
    chosen = [path for path in matched if path not in left_out]
    if not chosen:
        raise InputRefused("no linear layer is left to adapt")

    rng = np.random.default_rng(seed)
    scale = alpha / math.sqrt(rank) if rslora else alpha / rank
    pairs: dict[str, LoraPair] = {}
    for path in chosen:
        out_features, in_features = linear[path].matrix
        pairs[path] = fresh_pair((out_features, in_features), rank=rank, scale=scale, rng=rng)
    return Adapter(
        name=name,
        format="fresh",
        pairs=pairs,
        replaced=replaced,
        targets=wanted if wanted and chosen == matched else tuple(chosen),
        metadata={"r": rank, "lora_alpha": alpha, "use_rslora": rslora},
    )


def _is_linear(spec: TensorSpec) -> bool:
    return spec.layout in (Layout.OUT_IN, Layout.IN_OUT) and len(spec.shape) == 2  # not a convolution's


def _module_of(weight: str) -> str:
    """The name that a pair has for this weight: its module's, or its own where that would not be clear."""
    return weight.removesuffix(".weight").removesuffix(".in_proj_weight")


def _matches(path: str, names: Iterable[str]) -> bool:
    return any(f".{path}".endswith(f".{name}") for name in names)


def _below(names: Sequence[str], modules: Iterable[str]) -> tuple[str, ...]:
    """What the names of all tensors of these modules start with."""
    return tuple(f"{path}." for path in modules if _matches(path, names))


def _refuse_unmatched(names: Iterable[str], paths: Iterable[str], what: str, modules: Sequence[str]) -> None:
    paths = list(paths)
    endings = sorted({path.rpartition(".")[2] for path in paths} | set(paths))
    problems = []
    for name in names:
        if any(_matches(path, [name]) for path in paths):
            continue
        nearest = difflib.get_close_matches(name, endings, n=3, cutoff=0.5) or endings[:3]
        exists = "is no" if any(_matches(path, [name]) for path in modules) else "matches no"
        problems.append(f"`{name}` {exists} {what}; the nearest: {', '.join(nearest) or 'none'}")
    if problems:
        raise InputRefused("; ".join(problems))


def _output_embeddings(module: nn.Module) -> set[str]:
    """The output head of a Hugging Face model with one, which PEFT's "all-linear" leaves alone too."""
    if not callable(getattr(module, "get_output_embeddings", None)):
        return set()
    head = module.get_output_embeddings()  # type: ignore[operator]
    return {path for path, child in module.named_modules() if head is not None and child is head}


def read_back(module: nn.Module, like: Adapter) -> Adapter:
    """The adapter `like` with the A, B and whole tensors that now stand in the module, as after training.

    Raises InputRefused where that adapter is not attached, or a value is not finite.
    """
    pairs, replaced = dict(like.pairs), dict(like.replaced)
    found = False
    for owner in _attached(module):
        attachment = _attachment(owner)
        for branch in attachment.branches:
            if branch.adapter == like.name:
                pairs[branch.module] = _read_pair(owner, branch, like.pairs[branch.module])
                found = True
        for whole in attachment.wholes:
            if whole.tensor and whole.adapter == like.name:
                replaced[whole.tensor] = _array(_slots(owner, whole.attribute)[whole.attribute])
                found = True
    if not found:
        raise InputRefused(f"the adapter {like.name} is not attached to this module")
    return dataclasses.replace(like, pairs=pairs, replaced=replaced, sha256="")


def _read_pair(owner: nn.Module, branch: _Branch, like: LoraPair) -> LoraPair:
    a, b = map(_array, _factors(owner, branch))
    magnitude = _array(_part(owner, "lora_magnitude", branch)) if branch.dora else None
    try:
        return dataclasses.replace(like, a=a, b=b, magnitude=magnitude)
    except InputRefused as error:
        raise InputRefused(f"{branch.module}: {error}") from error


# --- Between NumPy and torch: bf16 has no common name ---


def _tensor(array: NDArray[Any]) -> Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.tensor(array.view(np.uint16)).view(torch.bfloat16)
    return torch.tensor(array)


def _array(tensor: Tensor) -> NDArray[Any]:
    own = tensor.detach().cpu().clone()
    if own.dtype is torch.bfloat16:
        bits: NDArray[Any] = own.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return bits
    array: NDArray[Any] = own.numpy()
    return array
