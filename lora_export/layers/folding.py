"""A plan folded into the weights of an nn.Module, in memory; the tensors that a plan changes, and ties among them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lora_export import sums
from lora_export.errors import InputRefused, count, listed
from lora_export.layers.attachments import attachment_of, is_attached, part_of, per_output
from lora_export.layers.frozen_linear import is_4bit
from lora_export.layers.module_tensors import (
    ModuleTensor,
    as_array,
    as_tensor,
    named_tensors,
    oriented,
    specs,
    tensor_registry,
    wide_dtype,
)
from lora_export.lora import Adapter
from lora_export.options.spelling import named
from lora_export.plan import Layout, Plan, Step, Tied, Ties, are_same_change
from lora_export.plan.match_names import BaseTensors, find_prefix
from lora_export.plan.ties import shared, with_rows_of_all_names, with_saved_tables


def target_tensors(module: nn.Module, plan: Plan, *, may_tie: bool = False) -> dict[str, ModuleTensor]:
    """The module's tensors by name, among them the target of every step of the plan.

    With `may_tie`, a pair on one name of a tied weight is allowed.

    Raises InputRefused for what neither `attach` nor `fold` can do: adapters that are already attached,
    tensors that the module lacks, and tied weights.
    """
    _refuse_attached(module)
    added = [step.weight for step in plan.steps if step.added]
    if added:
        raise InputRefused(f"the module has no {', '.join(added)}: load it with the head that the adapter was made for")
    if not may_tie:
        refuse_tied(module, plan)
    return {target.name: target for target in named_tensors(module)}


def _refuse_attached(module: nn.Module) -> None:
    attachments = [attachment_of(owner) for owner in module.modules() if is_attached(owner)]
    if not attachments:
        return
    names = {branch.adapter for attachment in attachments for branch in attachment.branches}
    names |= {tensor.adapter or "rows of tokens" for attachment in attachments for tensor in attachment.replaced}
    raise InputRefused(
        f"adapters are attached already ({', '.join(sorted(names))}): detach first, or make one plan of all of them"
    )


def refuse_tied(module: nn.Module, plan: Plan) -> None:
    """Raise InputRefused if a step changes a tensor that the module has under several names.

    Allowed are rows of tokens, which PEFT trains for all names at once, whole tensors, with which a name gets a tensor
    of its own, and equal changes of all names.
    """
    tied = [
        group for group in _changed_ties(module, plan) if not (_are_equal(group, plan) or _get_own_tensors(group, plan))
    ]
    if tied:
        groups = "; ".join(" and ".join(target.name for target in group) for group in tied)
        raise InputRefused(
            f"one tensor under several names: {groups}. A change under one name would silently change the others. "
            f"{named('tied', 'untie')} gives each a tensor of its own, as the adapter was trained; "
            f"{named('tied', 'both')} changes all of them. Nothing was changed."
        )


def untie(module: nn.Module, plan: Plan, *, keep_equal: bool = False) -> list[str]:
    """Give each name of a tied tensor that steps change a parameter of its own, with the same values, in place.

    Returns these names. With `keep_equal`, a tensor stays tied if all its names change equally. For plans that
    `refuse_tied` accepts.
    """
    untied = []
    for group in _changed_ties(module, plan):
        for target in group[1:] if not (keep_equal and _are_equal(group, plan)) else ():
            copy = nn.Parameter(target.tensor.detach().clone(), requires_grad=target.tensor.requires_grad)
            tensor_registry(target.owner, target.attribute)[target.attribute] = copy
            untied.append(target.name)
    return untied


def with_tied_rows(module: nn.Module, adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters, under the names of the module, with trained rows of a table for all names that are tied to it.

    So are tables that are saved beside a pair.
    """
    tied, names = _tied_names(module), BaseTensors(specs(module))
    of_rows, of_tables = Ties(Tied.UNTIE, {**_stated_ties(module), **tied}), Ties(Tied.UNTIE, tied)
    prefixes = [find_prefix(adapter, names) for adapter in adapters]
    return [
        with_saved_tables(with_rows_of_all_names(adapter, of_rows, prefix), of_tables, prefix)
        for adapter, prefix in zip(adapters, prefixes, strict=True)
    ]


def with_shared_ties(module: nn.Module, adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters, under the names of the module, with the changes of one tied tensor for all its names.

    Raises InputRefused as `plan.ties.shared`.
    """
    tables = {spec.name for spec in specs(module) if spec.layout is Layout.EMBEDDING}
    ties, names = Ties(Tied.BOTH, _tied_names(module)), BaseTensors(specs(module))
    prefixes = [find_prefix(adapter, names) for adapter in adapters]
    return [
        shared(with_rows_of_all_names(adapter, ties, prefix), ties, prefix, tables)
        for adapter, prefix in zip(adapters, prefixes, strict=True)
    ]


def _tied_names(module: nn.Module) -> dict[str, str]:
    """Names of tied tensors -> the first name, which is that of the input embeddings in models of transformers."""
    return {target.name: group[0].name for group in _tie_groups(module) for target in group[1:]}


def _stated_ties(module: nn.Module) -> dict[str, str]:
    """The ties that the configs of transformers' models state: PEFT trains rows for these, also of other values."""
    found: dict[str, str] = {}
    for path, part in module.named_modules():
        stated = getattr(part, "get_expanded_tied_weights_keys", None)
        start = f"{path}." if path else ""
        found |= {start + name: start + source for name, source in (stated() if callable(stated) else {}).items()}
    return found


def has_changed_ties(module: nn.Module, plan: Plan) -> bool:
    """Whether steps change tensors that the module has under several names."""
    return bool(_changed_ties(module, plan))


def _changed_ties(module: nn.Module, plan: Plan) -> list[list[ModuleTensor]]:
    """The names of every tensor that has several, where a step changes one of them.

    Rows of the first name alone are no such change: PEFT trains these for all names.
    """
    changed = {step.spec.stored_name for step in plan.steps if not step.replaces_only_rows}
    with_rows = {step.spec.stored_name for step in plan.steps if step.replaces_only_rows}
    return [
        group
        for group in _tie_groups(module)
        if any(target.name in changed for target in group) or any(target.name in with_rows for target in group[1:])
    ]


def _tie_groups(module: nn.Module) -> list[list[ModuleTensor]]:
    """The names of every tensor that has several."""
    groups: dict[int, list[ModuleTensor]] = {}
    for target in named_tensors(module):
        tensor = target.tensor
        # The address also finds two parameters that share their memory; meta tensors have none.
        groups.setdefault(tensor.data_ptr() or id(tensor), []).append(target)
    return [group for group in groups.values() if len(group) > 1]


def _are_equal(group: Sequence[ModuleTensor], plan: Plan) -> bool:
    steps = [plan.by_weight.get(target.name) for target in group]
    first, *others = steps
    return first is not None and all(other is not None and are_same_change(first, other) for other in others)


def _get_own_tensors(group: Sequence[ModuleTensor], plan: Plan) -> bool:
    """Whether whole tensors replace the changed names, and each name has a place of its own in the module."""
    steps = [plan.by_weight[target.name] for target in group if target.name in plan.by_weight]
    places = {(id(target.owner), target.attribute) for target in group}
    return all(step.replace is not None and not step.terms for step in steps) and len(places) == len(group)


def fold(module: nn.Module, plan: Plan) -> None:
    """Add a plan's changes to the weights, in place, and copy its replaced tensors over those of the base.

    ΔW and the sum are computed in fp32 (fp64 for fp64 weights) and rounded once to the weight's dtype. In fp32
    the ΔW is the array that a merge of the checkpoint adds. Each ΔW is computed twice, so that everything is
    checked before anything is changed. Raises InputRefused as `attach` does, and for results that are not finite.
    """
    targets = target_tensors(module, plan)
    if packed := [step.weight for step in plan.steps if is_4bit(targets[step.spec.stored_name].tensor)]:
        raise InputRefused("nothing is folded into weights in 4 bits:", listed(packed))
    for step in plan.steps:
        folded_tensor(step, _changed_part(step, targets[step.spec.stored_name].tensor))
    untie(module, plan, keep_equal=True)
    tensors = {target.name: target.tensor for target in named_tensors(module)}
    changes = ((tensors[step.spec.stored_name], step) for step in plan.steps)
    by_tensor = {(id(tensor), step.spec.region and step.weight): (tensor, step) for tensor, step in changes}
    with torch.no_grad():
        for tensor, step in by_tensor.values():
            part = _changed_part(step, tensor)
            part.copy_(folded_tensor(step, part))


def _changed_part(step: Step, tensor: Tensor) -> Tensor:
    """The tensor, or a view of the part of it that the step changes. Raises InputRefused for a scattered one."""
    if step.spec.region is None:
        return tensor
    if not tensor.is_contiguous():
        raise InputRefused(f"{step.weight}: the tensor is not contiguous. Nothing was changed.")
    return part_of(tensor, step.spec.region)


def folded_tensor(step: Step, base: Tensor) -> Tensor:
    """The result of a step on the base's tensor, in its dtype. Raises InputRefused unless all values are finite."""
    if step.is_replacement:
        return replacement_tensor(step, base)
    start = base.detach() if step.replace is None else as_tensor(step.replace).to(base.device)
    weight = oriented(start, step.spec.layout)
    change = _change(step, weight, wide_dtype(base.dtype)).to(base.device)
    total = weight.to(change.dtype) + change
    if step.magnitude is not None:
        norm = total.double().flatten(1).norm(dim=1)
        if not norm.all():
            raise InputRefused(
                f"{step.weight}: W + sBA is zero in {int((norm == 0).sum())} of its outputs, to which DoRA cannot "
                "give a length. Nothing was changed."
            )
        total = total * per_output((as_tensor(step.magnitude).to(norm) / norm).to(total.dtype), total.ndim)
    return _finite(step, start, oriented(total, step.spec.layout), base.dtype)


def replacement_tensor(step: Step, base: Tensor) -> Tensor:
    """The tensor that replaces the base's, in its dtype. Raises InputRefused unless all values are finite."""
    replacement = base.detach().clone() if step.replace is None else as_tensor(step.replace).to(base.device)
    if step.token_rows is not None:
        indices = torch.from_numpy(step.token_rows.indices).to(base.device)
        replacement[indices] = as_tensor(step.token_rows.values).to(replacement)
    return _finite(step, replacement, replacement, base.dtype)


def _finite(step: Step, before: Tensor, wide: Tensor, dtype: torch.dtype) -> Tensor:
    """`wide` rounded to `dtype`. Raises InputRefused, with the cause, unless all values are finite."""
    result = wide.to(dtype)
    if result.is_floating_point() and not result.isfinite().all():
        bad = result.numel() - int(result.isfinite().sum())
        if wide.isfinite().all():
            limit = torch.finfo(dtype).max
            why = f"the largest is {wide.abs().max():.4g}, {step.spec.dtype} holds up to {limit:.4g}"
        else:
            why = "the base's own tensor has some" if not before.isfinite().all() else "the sum overflows"
        raise InputRefused(f"{step.weight}: {count(bad, 'value')} would not be finite: {why}. Nothing was changed.")
    return result


def _change(step: Step, weight: Tensor, wide: torch.dtype) -> Tensor:
    """The shift of a bias, or ΔW as (out, in, ...), before DoRA rescales the sum."""
    if step.shift is not None or step.needs_weight or wide is torch.float32:
        read = as_array(weight) if step.needs_weight else None
        return as_tensor(sums.delta(step, read)).to(wide)
    deltas = []
    for term in step.terms:
        a, b = (as_tensor(factor).to(wide) for factor in (term.pair.a, term.pair.b))
        product = (b.flatten(1) @ a.flatten(1)) * term.scale
        deltas.append(product.reshape(term.pair.shape))
    return torch.stack(deltas).sum(0)
