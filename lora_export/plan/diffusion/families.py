"""The families of diffusion pipelines whose text encoders have other numbers in other formats.

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
from enum import Enum
from typing import Any

from lora_export.lora import DENOISER, TEXT_ENCODERS, component_name, split_component

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
