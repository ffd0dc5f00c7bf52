"""A PyTorch model, and adapters as they are to be applied to it: combined, and tied tensors untied or changed alike.

What a merge decides in its plan is decided here before there is a plan, for all that the model is used for: the export,
and the references that judge it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lora_export import layers, plan
from lora_export.adapters.combine import combined_unless_exact
from lora_export.callbacks import OnMessage
from lora_export.lora import Adapter
from lora_export.models.model import Model
from lora_export.options.combining import Applied
from lora_export.options.spelling import named
from lora_export.verification.module_copies import shared_copy


@dataclass(frozen=True, eq=False)
class AdaptedModel:
    """A model, and the adapters to attach to it with their strengths."""

    model: Model
    adapters: list[Adapter]
    strengths: Sequence[float]


def adapted_model(
    model: Model, adapters: Sequence[Adapter], strengths: Sequence[float], applied: Applied, on_message: OnMessage
) -> AdaptedModel:
    """The model and the adapters under its names, combined into one unless the combination is the exact sum.

    The model that is given does not change. Raises InputRefused for pairs that cannot be combined and for tied tensors
    that cannot be handled so, and for a stated layout that contradicts the model; MatchError where an adapter to be
    untied does not fit.
    """
    if applied.layout:
        model = replace(model, module=shared_copy(model.module))
        if not layers.state_layouts(model.module, applied.layout):
            on_message(f"note: {named('layout')} has no effect: the classes of the model's layers determine their own")
    adapters = layers.with_tied_rows(model.module, layers.respelled_for(model.module, adapters))
    if applied.tied == "both":
        adapters = layers.with_shared_ties(model.module, adapters)
    adapters, strengths = combined_unless_exact(adapters, strengths, applied.combined)
    if applied.tied == "untie" and adapters:
        steps = plan.make(adapters, layers.specs(model.module), strengths=strengths)
        if layers.has_changed_ties(model.module, steps):
            module = shared_copy(model.module)
            names = layers.untie(module, steps, keep_equal=True)
            for name in names:
                on_message(f"note: {name} is no longer tied to another tensor of the model")
            model = replace(model, module=module)
    return AdaptedModel(model, adapters, strengths)
