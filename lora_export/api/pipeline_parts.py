"""The parts of adapters that belong to the models of a diffusion pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lora_export.lora import Adapter
from lora_export.plan.build import checked_strengths
from lora_export.plan.diffusion import components_of, of_component
from lora_export.weights.pipeline import Pipeline


@dataclass
class ModelParts:
    """What adapters change in one model of a pipeline."""

    adapters: list[Adapter] = field(default_factory=list)
    strengths: list[float] = field(default_factory=list)


def parts_by_model(
    pipeline: Pipeline, adapters: Sequence[Adapter], strengths: Sequence[float]
) -> tuple[dict[str, ModelParts], tuple[str, ...]]:
    """The parts of the adapters by the folder of their model, and notes for the user.

    A part without effect, as before training, is left out with a note: its model stays as it is. Raises InputRefused
    for a component that the pipeline lacks, and for an adapter that has no effect on any model.
    """
    parts: dict[str, ModelParts] = {}
    notes = []
    for adapter, strength in zip(adapters, checked_strengths(adapters, strengths), strict=True):
        components = components_of(adapter)
        for component in components:
            folder = pipeline.folder_of(component, components)
            part = of_component(adapter, component)
            if part.is_identity:
                notes.append(f"{adapter.name} changes nothing in {folder}: its values there are those before training")
                continue
            own = parts.setdefault(folder, ModelParts())
            own.adapters.append(part)
            own.strengths.append(strength)
    return parts, tuple(notes)
