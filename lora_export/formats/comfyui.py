"""Adapters for ComfyUI, as ai-toolkit and others write them: `diffusion_model.` before the original model's names."""

from __future__ import annotations

from lora_export.formats.lora_file import OneFileFormat
from lora_export.lora import DENOISER, SECOND_DENOISER, component_name

DESCRIPTION = "a .safetensors file for ComfyUI, with keys such as diffusion_model.X.lora_A.weight"
# The prefix of a module's name -> the part of a pipeline, the longest first. Wan 2.2 has two transformers.
_COMPONENTS = {
    "diffusion_model.transformer_1.": DENOISER,
    "diffusion_model.transformer_2.": SECOND_DENOISER,
    "diffusion_model.": DENOISER,
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": "text_encoder_3",
}


def _module_of(name: str) -> str | None:
    """The module for a name in a key, with its component; None for a name of another format."""
    for prefix, component in _COMPONENTS.items():
        if name.startswith(prefix):
            return component_name(component, name.removeprefix(prefix))
    return None


_FORMAT = OneFileFormat("comfyui", _module_of)
recognises, foreign_keys, read = _FORMAT.recognises, _FORMAT.foreign_keys, _FORMAT.read
