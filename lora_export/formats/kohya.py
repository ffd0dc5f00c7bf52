"""Adapters of kohya's sd-scripts and musubi-tuner, and of LyCORIS: flattened names such as `lora_unet_blocks_0_attn_q`.

A name does not tell which of its `_` are dots of the module's name. Only the names of the base do, so that the plan
resolves them (see `lora_export.plan.spelling`).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from lora_export.formats import WriteOptions
from lora_export.formats.lora_file import OneFileFormat, module_by_prefix
from lora_export.formats.writing import OneFile, without_component
from lora_export.lora import DENOISER, TEXT_ENCODERS, Adapter, split_component
from lora_export.plan.diffusion import Family

DESCRIPTION = "a .safetensors file of kohya's scripts or LyCORIS, with keys such as lora_unet_X.lora_down.weight"
SUFFIX = ".safetensors"
OF_PIPELINES = True
# The prefix of a module's name -> the part of a pipeline; of several, the last is written. LyCORIS alone writes
# `lycoris_`, for any model.
_COMPONENTS = {
    "lora_transformer_": DENOISER,
    "lora_unet_": DENOISER,
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lycoris_": "",
}
WITH_ONE_TEXT_ENCODER = frozenset({Family.SD, Family.UNKNOWN})  # sd-scripts does not number it there


_FORMAT = OneFileFormat(
    "kohya", lambda name: None if "." in name else module_by_prefix(name, _COMPONENTS), flattened=True
)
recognises, foreign_keys, read = _FORMAT.recognises, _FORMAT.foreign_keys, _FORMAT.read


def write(adapter: Adapter, path: Path, options: WriteOptions) -> tuple[str, ...]:
    """Write the file, with an alpha for each pair. Only pipelines with several text encoders have numbers for them."""
    names = adapter.names
    prefixes = {component: prefix for prefix, component in _COMPONENTS.items()} | {"": "lora_unet_"}
    several = {split_component(name)[0] for name in names} & set(TEXT_ENCODERS[1:])
    if options.family in WITH_ONE_TEXT_ENCODER and not several:
        prefixes[TEXT_ENCODERS[0]] = "lora_te_"

    def flattened(name: str) -> str:
        component, module = split_component(name)
        return prefixes.get(component, f"{component}_") + module.replace(".", "_")

    file = OneFile(adapter, "kohya", lambda module, ending: f"{flattened(module)}.{ending}")
    file.problems += [f"{name}: a second transformer" for name in names if split_component(name)[0] not in prefixes]
    keys = Counter(map(flattened, adapter.pairs))
    file.problems += [f"{key}: two modules have this name without dots" for key, number in keys.items() if number > 1]
    file.add_changes(("lora_down.weight", "lora_up.weight"))
    file.write(path)
    return without_component(adapter)
