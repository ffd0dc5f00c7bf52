"""Attach a plan's adapters to an nn.Module, scale or disable them, and detach them again.

An attached layer keeps its name, and its own weight in the state_dict; an `nn.Linear` is still one. Its instance gets
a subclass (see `adapted_layers`). `.double()` and `.to()` convert and move the adapters too.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lora_export.errors import InputRefused, listed
from lora_export.layers.activation import find_active_tokens, forget_active_tokens
from lora_export.layers.adapted_layers import adapted_class, adapted_experts_class, has_own_branches
from lora_export.layers.attachments import (
    ATTACHMENT,
    BRANCH_PARTS,
    ROW_INDICES,
    TRAINED_ROWS,
    Attachment,
    Branch,
    ReplacedTensor,
    TrainedRows,
    attached_modules,
    attachment_of,
)
from lora_export.layers.folding import folded_tensor, replacement_tensor, target_tensors
from lora_export.layers.frozen_linear import float_weight, four_bit_linear, is_4bit
from lora_export.layers.module_tensors import (
    CONVOLUTION_TYPES,
    ModuleTensor,
    conv1d,
    named_tensors,
    tensor_registry,
    wide_dtype,
)
from lora_export.layers.torch_internals import exchange_class, own_buffers, own_modules, own_parameters, unsaved_buffers
from lora_export.options.spelling import named
from lora_export.pairs.transforms import WeightTransform
from lora_export.plan import Plan, Step

NO_WORD = re.compile(r"\W+", re.ASCII)

# --- Attach ---


def attach(
    module: nn.Module, plan: Plan, *, trainable: bool = False, dropout: float = 0.0, frozen: Collection[str] = ()
) -> None:
    """Attach a plan's adapters, in place: pairs and bias shifts as branches, replaced tensors in place of the base's.

    A and B are registered as `X.lora_A.NAME` and `X.lora_B.NAME`, DoRA's magnitude as `X.lora_magnitude.NAME`;
    all other names stay. A convolution's A has its stride, padding and dilation, so that the branch is W + ΔW
    (PEFT gives it no dilation, and runs it beside "same" alone). With `trainable`, the base is frozen, and A, B, the
    magnitudes and the replaced tensors require gradients. Rows of a table are then a parameter `X.lora_rows` of their
    own, which all names of a tied table share; and a pair may be trained on one name of a tied weight, since W does
    not change. `dropout` is the part of the inputs of A that is dropped in train mode. An embedding has none.
    The pairs of the adapters with a name in `frozen` are not trained, and their inputs are not dropped.
    Raises InputRefused, with the module untouched: tied weights, adapters that are attached already,
    tensors that the module lacks, values that the module's dtype cannot hold, dropout where W + ΔW is used whole.
    """
    targets = target_tensors(module, plan, may_tie=trainable)
    invocations = {one.name: one.invocation_tokens for one in plan.adapters if one.invocation_tokens}
    of_rows = {id(targets[step.spec.stored_name].tensor) for step in plan.steps if step.replaces_only_rows}
    for step in plan.steps:
        _refuse_unattachable(step, targets[step.spec.stored_name])
        if trainable and step.has_dora and id(targets[step.spec.stored_name].tensor) in of_rows:
            raise InputRefused(
                f"{step.weight} has rows that are trained alone: DoRA, whose factor follows from the whole weight, is "
                "not trained beside them"
            )
        _refuse_activated(step, targets[step.spec.stored_name], invocations, trainable=trainable)
        if trainable and step.needs_weight:
            raise InputRefused(f"{step.weight}: {step.terms[0].pair.kind} is not trained here. PEFT trains it")
        if trainable and step.shift is not None:
            raise InputRefused(
                f"{step.weight}: a change of a bias (PEFT's lora_bias) is not trained. The biases themselves can be: "
                f"{named('bias', 'lora_only')}"
            )
    if dropout:
        _refuse_dropout(module, plan, targets)
    replacements = {
        step.weight: replacement_tensor(step, targets[step.weight].tensor) for step in plan.steps if step.has_own_values
    }
    if invocations:
        find_active_tokens(module, set(invocations.values()))
    if trainable:
        module.requires_grad_(False)
    names = _parameter_names(adapter.name for adapter in plan.adapters)
    for step in plan.steps:
        target = targets[step.spec.stored_name]
        attachment = _begin_attachment(target.owner)
        if step.replaces_only_rows and trainable:
            _train_rows(module, target, plan, step)
        elif step.replaces_only_rows:
            _replace_rows(module, target, replacements[step.weight])
        elif step.weight in replacements:
            _replace(target, plan, step, replacements[step.weight], trainable=trainable and not step.terms)
        if step.shift is not None:
            _adapt_class(target.owner)
            target.owner.register_buffer("lora_shift", _adapter_tensor(target.tensor, step.shift))
        if step.terms:
            _adapt_class(target.owner, of_parts=step.spec.region is not None, whole=step.needs_weight)
            _add_branches(target, step, names, invocations, trainable=trainable, frozen=frozen)
            attachment.dropout = dropout


def _refuse_unattachable(step: Step, target: ModuleTensor) -> None:
    owner = target.owner
    if is_4bit(target.tensor) and step.has_own_values:
        raise InputRefused(f"{step.weight} is in 4 bits: a pair can be trained beside it, but not its values")
    if isinstance(owner, four_bit_linear()) and target.attribute == "weight" and not is_4bit(target.tensor):
        raise InputRefused(f"{step.weight} is not quantised yet: move the Linear4bit to its device first")
    if step.needs_weight and (step.spec.region is not None or is_4bit(target.tensor)):
        what = "in 4 bits" if is_4bit(target.tensor) else "a part of another weight"
        raise InputRefused(
            f"{step.weight} is {what}, and the change by {step.terms[0].pair.kind} follows from it whole"
        )
    if step.spec.region is not None and (target.tensor.ndim < 3 or isinstance(owner, CONVOLUTION_TYPES)):
        raise InputRefused(f"{step.weight} is a part of a layer's weight; only a merge into a checkpoint can change it")
    if step.shift is not None and not isinstance(owner, (nn.Linear, *CONVOLUTION_TYPES, *conv1d())):
        raise InputRefused(
            f"{step.weight}: only the bias of a linear layer or a convolution can be shifted, not "
            f"{type(owner).__name__}'s"
        )
    if step.terms and isinstance(owner, CONVOLUTION_TYPES) and owner.groups > 1:
        raise InputRefused(f"{step.weight}: a pair has no meaning beside a convolution of {owner.groups} groups")
    if step.terms and isinstance(owner, nn.Embedding) and owner.max_norm is not None:
        raise InputRefused(f"{step.weight}: an embedding with max_norm changes its rows whenever it is used")
    clashes = [name for name in (*BRANCH_PARTS, "lora_shift", TRAINED_ROWS) if hasattr(owner, name)]
    if not step.is_replacement and clashes:
        raise InputRefused(
            f"{target.name}: its {type(owner).__name__} already has {', '.join(clashes)}; "
            "give the model without its LoRA layers"
        )
    if step.magnitude is not None:
        # Refuses an output of norm zero, which DoRA would turn into NaN.
        folded_tensor(step, float_weight(target.tensor))


def _refuse_activated(
    step: Step, target: ModuleTensor, invocations: Mapping[str, tuple[int, ...]], *, trainable: bool
) -> None:
    """Raise InputRefused for a change on some tokens only, where no branch of a linear layer makes it."""
    if invocations.keys().isdisjoint(term.adapter for term in step.terms):
        return
    if trainable:
        raise InputRefused(f"{step.weight}: an activated LoRA is not trained here. PEFT trains it")
    owner = target.owner
    is_linear = isinstance(owner, (nn.Linear, *conv1d())) and has_own_branches(type(owner))
    if not is_linear or step.spec.region is not None:
        raise InputRefused(
            f"{step.weight}: an activated LoRA acts beside linear layers alone, not beside {type(owner).__name__}"
        )


def _refuse_dropout(module: nn.Module, plan: Plan, targets: Mapping[str, ModuleTensor]) -> None:
    """Raise InputRefused for layers that use W + ΔW: dropping entries of x would change W x too."""
    of_attention = {
        part for owner in module.modules() if isinstance(owner, nn.MultiheadAttention) for part in owner.children()
    }
    whole = []
    for step in plan.steps:
        owner = targets[step.spec.stored_name].owner
        if step.terms and (step.spec.region is not None or owner in of_attention or not has_own_branches(type(owner))):
            whole.append(step.spec.stored_name)
    if whole:
        raise InputRefused(
            "dropout is not possible where a layer uses its weight as a whole (nn.MultiheadAttention, experts, a "
            "forward of its own):",
            listed(sorted(set(whole))),
        )


def _begin_attachment(owner: nn.Module) -> Attachment:
    made: Attachment = owner.__dict__.setdefault(ATTACHMENT, Attachment(type(owner)))
    return made


def _adapt_class(owner: nn.Module, *, of_parts: bool = False, whole: bool = False) -> None:
    original, parameters = attachment_of(owner).original, own_parameters(owner).items()
    stacked = tuple(name for name, value in parameters if value is not None and value.ndim >= 3)
    whole = whole or any(branch.transform is not None for branch in attachment_of(owner).branches)
    adapted = adapted_experts_class(original, stacked) if of_parts else adapted_class(original, whole=whole)
    exchange_class(owner, adapted)


def _adapter_tensor(base: Tensor, array: NDArray[np.float32]) -> Tensor:
    """An adapter's array on the device of the base's tensor: in fp64 where the base is, otherwise in fp32."""
    return torch.tensor(array, dtype=wide_dtype(base.dtype), device=base.device)


def _add_branches(
    target: ModuleTensor,
    step: Step,
    names: Mapping[str, str],
    invocations: Mapping[str, tuple[int, ...]],
    *,
    trainable: bool,
    frozen: Collection[str],
) -> None:
    owner, region = target.owner, step.spec.region
    for term in step.terms:
        name, is_frozen = names[term.adapter], term.adapter in frozen
        if region is not None:
            name = f"{NO_WORD.sub('_', region.written)}_{name}"
        if target.attribute not in ("weight", "in_proj_weight"):  # q, k and v of one attention
            name = f"{target.attribute}_{name}"
        transform = term.pair if isinstance(term.pair, WeightTransform) else None
        arrays = (None,) * 3 if transform is not None else (term.pair.a, term.pair.b, term.pair.magnitude)
        for part, array in zip(BRANCH_PARTS, arrays, strict=True):
            if array is None:
                continue
            if part not in own_modules(owner):
                owner.register_module(part, nn.ParameterDict())
            parameter = nn.Parameter(_adapter_tensor(target.tensor, array), requires_grad=trainable and not is_frozen)
            cast(nn.ParameterDict, own_modules(owner)[part])[name] = parameter
        scale, dora, layout = term.scale, term.pair.magnitude is not None, step.spec.layout
        branch = Branch(
            *(term.adapter, term.module, target.attribute, name, scale, layout, dora, region, is_frozen, transform),
            invocation=invocations.get(term.adapter, ()),
        )
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


def _replace(target: ModuleTensor, plan: Plan, step: Step, value: Tensor, *, trainable: bool) -> None:
    adapter, key = next(
        (adapter.name, key)
        for adapter in plan.adapters
        for key, array in adapter.replaced.items()
        if array is step.replace
    )
    attachment_of(target.owner).replaced += (ReplacedTensor(adapter, key, target.attribute, target.tensor),)
    if isinstance(target.tensor, nn.Parameter):
        value = nn.Parameter(value, requires_grad=trainable and value.is_floating_point())
    tensor_registry(target.owner, target.attribute)[target.attribute] = value


def _replace_rows(module: nn.Module, target: ModuleTensor, value: Tensor) -> None:
    """Replace a table of which some rows are changed, under each of its names: PEFT trains tied tables as one."""
    table = nn.Parameter(value, requires_grad=False)
    for twin in _twins(module, target):
        _begin_attachment(twin.owner).replaced += (ReplacedTensor("", "", twin.attribute, twin.tensor),)
        tensor_registry(twin.owner, twin.attribute)[twin.attribute] = table


def _twins(module: nn.Module, target: ModuleTensor) -> list[ModuleTensor]:
    """The tensor under all its names."""
    return [twin for twin in named_tensors(module) if twin.tensor is target.tensor]


def _train_rows(module: nn.Module, target: ModuleTensor, plan: Plan, step: Step) -> None:
    """Make rows of a table one parameter, which every name of the table reads."""
    assert step.token_rows is not None
    twins = _twins(module, target)
    for twin in twins:
        if not isinstance(twin.owner, nn.Linear | nn.Embedding) or not has_own_branches(type(twin.owner)):
            raise InputRefused(f"{twin.name}: rows of a {type(twin.owner).__name__} cannot be trained alone")
    adapter, name = next(
        (adapter.name, name)
        for adapter in plan.adapters
        for name in adapter.token_rows
        if f".{step.weight}".endswith(f".{name}") or f".{name}".endswith(f".{step.weight}")
    )
    rows = nn.Parameter(_adapter_tensor(target.tensor, step.token_rows.values.astype(np.float32)))
    indices = torch.from_numpy(step.token_rows.indices).to(target.tensor.device)
    for twin in twins:
        _begin_attachment(twin.owner).rows = TrainedRows(adapter, name)
        _adapt_class(twin.owner)
        twin.owner.register_parameter(TRAINED_ROWS, rows)
        twin.owner.register_buffer(ROW_INDICES, indices, persistent=False)


# --- Detach ---


def detach(module: nn.Module) -> None:
    """Undo `attach`: restore the base's classes and tensors, bit for bit.

    Parameters that training froze stay frozen. Raises InputRefused where nothing is attached.
    """
    forget_active_tokens(module)
    for owner in attached_modules(module):
        attachment = attachment_of(owner)
        exchange_class(owner, attachment.original)
        for replaced in attachment.replaced:
            registry = tensor_registry(owner, replaced.attribute)
            registry[replaced.attribute] = _converted(replaced.base, registry[replaced.attribute])
        for part in BRANCH_PARTS:
            own_modules(owner).pop(part, None)
        own_parameters(owner).pop(TRAINED_ROWS, None)
        for buffer in ("lora_shift", ROW_INDICES):
            own_buffers(owner).pop(buffer, None)
            unsaved_buffers(owner).discard(buffer)
        del owner.__dict__[ATTACHMENT]


def _converted(base: Tensor, like: Tensor) -> Tensor:
    """The base's tensor in the dtype and on the device to which the module has since been converted or moved."""
    if base.dtype is like.dtype and base.device == like.device:
        return base
    converted = base.detach().to(like.device, like.dtype)
    return nn.Parameter(converted, requires_grad=base.requires_grad) if isinstance(base, nn.Parameter) else converted


# --- Scale and disable ---


@contextlib.contextmanager
def scale_adapters(
    module: nn.Module,
    factor: float,
    *,
    keep_replaced: bool = False,
    scale_replaced: bool = False,
    in_fp64: bool = False,
) -> Iterator[None]:
    """Multiply every branch and bias shift by `factor` while the context is active.

    At factor 0 the adapters are disabled, and the output is the base's, bit for bit. The replaced tensors are then
    the base's own too, unless `keep_replaced`. At any other factor they stay, since a replaced tensor has no
    strength; with `scale_replaced`, their difference from the base is multiplied. With `in_fp64` the product is in
    fp64, whatever the module is in. Contexts nest.
    Raises InputRefused where nothing is attached.
    """
    before = [(attachment_of(owner), attachment_of(owner).factor) for owner in attached_modules(module)]
    tensors_before: list[tuple[dict[str, Any], str, Tensor]] = []
    for owner in attached_modules(module):
        attachment = attachment_of(owner)
        attachment.factor *= factor
        for replaced in attachment.replaced if (factor == 0 and not keep_replaced) or scale_replaced else ():
            registry = tensor_registry(owner, replaced.attribute)
            tensors_before.append((registry, replaced.attribute, registry[replaced.attribute]))
            current = registry[replaced.attribute]
            current = current.double() if in_fp64 and current.is_floating_point() else current
            registry[replaced.attribute] = scaled_replacement(replaced, current, factor)
        if attachment.rows is not None and factor == 0 and not keep_replaced:
            rows, weight = own_parameters(owner)[TRAINED_ROWS], cast(Tensor, own_parameters(owner)["weight"])
            tensors_before.append((own_parameters(owner), TRAINED_ROWS, cast(Tensor, rows)))
            own_parameters(owner)[TRAINED_ROWS] = nn.Parameter(
                weight[own_buffers(owner)[ROW_INDICES]].detach(), requires_grad=False
            )
    try:
        yield
    finally:
        for attachment, factor_before in before:
            attachment.factor = factor_before
        for registry, attribute, tensor in reversed(tensors_before):
            registry[attribute] = tensor


@contextlib.contextmanager
def without_branches(module: nn.Module, off: Collection[Branch]) -> Iterator[None]:
    """Leave these branches out while the context is active. All others, and the replaced tensors, stay.

    Raises InputRefused where nothing is attached.
    """
    before = [(attachment_of(owner), attachment_of(owner).branches) for owner in attached_modules(module)]
    for attachment, branches in before:
        attachment.branches = tuple(branch for branch in branches if branch not in off)
    try:
        yield
    finally:
        for attachment, branches in before:
            attachment.branches = branches


@contextlib.contextmanager
def switched_branches(module: nn.Module, is_on: Mapping[Branch, Tensor]) -> Iterator[None]:
    """Compute each of these branches only where its bool is true, while the context is active.

    A bool may be one of many that `torch.vmap` maps: a layer then computes with its branch in some rows of a batch.
    Only pairs that are branches beside W x can be switched (`has_own_branches`).
    Raises InputRefused where nothing is attached.
    """
    attachments = [attachment_of(owner) for owner in attached_modules(module)]
    for attachment in attachments:
        attachment.is_on = {branch: is_on[branch] for branch in attachment.branches if branch in is_on}
    try:
        yield
    finally:
        for attachment in attachments:
            attachment.is_on = {}


def scaled_replacement(replaced: ReplacedTensor, current: Tensor, factor: float) -> Tensor:
    """The base's tensor plus `factor` times the difference of the `current` one from it."""
    base = _converted(replaced.base, current)
    if factor == 0 or not current.is_floating_point():
        return base
    scaled = base.detach() + factor * (current.detach() - base.detach())
    return nn.Parameter(scaled, requires_grad=False) if isinstance(current, nn.Parameter) else scaled
