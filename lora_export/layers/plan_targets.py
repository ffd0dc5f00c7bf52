"""The tensors of an nn.Module that a plan changes, and the plans that no module can take."""

from __future__ import annotations

from torch import nn

from lora_export.errors import InputRefused
from lora_export.layers.adapted_layers import attachment_of, is_attached
from lora_export.layers.module_tensors import ModuleTensor, named_tensors
from lora_export.plan import Plan


def target_tensors(module: nn.Module, plan: Plan) -> dict[str, ModuleTensor]:
    """The module's tensors by name, among them the target of every step of the plan.

    Raises InputRefused for what neither `attach` nor `fold` can do: adapters that are already attached,
    tensors that the module lacks, and tied weights.
    """
    _refuse_attached(module)
    added = [step.weight for step in plan.steps if step.added]
    if added:
        raise InputRefused(f"the module has no {', '.join(added)}: load it with the head that the adapter was made for")
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
    """Raise InputRefused if a step changes a tensor that the module has under several names."""
    names: dict[int, list[str]] = {}
    for target in named_tensors(module):
        tensor = target.tensor
        # The address also finds two parameters that share their memory; meta tensors have none.
        names.setdefault(tensor.data_ptr() or id(tensor), []).append(target.name)
    steps = {
        step.weight for step in plan.steps if not step.replaces_only_rows
    }  # PEFT trains rows for all names at once
    tied = [group for group in names.values() if len(group) > 1 and any(name in steps for name in group)]
    if tied:
        groups = "; ".join(" and ".join(group) for group in tied)
        raise InputRefused(
            f"one tensor under several names: {groups}. A change under one name would silently change the others. "
            "Untie them explicitly (a copy for each; tie_word_embeddings: false in a Hugging Face config), or "
            "leave the layer out of the adapter. Nothing was changed."
        )
