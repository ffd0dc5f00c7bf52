"""Adapters for the models of a diffusion pipeline: their components, its family, and its models in one checkpoint.

Text encoders have other numbers in other formats:

| family | diffusers' folders | kohya | ComfyUI |
|---|---|---|---|
| Stable Diffusion 1, 2 | text_encoder | te | clip_l |
| Stable Diffusion XL | text_encoder, text_encoder_2 | te1, te2 | clip_l, clip_g |
| Stable Diffusion 3 | text_encoder, text_encoder_2, text_encoder_3 (T5) | te1, te2, te3 | clip_l, clip_g, t5xxl |
| Flux | text_encoder, text_encoder_2 (T5) | te1, te3 | clip_l, t5xxl |

An `Adapter` calls T5 the third text encoder in each of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from enum import Enum
from typing import Any

from lora_export.errors import InputRefused
from lora_export.lora import (
    COMPONENTS,
    DENOISER,
    SECOND_DENOISER,
    TEXT_ENCODERS,
    Adapter,
    component_name,
    split_component,
)
from lora_export.options.spelling import command, named
from lora_export.plan.types import TensorSpec

# The names that users know, for the option `component`. What removes the noise is a UNet or a transformer.
COMPONENT_OPTIONS = {
    "unet": DENOISER,
    "transformer": DENOISER,
    "transformer_2": SECOND_DENOISER,
    **{name: name for name in COMPONENTS if name not in (DENOISER, SECOND_DENOISER)},
}
_SHOWN = {DENOISER: "unet or transformer", SECOND_DENOISER: "transformer_2", TEXT_ENCODERS[2]: "text_encoder_3 (T5)"}


def components_of(adapter: Adapter) -> list[str]:
    """The components whose models the adapter changes, in the order of COMPONENTS; the empty one first, if any."""
    found = {split_component(name)[0] for name in adapter.names}
    return [component for component in ("", *COMPONENTS) if component in found]


def of_component(adapter: Adapter, component: str, *, named: bool = False) -> Adapter:
    """What the adapter changes in one component. Only with `named`, the names still begin with the component."""

    def of_it(name: str) -> str | None:
        owner, own = split_component(name)
        return None if owner != component else name if named else own

    return adapter.renamed(of_it)


def joined_components(adapter: Adapter, parts: Iterable[Adapter]) -> Adapter:
    """The adapter with what its parts contain, under their names. No two parts may share a name."""
    parts = list(parts)
    tables: dict[str, Any] = {
        table: {name: value for part in parts for name, value in getattr(part, table).items()}
        for table in ("pairs", "biases", "added", "layouts", "spelling")
    }
    return replace(adapter, flattened=False, **tables)


def only_component(adapter: Adapter) -> Adapter:
    """The adapter for one model, without the component in its names. Raises InputRefused where it has several."""
    found = components_of(adapter)
    if len(found) > 1:
        raise InputRefused(
            f"{adapter.name} has changes for several models of a pipeline: {listed_components(found)}. Give the folder "
            f"of the pipeline to `{command('merge')}`, or choose one model by {named('component')}"
        )
    return of_component(adapter, found[0]) if found and found[0] else adapter


def chosen_component(adapter: Adapter, chosen: str) -> Adapter:
    """The adapter with its changes of one model alone. `chosen` is a key of COMPONENT_OPTIONS; empty chooses all.

    Raises InputRefused where it has none for this model.
    """
    if not chosen:
        return adapter
    found, component = components_of(adapter), COMPONENT_OPTIONS[chosen]
    if component == TEXT_ENCODERS[1] and component not in found and TEXT_ENCODERS[2] in found:
        component = TEXT_ENCODERS[2]  # T5, which is the second text encoder of Flux's pipelines
    if component not in found:
        raise InputRefused(f"{adapter.name} has no changes for {chosen}. It has some for {listed_components(found)}")
    left = [each for each in found if each != component]
    if not left:
        return adapter
    one = of_component(adapter, component, named=True)
    note = f"{adapter.name}: only its changes of {chosen} are used, not those of {listed_components(left)}."
    return replace(one, notes=(*one.notes, note))


def listed_components(components: list[str]) -> str:
    """Components as users know them, for a message."""
    return ", ".join(_SHOWN.get(component, component or "modules without a component") for component in components)


# --- The family of a pipeline ---

CLIP, SECOND_CLIP, T5 = TEXT_ENCODERS
# Names of modules, with dots or flattened.
OF_T5 = re.compile(r"(.*[._])?encoder[._]block[._]\d+[._]layer[._].*")
OF_A_UNET = re.compile(r"(down_blocks|mid_block|up_blocks|input_blocks|middle_block|output_blocks)[._].*")
OF_FLUX = re.compile(r"(double_blocks|single_blocks|single_transformer_blocks)[._].*")
OF_SD_3 = re.compile(r"joint_blocks[._].*")
DEEP_BLOCK = re.compile(r".*[._]transformer_blocks[._]([1-9]\d*)[._].*")  # Stable Diffusion 1 and 2 have only 0


class Family(Enum):
    """A kind of pipeline."""

    SD = "Stable Diffusion"
    XL = "Stable Diffusion XL"
    SD_3 = "Stable Diffusion 3"
    FLUX = "Flux"
    OTHER_TRANSFORMER = "another transformer"
    UNKNOWN = "unknown"


def family_of_pipeline(name: str) -> Family:
    """The family by the class of a pipeline in diffusers, such as `FluxImg2ImgPipeline`."""
    beginnings = {
        "StableDiffusionXL": Family.XL,
        "StableDiffusion3": Family.SD_3,
        "StableDiffusion": Family.SD,
        "Flux2": Family.OTHER_TRANSFORMER,
        "Flux": Family.FLUX,
    }
    return next((family for start, family in beginnings.items() if name.startswith(start)), Family.UNKNOWN)


def family_of_model(config: Mapping[str, Any]) -> Family:
    """The family by the config of the model that removes the noise."""
    by_class = {"SD3Transformer2DModel": Family.SD_3, "FluxTransformer2DModel": Family.FLUX}
    name = str(config.get("_class_name", ""))
    if name == "UNet2DConditionModel":
        return Family.XL if config.get("addition_embed_type") == "text_time" else Family.SD
    return by_class.get(name, Family.OTHER_TRANSFORMER if "Transformer" in name else Family.UNKNOWN)


def family_of_names(names: Iterable[str]) -> Family:
    """The family by the names in an adapter, each with its component; UNKNOWN where they do not tell."""
    by_component: dict[str, list[str]] = {}
    for name in names:
        component, module = split_component(name)
        by_component.setdefault(component or DENOISER, []).append(module)
    own = by_component.get(DENOISER, [])
    if any(map(OF_A_UNET.fullmatch, own)):
        return Family.XL if SECOND_CLIP in by_component or any(map(DEEP_BLOCK.fullmatch, own)) else Family.SD
    if any(map(OF_FLUX.fullmatch, own)):
        return Family.FLUX
    if any(map(OF_SD_3.fullmatch, own)) or {SECOND_CLIP, T5} <= by_component.keys():
        return Family.SD_3
    if own:
        return Family.OTHER_TRANSFORMER
    return Family.XL if SECOND_CLIP in by_component else Family.UNKNOWN


def by_role(name: str) -> str:
    """The name of a module in a diffusers pipeline, whose second text encoder may be T5, as `Adapter` has it."""
    component, module = split_component(name)
    return component_name(T5, module) if component == SECOND_CLIP and OF_T5.fullmatch(module) else name


# --- The models in one checkpoint, each under a prefix of its own ---

# Component -> the prefixes that its tensors may have, in files of Stable Diffusion 1, 2, XL and 3, and ComfyUI's.
PREFIXES_OF_MODELS = {
    DENOISER: ("model.diffusion_model.",),
    TEXT_ENCODERS[0]: (
        "cond_stage_model.transformer.",
        "cond_stage_model.model.",
        "conditioner.embedders.0.transformer.",
        "text_encoders.clip_l.transformer.",
    ),
    TEXT_ENCODERS[1]: ("conditioner.embedders.1.model.", "text_encoders.clip_g.transformer."),
    TEXT_ENCODERS[2]: ("text_encoders.t5xxl.transformer.",),
}


def prefixes_of_models(names: Iterable[str]) -> dict[str, str]:
    """The prefix of each component that is in a checkpoint with these names; empty where it has one model alone."""
    found: dict[str, str] = {}
    for name in names:
        for component, prefixes in PREFIXES_OF_MODELS.items():
            prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
            if prefix is not None:
                found.setdefault(component, prefix)
    return found if len(found) > 1 else {}


def tensors_of_model(base: Mapping[str, TensorSpec], component: str, adapter: str) -> list[TensorSpec]:
    """The tensors of the model that an adapter's component changes. Raises InputRefused where the base lacks it."""
    prefixes = prefixes_of_models(base)
    if component not in prefixes:
        raise InputRefused(
            f"{adapter} has changes for {listed_components([component])}, which the base lacks: it contains "
            f"{listed_components(list(prefixes))}. Choose one model by {named('component')}, or give the folder of a "
            "pipeline"
        )
    return [spec for name, spec in base.items() if name.startswith(prefixes[component])]
