"""Adapters for ComfyUI, as ai-toolkit and others write them: `diffusion_model.` before the original model's names."""

from __future__ import annotations

from pathlib import Path

from lora_export.formats import lora_file
from lora_export.formats.lora_file import FileNames
from lora_export.lora import DENOISER, SECOND_DENOISER, Adapter, component_name
from lora_export.options.reading import DEFAULTS, ReadOptions

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


def recognises(path: Path) -> bool:
    """Whether all names in the file begin with a prefix of this format."""
    return lora_file.names_fit(path, _module_of)


def foreign_keys(path: Path) -> list[str]:
    """The keys of another format in a file that is in this one otherwise."""
    return lora_file.foreign_keys(path, _module_of)


def read(path: Path, name: str, options: ReadOptions = DEFAULTS) -> Adapter:
    """Read an adapter. Raises InputRefused with everything that is wrong with it."""
    return lora_file.read_file(path, name, FileNames("comfyui", _module_of), options)
