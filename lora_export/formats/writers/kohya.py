"""Adapters as kohya's sd-scripts and LyCORIS write them: flattened names, and an alpha for each pair."""

from __future__ import annotations

from pathlib import Path

from lora_export.formats.writers import WriteOptions
from lora_export.formats.writers.one_file import OneFile, without_component
from lora_export.lora import DENOISER, TEXT_ENCODERS, Adapter, split_component

SUFFIX = ".safetensors"
PREFIXES = {
    "": "lora_unet",
    DENOISER: "lora_unet",
    **dict(zip(TEXT_ENCODERS, ("lora_te1", "lora_te2", "lora_te3"), strict=True)),
}


def write(adapter: Adapter, path: Path, options: WriteOptions) -> tuple[str, ...]:  # noqa: ARG001
    """Write the file. A pipeline with one text encoder has `lora_te`, one with several `lora_te1` and so on."""
    names = (*adapter.pairs, *adapter.biases, *adapter.added)
    components = {split_component(name)[0] for name in names}
    prefixes = PREFIXES if components & set(TEXT_ENCODERS[1:]) else {**PREFIXES, TEXT_ENCODERS[0]: "lora_te"}
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
