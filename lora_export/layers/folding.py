"""A plan folded into the weights of an nn.Module, in memory."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from lora_export import sums
from lora_export.errors import InputRefused, listed
from lora_export.layers.adapted_layers import part_of, per_output
from lora_export.layers.four_bit_weights import is_4bit
from lora_export.layers.module_tensors import as_tensor, named_tensors, oriented, wide_dtype
from lora_export.layers.plan_targets import target_tensors, untie
from lora_export.plan import Plan, Step


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
    start = base.detach() if step.replace is None else as_tensor(np.asarray(step.replace)).to(base.device)
    change = _change(step, wide_dtype(base.dtype)).to(base.device)
    total = oriented(start, step.spec.layout).to(change.dtype) + change
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
        raise InputRefused(f"{step.weight}: {bad} values would not be finite: {why}. Nothing was changed.")
    return result


def _change(step: Step, wide: torch.dtype) -> Tensor:
    """The shift of a bias, or ΔW as (out, in, ...), before DoRA rescales the sum."""
    if step.shift is not None or wide is torch.float32:
        return as_tensor(sums.delta(step)).to(wide)
    deltas = []
    for term in step.terms:
        a, b = (as_tensor(factor).to(wide) for factor in (term.pair.a, term.pair.b))
        product = (b.flatten(1) @ a.flatten(1)) * term.scale
        deltas.append(product.reshape(term.pair.shape))
    return torch.stack(deltas).sum(0)
