"""Adapters of diffusers: `unet.X.lora_A.weight` and the older spellings, with or without a component before the names.

diffusers saves the LoraConfig of each component in the header (`lora_adapter_metadata`). Without it, alpha is the rank.
What is written has PEFT's keys after the model's name, and that header.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_export.errors import InputRefused
from lora_export.formats import WriteOptions
from lora_export.formats.adapter_files import names_in, open_tensors, weights_of
from lora_export.formats.lora_file import OneFileFormat, scale_by_alpha
from lora_export.formats.peft_config import adapter_scale, checked_config, value_for_module
from lora_export.formats.writing import (
    OneFile,
    alpha_of,
    beyond_pairs,
    usual_and_patterns,
    why_no_low_rank,
    without_component,
)
from lora_export.lora import (
    DENOISER,
    SECOND_DENOISER,
    TEXT_ENCODERS,
    Adapter,
    LoraPair,
    component_name,
    split_component,
)
from lora_export.options.reading import DEFAULTS, ReadOptions
from lora_export.options.spelling import named
from lora_export.plan.diffusion import OF_A_UNET, T5, Family, by_role
from lora_export.storage import json_files

DESCRIPTION = "a .safetensors file of diffusers, with keys such as unet.X.lora_A.weight or X.lora.down.weight"
SUFFIX = ".safetensors"
OF_PIPELINES = True
COMPONENTS_OF_PIPELINES = {
    "unet": DENOISER,
    "transformer": DENOISER,
    "transformer_2": SECOND_DENOISER,
    **{name: name for name in TEXT_ENCODERS},
}
METADATA_KEY = "lora_adapter_metadata"
# The oldest spelling gives the layers of every attention the names of a UNet's.
OLD_LAYERS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out.0": "out_proj"}
OF_OTHER_FORMATS = re.compile(
    r"(lora_|lycoris_|diffusion_model\.|text_encoders\.|base_model\.).*|model(\.model)?\.layers\..*"
)


def _module_of(name: str) -> str | None:
    """The module for a name in a key, with its component; None for a name of another format."""
    if OF_OTHER_FORMATS.fullmatch(name):
        return None
    first, _, rest = name.partition(".")
    component = COMPONENTS_OF_PIPELINES.get(first, "") if rest else ""
    if not component:
        return name
    if component in TEXT_ENCODERS:
        for old, new in OLD_LAYERS.items():
            if rest.endswith(f".self_attn.{old}"):
                rest = rest.removesuffix(old) + new
    return component_name(component, rest)


_FORMAT = OneFileFormat("diffusers", _module_of)
foreign_keys = _FORMAT.foreign_keys


def recognises(path: Path) -> bool:
    """Whether the file has pairs, and no name of another format. `X.lora_A` without `.weight` is loralib's."""
    weights = weights_of(path)
    is_bare = weights is not None and any(name.endswith((".lora_A", ".lora_B")) for name in names_in(weights))
    return not is_bare and _FORMAT.recognises(path)


def read(path: Path, name: str, options: ReadOptions = DEFAULTS) -> Adapter:
    """Read an adapter. Raises InputRefused with everything that is wrong with it."""
    weights = weights_of(path)
    recorded = "" if weights is None else open_tensors(weights, options).metadata.get(METADATA_KEY, "")
    if not recorded:
        return _by_role(_FORMAT.read(path, name, options))
    where = f"{METADATA_KEY} in the header of {weights}"
    configs = _configs(recorded, where)
    source = f"lora_alpha / r of {METADATA_KEY} in the header"
    adapter = _FORMAT.read(path, name, options, scale_of=functools.partial(_scale, configs, where), scale_source=source)
    for component, config in configs.items():
        own = [pair for module, pair in adapter.pairs.items() if split_component(module)[0] == component]
        with_dora, stated = sum(pair.magnitude is not None for pair in own), bool(config.get("use_dora"))
        if not own:
            raise InputRefused(
                f"{where} states ranks and alphas for {component or 'modules without a model'} that the file lacks"
            )
        if with_dora != (len(own) if stated else 0):
            raise InputRefused(f"{where}: use_dora is {stated}, and {with_dora} of {len(own)} pairs have magnitudes")
    return _by_role(adapter)


def _by_role(adapter: Adapter) -> Adapter:
    """The adapter with T5 as the third text encoder, in whatever folder of a pipeline it is."""
    return adapter if adapter.names == [by_role(name) for name in adapter.names] else adapter.renamed(by_role)


def _configs(recorded: str, source: str) -> dict[str, dict[str, Any]]:
    """The recorded LoraConfig of each component. Raises InputRefused for one that is not supported."""
    table = json_files.parse_json(recorded, source)
    configs: dict[str, dict[str, Any]] = {}
    for key, value in table.items():
        first, _, field = key.partition(".")
        if field and first in COMPONENTS_OF_PIPELINES:
            configs.setdefault(COMPONENTS_OF_PIPELINES[first], {})[field] = value
        else:
            configs.setdefault("", {})[key] = value
    for config in configs.values():
        if config.get("peft_type", "LORA") != "LORA":
            raise InputRefused(f"{source}: peft_type is {config['peft_type']!r}; only LORA is supported")
    return {component: checked_config(config, source) for component, config in configs.items()}


def _scale(configs: Mapping[str, Mapping[str, Any]], source: str, module: str, rank: int, alpha: float | None) -> float:
    component, name = split_component(module)
    config = configs.get(component)
    if config is None:
        return scale_by_alpha(module, rank, alpha)
    if alpha is not None:
        raise InputRefused(f"it has an alpha of its own beside {source}, which states another one for it")
    stated = value_for_module(name, config, "rank_pattern", "r")
    if stated != rank:
        raise InputRefused(f"its rank is {rank}, and {source} states {stated}")
    return adapter_scale(rank, value_for_module(name, config, "alpha_pattern", "lora_alpha"), config)


# --- Written ---


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
        if why_no_low_rank(pair):
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
    if len({pair.magnitude is not None for pair in pairs.values()}) > 1:
        problems.append("DoRA on some layers of a model; diffusers has it on all or none")
    rank, rank_pattern = usual_and_patterns({module: pair.rank for module, pair in pairs.items()})
    alpha, alpha_pattern = usual_and_patterns(alphas)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(pairs),
        "use_dora": any(pair.magnitude is not None for pair in pairs.values()),
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }
