"""Adapters of kohya's sd-scripts and musubi-tuner, and of LyCORIS: flattened names such as `lora_unet_blocks_0_attn_q`.

A name does not tell which of its `_` are dots of the module's name. Only the names of the base do, so that the plan
resolves them (see `lora_export.plan.flattened_names`).
"""

from __future__ import annotations

from pathlib import Path

from lora_export.formats import lora_file
from lora_export.formats.lora_file import FileNames
from lora_export.lora import DENOISER, Adapter, component_name
from lora_export.options.reading import DEFAULTS, ReadOptions

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


def recognises(path: Path) -> bool:
    """Whether all names in the file are flattened, and begin with a prefix of this format."""
    return lora_file.names_fit(path, _module_of)


def foreign_keys(path: Path) -> list[str]:
    """The keys of another format in a file that is in this one otherwise."""
    return lora_file.foreign_keys(path, _module_of)


def read(path: Path, name: str, options: ReadOptions = DEFAULTS) -> Adapter:
    """Read an adapter. Raises InputRefused with everything that is wrong with it."""
    return lora_file.read_file(path, name, FileNames("kohya", _module_of, flattened=True), options)
