"""Adapters as kohya's sd-scripts and LyCORIS write them: flattened names, and an alpha for each pair."""

from __future__ import annotations

from pathlib import Path

from lora_export.formats.writers import WriteOptions
from lora_export.formats.writers.one_file import OneFile, without_component
from lora_export.lora import DENOISER, TEXT_ENCODERS, Adapter, split_component
from lora_export.plan.diffusion import Family

SUFFIX = ".safetensors"
OF_PIPELINES = True
NUMBERED = ("lora_te1", "lora_te2", "lora_te3")
WITH_ONE_TEXT_ENCODER = frozenset({Family.SD, Family.UNKNOWN})  # sd-scripts does not number it there


def write(adapter: Adapter, path: Path, options: WriteOptions) -> tuple[str, ...]:
    """Write the file. Stable Diffusion 1 and 2 have `lora_te`, pipelines with several text encoders `lora_te1`, ..."""
    names = adapter.names
    prefixes = {"": "lora_unet", DENOISER: "lora_unet", **dict(zip(TEXT_ENCODERS, NUMBERED, strict=True))}
    several = {split_component(name)[0] for name in names} & set(TEXT_ENCODERS[1:])
    if options.family in WITH_ONE_TEXT_ENCODER and not several:
        prefixes[TEXT_ENCODERS[0]] = "lora_te"
    file = OneFile(adapter, "kohya", lambda module, ending: f"{_flattened(module, prefixes)}.{ending}")
    file.problems += [f"{name}: a second transformer" for name in names if split_component(name)[0] not in prefixes]
    keys = [_flattened(module, prefixes) for module in adapter.pairs]
    file.problems += [f"{key}: two modules have this name without dots" for key in set(keys) if keys.count(key) > 1]
    file.add_changes(("lora_down.weight", "lora_up.weight"))
    file.write(path)
    return without_component(adapter)


def _flattened(name: str, prefixes: dict[str, str]) -> str:
    component, module = split_component(name)
    return f"{prefixes.get(component, component)}_{module.replace('.', '_')}"
