"""Adapters of diffusers: `unet.X.lora_A.weight` and the older spellings, with or without a component before the names.

diffusers saves the LoraConfig of each component in the header (`lora_adapter_metadata`). Without it, alpha is the rank.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_export.errors import InputRefused
from lora_export.formats.lora_file import OneFileFormat, scale_by_alpha, weights_of
from lora_export.formats.peft_config import adapter_scale, checked_config, value_for_module
from lora_export.formats.tensor_files import names_in, open_tensors
from lora_export.lora import DENOISER, SECOND_DENOISER, TEXT_ENCODERS, Adapter, component_name, split_component
from lora_export.options.reading import DEFAULTS, ReadOptions
from lora_export.plan.diffusion import by_role
from lora_export.storage import json_files

DESCRIPTION = "a .safetensors file of diffusers, with keys such as unet.X.lora_A.weight or X.lora.down.weight"
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
        with_dora = [pair for pair in own if pair.magnitude is not None]
        if not own:
            raise InputRefused(
                f"{where} states ranks and alphas for {component or 'modules without a model'} that the file lacks"
            )
        if len(with_dora) != (len(own) if config.get("use_dora") else 0):
            stated = bool(config.get("use_dora"))
            raise InputRefused(
                f"{where}: use_dora is {stated}, and {len(with_dora)} of {len(own)} pairs have magnitudes"
            )
    return _by_role(adapter)


def _by_role(adapter: Adapter) -> Adapter:
    """The adapter with T5 as the third text encoder, in whatever folder of a pipeline it is."""
    return adapter if adapter.names == [by_role(name) for name in adapter.names] else adapter.renamed(by_role)


def _configs(recorded: str, source: str) -> dict[str, dict[str, Any]]:
    """The recorded LoraConfig of each component. Raises InputRefused for one that is not supported."""
    table = json_files.parse_json(recorded.encode(errors="surrogatepass"), source)
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
    return scale_by_alpha(module, rank, alpha) if config is None else _recorded(name, rank, alpha, config, source)


def _recorded(module: str, rank: int, alpha: float | None, config: Mapping[str, Any], source: str) -> float:
    if alpha is not None:
        raise InputRefused(f"it has an alpha of its own beside {source}, which states another one for it")
    stated = value_for_module(module, config, "rank_pattern", "r")
    if stated != rank:
        raise InputRefused(f"its rank is {rank}, and {source} states {stated}")
    return adapter_scale(rank, value_for_module(module, config, "alpha_pattern", "lora_alpha"), config)
