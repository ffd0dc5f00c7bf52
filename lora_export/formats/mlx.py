"""Adapters of mlx-lm: `adapters.safetensors`, and an `adapter_config.json` that is not PEFT's.

A is (in, rank) and B (rank, out), transposed for this package. On experts they are (experts, rank, in) and
(experts, out, rank), not transposed. The scale is recorded as it is: no alpha, no rank divides it. DoRA's magnitude is
`m`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_export.errors import InputRefused
from lora_export.formats import expert_layouts
from lora_export.formats.base_config import base_config
from lora_export.formats.pair_keys import Sides, keys_by_module, read_pairs
from lora_export.formats.tensor_files import TensorSource, hash_of_unchanged, open_tensors
from lora_export.lora import Adapter, ExpertAxes, LoraPair, expert_name, split_part
from lora_export.names.experts import model_types
from lora_export.names.families import FamilyNames, column
from lora_export.names.table import is_embedding
from lora_export.options.reading import DEFAULTS, ReadOptions
from lora_export.storage import json_files
from lora_export.storage.safetensors_file import is_safetensors

DESCRIPTION = "a folder with mlx-lm's adapter_config.json and adapters.safetensors"
MLX_CONFIG = "adapter_config.json"
MLX_WEIGHTS = "adapters.safetensors"
_KEY = re.compile(r"(?P<module>.+)\.(?:lora_)?(?P<side>(?<=lora_)[ab]|(?<!lora_)m)")
STACKED = re.compile(r"\.switch_mlp$")  # mlx-lm's name for the experts of most models


def recognises(path: Path) -> bool:
    """Whether the folder contains mlx-lm's config. PEFT's file of the same name has a `peft_type`."""
    try:
        config = json_files.read_json(_mlx_folder(path) / MLX_CONFIG)
    except InputRefused:
        return False
    return "peft_type" not in config and ("lora_parameters" in config or "fine_tune_type" in config)


def read(path: Path, name: str, options: ReadOptions = DEFAULTS) -> Adapter:
    """Read an adapter of mlx-lm. Raises InputRefused with everything that is wrong with it."""
    folder = _mlx_folder(path)
    config = json_files.read_json(folder / MLX_CONFIG)
    options.refuse_rank_and_alpha(MLX_CONFIG)
    kind, scale = _kind(folder / MLX_CONFIG, config), _scale(folder / MLX_CONFIG, config)
    weights = path if path != folder else folder / MLX_WEIGHTS
    if not weights.exists():
        raise InputRefused(f"{path} has no {MLX_WEIGHTS}")
    file = open_tensors(weights, options)
    modules, others = keys_by_module(file, _KEY)

    def build(module: str, sides: Sides) -> dict[str, LoraPair]:
        return _pairs(module, sides, file, scale, is_dora=kind == "dora")

    pairs, spelling = read_pairs(file, modules, build, others=others)
    base = base_config(folder, options) or {}
    for row in (row for kind, row in column("mlx").items() if kind in model_types(base)):
        pairs, spelling = FamilyNames.of(row).with_joined(pairs, spelling, file.path)
    stacked = {split_part(each)[0] for each in pairs if split_part(each)[1]}
    tied = _ties(pairs, base)
    return Adapter(
        name=name,
        format="mlx",
        pairs=pairs | {head: pairs[table].transposed for head, table in tied.items()},
        experts=dict.fromkeys(stacked, ExpertAxes.OUT_IN),
        tied=tied,
        spelling=spelling | {head: spelling[table] for head, table in tied.items()},
        scale_source=f"scale in {MLX_CONFIG}, as it is",
        metadata={"fine_tune_type": kind, "scale": scale}
        | {key: value for key in ("model", "num_layers") if isinstance(value := config.get(key), str | int)},
        sha256=hash_of_unchanged(file, folder / MLX_CONFIG),
    )


def _mlx_folder(path: Path) -> Path:
    """The folder of an adapter that is named by its folder or by a file of tensors, such as a checkpoint's."""
    return path.parent if is_safetensors(path) else path


def _kind(path: Path, config: Mapping[str, Any]) -> str:
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise InputRefused(f"{path}: fine_tune_type is {kind!r}; only lora and dora are adapters")
    # Before October 2024 mlx-lm had `use_dora` in place of the type.
    return "dora" if config.get("use_dora") is True and "fine_tune_type" not in config else str(kind)


def _scale(path: Path, config: Mapping[str, Any]) -> float:
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise InputRefused(f"{path} has no lora_parameters, which hold the scale")
    rank, scale, alpha = (parameters.get(name) for name in ("rank", "scale", "alpha"))
    numbers = {"rank": rank, "scale": scale}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise InputRefused(f"{path}: {name} in lora_parameters is {value!r}; it must be a positive number")
    if alpha is not None and alpha != rank:
        raise InputRefused(
            f"{path}: lora_parameters has scale {scale} and alpha {alpha!r}. mlx-lm multiplied the scale by alpha / "
            "rank in 2024, and does not read alpha today; nothing records which one trained this adapter. Remove "
            "alpha, and set scale to the factor of B A"
        )
    assert isinstance(scale, int | float)
    return float(scale)


def _pairs(module: str, sides: Sides, file: TensorSource, scale: float, *, is_dora: bool) -> dict[str, LoraPair]:
    """The pair of a module; of stacked experts, the pair of each."""
    a, b = file.read(sides["a"]), file.read(sides["b"])
    if is_dora is not ("m" in sides):
        raise InputRefused(
            "the config has fine_tune_type dora, but m is missing"
            if is_dora
            else "m is present, but the config's fine_tune_type is not dora"
        )
    if a.ndim == 3 and not is_dora:
        owner, _, projection = module.rpartition(".")
        parameter = f"{STACKED.sub('.experts', owner)}.{projection}"
        if not expert_layouts.is_stacked(parameter, a, b):
            raise InputRefused(f"A {a.shape} and B {b.shape} are not (experts, rank, in) and (experts, out, rank)")
        return {expert_name(parameter, n): pair for n, pair in enumerate(expert_layouts.stacked_pairs(a, b, scale))}
    if (a.ndim, b.ndim) != (2, 2):
        raise InputRefused(f"A {a.shape} and B {b.shape} are not (in, rank) and (rank, out)")
    magnitude = file.read(sides["m"]) if is_dora else None
    embedding = is_embedding(module)
    if embedding and magnitude is not None:
        raise InputRefused("mlx-lm's DoRA of embeddings has a length for each row, which PEFT's has not: not supported")
    return {module: LoraPair(a=a.T, b=b.T, scale=scale, magnitude=magnitude, embedding=embedding)}


def _ties(pairs: Mapping[str, LoraPair], config: Mapping[str, Any]) -> dict[str, str]:
    """mlx-lm applies the pair of tied input embeddings at the output too: the output head -> the table."""
    if config.get("tie_word_embeddings") is not True:
        return {}
    tables = [name for name, pair in pairs.items() if pair.embedding and name.endswith("embed_tokens")]
    heads = {f"{table.removesuffix('model.embed_tokens')}lm_head": table for table in tables}
    return {head: table for head, table in heads.items() if head not in pairs}
