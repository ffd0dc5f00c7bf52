"""An adapter of a diffusion pipeline under the names of its models, or of the models' authors."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from lora_export import plan
from lora_export.errors import InputRefused, listed
from lora_export.lora import Adapter, component_name
from lora_export.plan.conversion.loaded_names import TensorConversion
from lora_export.plan.diffusion.components import components_of, joined_components, of_component
from lora_export.plan.diffusion.other_layout import OtherLayout, other_layouts
from lora_export.plan.spelling import respelled
from lora_export.weights.checkpoint import Checkpoint, open_checkpoint
from lora_export.weights.pipeline import is_pipeline, open_pipeline


def named_for_pipeline(adapter: Adapter, base: Path, *, original: bool) -> Adapter:
    """The adapter under the names of a pipeline's models, or of the one model at `base`; each with its component.

    With `original`, the names are those of the models' authors, where diffusers has others. Reads headers only. Raises
    InputRefused (MatchError) where the adapter does not fit, and for changes that are a part of an original weight.
    """
    parts = []
    components = components_of(adapter)
    for component in components:
        folder = _folder_of(base, component, components)
        checkpoint = open_checkpoint(folder)
        part = of_component(adapter, component)
        plan.make([part], checkpoint.specs, identity_ok=True, unknown_layout_ok=True, rules=checkpoint.rules)
        (named,) = respelled([part], checkpoint.specs, checkpoint.rules)
        own = _original(named, checkpoint) if original else named
        parts.append(own.renamed(functools.partial(component_name, component)))
    return joined_components(adapter, parts)


def _folder_of(base: Path, component: str, components: list[str]) -> Path:
    if is_pipeline(base):
        pipeline = open_pipeline(base)
        return pipeline.models[pipeline.folder_of(component, components)]
    if len(components) > 1:
        raise InputRefused(
            f"{base} is one model, and the adapter changes several. Give the folder of the pipeline as --base"
        )
    return base


def _original(adapter: Adapter, checkpoint: Checkpoint) -> Adapter:
    """The adapter under the names of the model's authors, where each of its weights is one of theirs."""
    shapes = {spec.name: spec.shape for spec in checkpoint.specs}
    layout = _layout_of_authors(shapes, checkpoint.config.get("_class_name"))
    if layout is None:
        return adapter
    new, parts = {}, []
    for name, tensor in layout.tensors.items():
        for source in tensor.sources:
            module = source.rpartition(".")[0]
            if tensor.conversion is None or _is_rename(name, tensor.conversion, shapes):
                new[module] = name.rpartition(".")[0]
            elif module in adapter.pairs and module not in parts:
                parts.append(module)
    if parts:
        raise InputRefused(
            f"the format comfyui cannot express everything in {adapter.name}:",
            listed([f"{module}: a part of a weight of the original model" for module in sorted(parts)]),
            "Nothing was written.",
        )

    def original_name(name: str) -> str:
        module, dot, what = name.rpartition(".")
        return new.get(name) or new.get(module, module) + dot + what

    return adapter.renamed(original_name)


def _layout_of_authors(names: Iterable[str], diffusers_class: object) -> OtherLayout | None:
    """The layout of the authors, for a model of diffusers whose class has one. Two families may share many names."""
    layouts = [layout for layout in other_layouts(names) if layout.is_original]
    return next((layout for layout in layouts if layout.diffusers_class == diffusers_class), None)


def _is_rename(name: str, conversion: TensorConversion, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether a tensor of the other layout is one of this one, entry by entry."""
    whole = conversion.assembled(shapes.__getitem__)[name]
    (piece, *more) = whole.pieces
    return not more and all(
        np.array_equal(own, np.arange(size)) for own, size in zip(piece.indices, shapes[piece.source], strict=True)
    )
