"""Adapters of kohya's sd-scripts and musubi-tuner, and of LyCORIS: flattened names such as `lora_unet_blocks_0_attn_q`.

A name does not tell which of its `_` are dots of the module's name. Only the names of the base do, so that the plan
resolves them (see `lora_export.plan.flattened_names`).
"""

from __future__ import annotations

from lora_export.formats.lora_file import OneFileFormat
from lora_export.lora import DENOISER, component_name

DESCRIPTION = "a .safetensors file of kohya's scripts or LyCORIS, with keys such as lora_unet_X.lora_down.weight"
# The prefix of a module's name -> the part of a pipeline. LyCORIS alone writes `lycoris_` for any model.
_COMPONENTS = {
    "lora_unet_": DENOISER,
    "lora_transformer_": DENOISER,
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lycoris_": "",
}


def _module_of(name: str) -> str | None:
    """The module for a name in a key, with its component; None for a name of another format."""
    for prefix, component in _COMPONENTS.items():
        if name.startswith(prefix) and "." not in name:
            return component_name(component, name.removeprefix(prefix))
    return None


_FORMAT = OneFileFormat("kohya", _module_of, flattened=True)
recognises, foreign_keys, read = _FORMAT.recognises, _FORMAT.foreign_keys, _FORMAT.read
