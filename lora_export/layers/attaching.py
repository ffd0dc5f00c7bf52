"""A plan attached to an nn.Module: its adapters as branches, which can be turned down, settled and taken out again.

An attached layer stays what it was (an `nn.Linear` is still one, under its own name, with its own
weight in its state_dict), but its instance gets a subclass (see `branched`). `.double()` and `.to()` take
the adapters along.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lora_export.errors import InputRefused
from lora_export.layers.branched import (
    PARTS,
    STATE,
    Attachment,
    Branch,
    Whole,
    adapted_bias,
    adapted_class,
    adapted_weight,
    attached_in,
    attachment_of,
)
from lora_export.layers.folding import places_of, result_of, whole_of
from lora_export.layers.module_tensors import CONVOLUTIONS, Place, conv1d, places_in, slots_of, wide_dtype
from lora_export.plan import Plan, Step

Stored = str | Callable[[NDArray[np.float64]], NDArray[np.float64]]  # how a tensor is rounded: a dtype, or a scheme
FP32_SUM = 2.0**-18  # of its terms' size: how far off W + ΔW may be when fp32 sums it (64 products, half an eps each)


def attach(module: nn.Module, plan: Plan, *, trainable: bool = False) -> None:
    """Attach a plan's adapters, in place: pairs and bias shifts as branches, whole tensors in the base's place.

    A and B are registered as `X.lora_A.NAME` and `X.lora_B.NAME`, DoRA's lengths as `X.lora_magnitude.NAME`;
    all other names stay. A convolution's A has its stride, padding and dilation, so that the branch is W + ΔW
    (PEFT gives it no dilation, and cannot run it then). With `trainable`, the base is frozen, and A, B, the
    lengths and the whole tensors require gradients.
    Raises InputRefused, with the module untouched: tied weights, adapters that are attached already,
    tensors that the module lacks, values that the module's dtype cannot hold.
    """
    places = places_of(module, plan)
    for step in plan.steps:
        _refuse_attaching(step, places[step.weight])
        if step.magnitude is not None:
            result_of(step, places[step.weight].tensor)  # an output without a direction would become NaN
    wholes = {
        step.weight: whole_of(step, places[step.weight].tensor)
        for step in plan.steps
        if step.replace is not None or step.rows is not None
    }
    if trainable:
        module.requires_grad_(False)
    names = _parameter_names(adapter.name for adapter in plan.adapters)
    for step in plan.steps:
        place = places[step.weight]
        place.owner.__dict__.setdefault(STATE, Attachment(type(place.owner)))
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
    owner.__class__ = adapted_class(attachment_of(owner).original)


def _beside(base: Tensor, array: NDArray[np.float32]) -> Tensor:
    """An adapter's array where the base's tensor lives: in fp32, or fp64 where the base is."""
    return torch.tensor(array, dtype=wide_dtype(base.dtype), device=base.device)


def _add_branches(place: Place, step: Step, names: Mapping[str, str], *, trainable: bool) -> None:
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
        branch = Branch(term.adapter, term.module, place.attribute, name, scale, step.spec.layout, dora)
        attachment_of(owner).branches += (branch,)


def _parameter_names(adapters: Iterable[str]) -> dict[str, str]:
    """Adapters' names as names of parameters: no dots, and none that nn.ParameterDict has itself."""
    names: dict[str, str] = {}
    for adapter in adapters:
        name = re.sub(r"\W", "_", adapter, flags=re.ASCII)
        while name in names.values() or hasattr(nn.ParameterDict, name) or not name:
            name += "_"
        names[adapter] = name
    return names


def _put_whole(place: Place, plan: Plan, step: Step, value: Tensor, *, trainable: bool) -> None:
    adapter, key = next(
        (adapter.name, key)
        for adapter in plan.adapters
        for key, array in adapter.replaced.items()
        if array is step.replace
    )
    attachment_of(place.owner).wholes += (Whole(adapter, key, place.attribute, place.tensor),)
    if isinstance(place.tensor, nn.Parameter):
        value = nn.Parameter(value, requires_grad=trainable and value.is_floating_point())
    slots_of(place.owner, place.attribute)[place.attribute] = value


def _put_rows(module: nn.Module, place: Place, value: Tensor) -> None:
    """Put a table with some rows of its own wherever the old one stands: PEFT trains them for tied tensors as one."""
    table = nn.Parameter(value, requires_grad=False)
    for twin in [twin for twin in places_in(module) if twin.tensor is place.tensor]:
        twin.owner.__dict__.setdefault(STATE, Attachment(type(twin.owner)))
        attachment_of(twin.owner).wholes += (Whole("", "", twin.attribute, twin.tensor),)
        slots_of(twin.owner, twin.attribute)[twin.attribute] = table


def _refuse_attaching(step: Step, place: Place) -> None:
    owner = place.owner
    if step.shift is not None and not isinstance(owner, (nn.Linear, *CONVOLUTIONS, *conv1d())):
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


def detach(module: nn.Module) -> None:
    """Take everything that `attach` put there out again: the base's classes and tensors, bit for bit.

    What training froze stays frozen. Raises InputRefused where nothing is attached.
    """
    for owner in attached_in(module):
        attachment = attachment_of(owner)
        owner.__class__ = attachment.original
        for whole in attachment.wholes:
            slots = slots_of(owner, whole.attribute)
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


@contextlib.contextmanager
def strength(module: nn.Module, factor: float, *, keep_whole: bool = False, turn_whole: bool = False) -> Iterator[None]:
    """Multiply every branch and bias shift by `factor` while active, whoever reads the weights, and however.

    At 0 the output is the base's, bit for bit: the whole tensors go too, unless `keep_whole`. At any
    other factor they stay: a whole tensor has no strength; with `turn_whole` what it changes is multiplied.
    Raises InputRefused where nothing is attached.
    """
    owners = attached_in(module)
    before = [attachment_of(owner).factor for owner in owners]
    put_aside: list[tuple[dict[str, Any], str, Tensor]] = []
    for owner in owners:
        attachment = attachment_of(owner)
        attachment.factor *= factor
        for whole in attachment.wholes if (factor == 0 and not keep_whole) or turn_whole else ():
            slots = slots_of(owner, whole.attribute)
            put_aside.append((slots, whole.attribute, slots[whole.attribute]))
            slots[whole.attribute] = _turned(whole, slots[whole.attribute], factor)
    try:
        yield
    finally:
        for owner, factor_before in zip(owners, before, strict=True):
            attachment_of(owner).factor = factor_before
        for slots, attribute, tensor in reversed(put_aside):
            slots[attribute] = tensor


def _turned(whole: Whole, there: Tensor, factor: float) -> Tensor:
    """The base's tensor and `factor` times what the whole one changes in it."""
    base = _moved(whole.base, there)
    if factor == 0 or not there.is_floating_point():
        return base
    turned = base.detach() + factor * (there.detach() - base.detach())
    return nn.Parameter(turned, requires_grad=False) if isinstance(there, nn.Parameter) else turned


def settle(
    module: nn.Module,
    stored: Mapping[str, Stored],
    chosen: Mapping[str, Tensor],
    *,
    factor: float = 1.0,
    turn_whole: bool = False,
) -> None:
    """Turn every branch into a weight: W + ΔW in the module's own precision, rounded once to its `stored` dtype.

    `stored` maps names of tensors, those that no branch changes included, to NumPy dtypes, or to what rounds them
    (to the nearest that a quantised weight's scales allow); a tensor that it lacks is not rounded. For a reference in
    fp64, this is what a merged file should hold, computed without the merge's arithmetic. Where a sum lies so near
    the middle of two neighbours that fp32 may take either, the one that stands in `chosen` is taken. Nothing is
    attached any more then. `factor` and `turn_whole` are those of `strength`; whole tensors are kept.
    """
    owners = attached_in(module)
    paths = {owner: path for path, owner in module.named_modules()}
    for owner in owners:
        attachment = attachment_of(owner)
        attachment.factor *= factor
        settled = {whole.attribute: slots_of(owner, whole.attribute)[whole.attribute] for whole in attachment.wholes}
        if turn_whole:
            settled |= {
                there.attribute: _turned(there, settled[there.attribute], factor) for there in attachment.wholes
            }
        settled |= {branch.weight: adapted_weight(owner, branch.weight) for branch in attachment.branches}
        if "lora_shift" in owner._buffers:
            settled["bias"] = adapted_bias(owner)
        owner.__dict__[STATE] = dataclasses.replace(attachment, wholes=())  # they stay where they are
        for attribute, value in settled.items():
            if value is None:
                continue
            name = f"{paths[owner]}.{attribute}"
            rounded = _rounded(value.detach(), stored[name]) if name in stored else value
            if name in stored and name in chosen:
                other = chosen[name].to(value.dtype)
                size = value.abs() + slots_of(owner, attribute)[attribute].abs()
                size = size if isinstance(stored[name], str) else size.max()  # integers are told from the scheme's zero
                as_near = (other - value).abs() <= (rounded - value).abs() + FP32_SUM * size
                rounded = torch.where(as_near, other, rounded)
            slots_of(owner, attribute)[attribute] = nn.Parameter(rounded.detach(), requires_grad=False)
    detach(module)
    made: dict[int, Tensor] = {}  # by the tensor that it stands for, so that one of several names stays one
    for place in places_in(module):
        if place.name in stored:
            rounded = _rounded(place.tensor.detach(), stored[place.name])
            if not torch.equal(rounded, place.tensor):  # a sum that is rounded already stays as it is
                is_parameter = isinstance(place.tensor, nn.Parameter)
                made[id(place.tensor)] = nn.Parameter(rounded, requires_grad=False) if is_parameter else rounded
    for place in list(places_in(module)):
        if id(place.tensor) in made:
            slots_of(place.owner, place.attribute)[place.attribute] = made[id(place.tensor)]


def _rounded(value: Tensor, stored: Stored) -> Tensor:
    if isinstance(stored, str):
        return value.to(getattr(torch, stored)).to(value.dtype)
    return torch.from_numpy(stored(value.double().numpy())).to(value.dtype)
