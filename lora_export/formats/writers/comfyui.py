"""Adapters for ComfyUI: `diffusion_model.` before the names, and an alpha for each pair."""

from __future__ import annotations

from pathlib import Path

from lora_export.formats.writers import WriteOptions
from lora_export.formats.writers.one_file import OneFile, without_component
from lora_export.lora import DENOISER, SECOND_DENOISER, TEXT_ENCODERS, Adapter, split_component
from lora_export.options.spelling import named

SUFFIX = ".safetensors"
OF_PIPELINES = True
OF_TEXT_ENCODERS = ("clip_l", "clip_g", "t5xxl")
NAMED = {
    "": "diffusion_model",
    DENOISER: "diffusion_model",
    **{
        component: f"text_encoders.{name}.transformer"
        for component, name in zip(TEXT_ENCODERS, OF_TEXT_ENCODERS, strict=True)
    },
}


def write(adapter: Adapter, path: Path, options: WriteOptions) -> tuple[str, ...]:  # noqa: ARG001
    """Write the file. Of two transformers, the first is `transformer_1`, the second `transformer_2`."""
    two = any(split_component(name)[0] == SECOND_DENOISER for name in adapter.names)
    both = {DENOISER: "diffusion_model.transformer_1", SECOND_DENOISER: "diffusion_model.transformer_2"}
    prefixes = NAMED | both if two else NAMED
    file = OneFile(adapter, "comfyui", lambda module, ending: f"{_named(module, prefixes)}.{ending}")
    if adapter.flattened:
        file.problems.append(
            f"names in which `_` stands for the dots: state the model that has them by {named('base')}"
        )
    file.add_changes(("lora_A.weight", "lora_B.weight"))
    file.write(path)
    return without_component(adapter)


def _named(name: str, prefixes: dict[str, str]) -> str:
    component, module = split_component(name)
    return f"{prefixes[component]}.{module}"
