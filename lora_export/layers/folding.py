"""A plan folded into the weights of an nn.Module, in memory."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from lora_export.errors import InputRefused
from lora_export.layers.branched import STATE, attachment_of, spread
from lora_export.layers.module_tensors import Place, as_tensor, oriented, places_in, wide_dtype
from lora_export.plan import Plan, Step


def fold(module: nn.Module, plan: Plan) -> None:
    """Add a plan's changes to the weights, in place, and put its whole tensors there.

    ΔW and the sum in fp32 (fp64 for fp64 weights), one rounding to the weight's dtype. In fp32 the ΔW is
    the array that a merge of the checkpoint adds. Each ΔW is computed twice, so that everything is checked
    before anything is changed. Raises InputRefused as `attach` does, and for results that are not finite.
    """
    places = places_of(module, plan)
    for step in plan.steps:
        result_of(step, places[step.weight].tensor)
    with torch.no_grad():
        for step in plan.steps:
            tensor = places[step.weight].tensor
            tensor.copy_(result_of(step, tensor))


def result_of(step: Step, base: Tensor) -> Tensor:
    """What a step makes of the base's tensor, in its dtype. Raises InputRefused unless all is finite."""
    if step.is_whole:
        return whole_of(step, base)
    start = base.detach() if step.replace is None else as_tensor(np.asarray(step.replace)).to(base.device)
    change = _change(step, wide_dtype(base.dtype)).to(base.device)
    total = oriented(start, step.spec.layout).to(change.dtype) + change
    if step.magnitude is not None:
        length = total.double().flatten(1).norm(dim=1)
        if not length.all():
            raise InputRefused(
                f"{step.weight}: W + sBA is zero in {int((length == 0).sum())} of its outputs, to which DoRA cannot "
                "give a length. Nothing was changed."
            )
        total = total * spread((as_tensor(step.magnitude).to(length) / length).to(total.dtype), total.ndim)
    return _finite(step, start, oriented(total, step.spec.layout), base.dtype)


def whole_of(step: Step, base: Tensor) -> Tensor:
    """The tensor that takes the base's place, in its dtype. Raises InputRefused unless all is finite."""
    whole = base.detach().clone() if step.replace is None else as_tensor(step.replace).to(base.device)
    if step.rows is not None:
        places = torch.from_numpy(step.rows.indices).to(base.device)
        whole[places] = as_tensor(step.rows.values).to(whole)
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
        return as_tensor(step.delta()).to(wide)
    deltas = []
    for term in step.terms:
        a, b = (as_tensor(side).to(wide) for side in (term.pair.a, term.pair.b))
        product = (b.flatten(1) @ a.flatten(1)) * (term.strength * term.pair.scale)
        deltas.append(product.reshape(term.pair.shape))
    return torch.stack(deltas).sum(0)


# --- What neither folding nor attaching can do ---


def places_of(module: nn.Module, plan: Plan) -> dict[str, Place]:
    """Where each step lands. Raises InputRefused for what neither `attach` nor `fold` can do."""
    attachments = [attachment_of(owner) for owner in module.modules() if STATE in owner.__dict__]
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
    return {place.name: place for place in places_in(module)}


def refuse_tied(module: nn.Module, plan: Plan) -> None:
    """Raises InputRefused where a step lands on a tensor that the module has under several names."""
    names: dict[int, list[str]] = {}
    for place in places_in(module):
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
