"""Adapters for ComfyUI, as ai-toolkit and others write them: `diffusion_model.` before the original model's names."""

from __future__ import annotations

import functools
from pathlib import Path

from lora_export.formats import WriteOptions
from lora_export.formats.lora_file import OneFileFormat, module_by_prefix
from lora_export.formats.writing import OneFile, why_no_low_rank, without_component
from lora_export.lora import DENOISER, SECOND_DENOISER, Adapter, split_component
from lora_export.options.spelling import named

DESCRIPTION = "a .safetensors file for ComfyUI, with keys such as diffusion_model.X.lora_A.weight"
SUFFIX = ".safetensors"
OF_PIPELINES = True
# The prefix of a module's name -> the part of a pipeline, the longest first. Wan 2.2 has two transformers.
_FIRST, _SECOND = "diffusion_model.transformer_1.", "diffusion_model.transformer_2."
_COMPONENTS = {
    _FIRST: DENOISER,
    _SECOND: SECOND_DENOISER,
    "diffusion_model.": DENOISER,
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": "text_encoder_3",
}
_FORMAT = OneFileFormat("comfyui", functools.partial(module_by_prefix, prefixes=_COMPONENTS))
recognises, foreign_keys, read = _FORMAT.recognises, _FORMAT.foreign_keys, _FORMAT.read


def write(adapter: Adapter, path: Path, options: WriteOptions) -> tuple[str, ...]:  # noqa: ARG001
    """Write the file. Of two transformers, both are numbered. Pairs have no alpha: diffusers reads few of them."""
    prefixes = {component: prefix for prefix, component in _COMPONENTS.items()} | {"": "diffusion_model."}
    if any(split_component(name)[0] == SECOND_DENOISER for name in adapter.names):
        prefixes[DENOISER] = _FIRST

    def in_file(name: str) -> str:
        component, module = split_component(name)
        return prefixes[component] + module

    file = OneFile(adapter, "comfyui", lambda module, ending: f"{in_file(module)}.{ending}")
    if adapter.flattened:
        file.problems.append(
            f"names in which `_` stands for the dots: state the model that has them by {named('base')}"
        )
    file.add_changes(("lora_A.weight", "lora_B.weight"), with_alpha=False)
    file.write(path)
    is_scaled = any(pair.scale != 1 for pair in adapter.pairs.values() if not why_no_low_rank(pair))
    scaled = (f"{adapter.name}: scales are multiplied into B, because few readers of such a file take an alpha.",)
    return (*without_component(adapter), *(scaled if is_scaled else ()))
