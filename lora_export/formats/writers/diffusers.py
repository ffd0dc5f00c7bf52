"""Adapters as diffusers writes them: PEFT's keys after the model's name, and the LoraConfig of each in the header."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from lora_export.formats.diffusers import METADATA_KEY
from lora_export.formats.writers import WriteOptions
from lora_export.formats.writers.exact_values import alpha_of, beyond_pairs
from lora_export.formats.writers.one_file import OneFile, without_component
from lora_export.lora import DENOISER, SECOND_DENOISER, Adapter, LoraPair, split_component
from lora_export.options.spelling import named
from lora_export.plan.diffusion import OF_A_UNET, T5, Family

SUFFIX = ".safetensors"
OF_PIPELINES = True


def write(adapter: Adapter, path: Path, options: WriteOptions) -> tuple[str, ...]:
    """Write the file. Ranks and alphas are in the header (`lora_adapter_metadata`), which diffusers reads."""
    denoiser = "unet" if any(OF_A_UNET.fullmatch(split_component(name)[1]) for name in adapter.pairs) else "transformer"
    folders = {"": denoiser, DENOISER: denoiser, SECOND_DENOISER: "transformer_2"}
    if options.family is Family.FLUX:
        folders[T5] = "text_encoder_2"

    def in_file(name: str) -> str:
        component, module = split_component(name)
        return f"{folders.get(component, component)}.{module}"

    file = OneFile(adapter, "diffusers", lambda module, ending: f"{in_file(module)}.{ending}")
    file.problems += beyond_pairs(adapter, {"magnitude"})
    of_t5 = any(split_component(name)[0] == T5 for name in adapter.names)
    if of_t5 and options.family not in (Family.FLUX, Family.SD_3):
        file.problems.append(
            "T5: it is text_encoder_2 in Flux's pipelines and text_encoder_3 in Stable Diffusion 3's. State the "
            f"pipeline by {named('base')}"
        )
    by_folder: dict[str, dict[str, LoraPair]] = {}
    for name, pair in adapter.pairs.items():
        if type(pair) is not LoraPair:
            continue  # `beyond_pairs` named it
        if pair.embedding or pair.as_stored:
            file.problems.append(f"{name}: no pair of a linear layer or a convolution")
            continue
        folder, _, module = in_file(name).partition(".")
        if module in by_folder.get(folder, {}):
            file.problems.append(f"{in_file(name)}: two modules have this name")
        by_folder.setdefault(folder, {})[module] = pair
        file.tensors |= {f"{in_file(name)}.lora_A.weight": pair.a, f"{in_file(name)}.lora_B.weight": pair.b}
        if pair.magnitude is not None:
            shape = (1, -1, *[1] * (pair.a.ndim - 2)) if pair.a.ndim > 2 else (-1,)
            file.tensors[f"{in_file(name)}.lora_magnitude_vector"] = pair.magnitude.reshape(shape)
    recorded: dict[str, Any] = {}
    for folder, pairs in by_folder.items():
        recorded |= {f"{folder}.{field}": value for field, value in _config(pairs, file.problems).items()}
    file.write(path, {METADATA_KEY: json.dumps(recorded, indent=2, sort_keys=True)})
    of_t5_note = f"{adapter.name}: diffusers loads no adapter of T5; other programs read these names."
    return (*without_component(adapter), *([of_t5_note] if of_t5 else []))


def _config(pairs: dict[str, LoraPair], problems: list[str]) -> dict[str, Any]:
    """The fields of PEFT's LoraConfig for the pairs of one model."""
    alphas = {module: alpha_of(pair.scale, pair.rank) for module, pair in pairs.items()}
    problems += [
        f"{module}: its scale is no alpha / rank"
        for module, pair in pairs.items()
        if alphas[module] / pair.rank != pair.scale
    ]
    if len({pair.magnitude is not None for pair in pairs.values()}) > 1:
        problems.append("DoRA on some layers of a model; diffusers has it on all or none")
    ranks = {module: pair.rank for module, pair in pairs.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    patterns = {
        field: {f"^{re.escape(module)}": value for module, value in values.items() if value != usual}
        for field, values, usual in (("rank_pattern", ranks, rank), ("alpha_pattern", alphas, alpha))
    }
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(pairs),
        "use_dora": any(pair.magnitude is not None for pair in pairs.values()),
        **patterns,
    }
