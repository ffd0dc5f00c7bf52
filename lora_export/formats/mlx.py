"""Adapters of mlx-lm: `adapters.safetensors`, and an `adapter_config.json` that is not PEFT's.

A is (in, rank) and B (rank, out), transposed for this package. On experts they are (experts, rank, in) and
(experts, out, rank), not transposed. The scale is recorded as it is: no alpha, no rank divides it. DoRA's magnitude is
`m`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.formats import WriteOptions, adapter_files
from lora_export.formats.expert_layouts import expert_stacks, is_stacked, stacked_factors, stacked_pairs
from lora_export.formats.writing import beyond_pairs, refuse_inexpressible, smallest_dtype, why_no_low_rank
from lora_export.lora import Adapter, ExpertAxes, LoraPair, expert_name, split_part
from lora_export.names.families import FamilyNames, column, model_types
from lora_export.names.table import is_embedding
from lora_export.options.reading import DEFAULTS, ReadOptions
from lora_export.storage import json_files, safetensors_file
from lora_export.storage.safetensors_file import is_safetensors

DESCRIPTION = "a folder with mlx-lm's adapter_config.json and adapters.safetensors"
SUFFIX = ""
MLX_CONFIG = "adapter_config.json"
MLX_WEIGHTS = "adapters.safetensors"
_KEY = re.compile(r"(?P<module>.+)\.(?:lora_)?(?P<side>(?<=lora_)[ab]|(?<!lora_)m)")
OTHERS_EXPERTS = "switch_mlp"  # what mlx-lm calls the module of experts, where no row has a name for it
STACKED = re.compile(rf"\.{OTHERS_EXPERTS}$")


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
    file = adapter_files.open_tensors(weights, options)
    pairs, spelling = adapter_files.read_pairs(file, functools.partial(_pairs, scale, kind == "dora"), _KEY)
    base = adapter_files.base_config(folder, options) or {}
    for row in _rows_of(base):
        pairs, spelling = FamilyNames.of(row).with_joined(pairs, spelling, file.path)
    tied = _ties(pairs, base)
    return Adapter(
        name=name,
        format="mlx",
        pairs=pairs | {head: pairs[table].transposed for head, table in tied.items()},
        experts={owner: ExpertAxes.OUT_IN for owner, index in map(split_part, pairs) if index},
        tied=tied,
        spelling=spelling | {head: spelling[table] for head, table in tied.items()},
        scale_source=f"scale in {MLX_CONFIG}, as it is",
        metadata={"fine_tune_type": kind, "scale": scale}
        | {key: value for key in ("model", "num_layers") if isinstance(value := config.get(key), str | int)},
        sha256=adapter_files.hash_of_unchanged(file, folder / MLX_CONFIG),
        file_sha256=adapter_files.hash_of_tensors(file),
    )


def _mlx_folder(path: Path) -> Path:
    """The folder of an adapter that is named by its folder or by a file of tensors, such as a checkpoint's."""
    return path.parent if is_safetensors(path) else path


def _rows_of(base: Mapping[str, Any]) -> list[dict[str, Any]]:
    types = model_types(base)
    return [row for kind, row in column("mlx").items() if kind in types]


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
    rank = adapter_files.positive_size(path, "rank in lora_parameters", parameters.get("rank"))
    scale = adapter_files.positive_number(path, "scale in lora_parameters", parameters.get("scale"))
    alpha = parameters.get("alpha")
    if alpha is not None and alpha != rank:
        raise InputRefused(
            f"{path}: lora_parameters has scale {scale} and alpha {alpha!r}. mlx-lm multiplied the scale by alpha / "
            "rank in 2024, and does not read alpha today; nothing records which one trained this adapter. Remove "
            "alpha, and set scale to the factor of B A"
        )
    return scale


def _pairs(scale: float, is_dora: bool, module: str, tensors: adapter_files.Tensors) -> dict[str, LoraPair]:
    """The pair of a module; of stacked experts, the pair of each."""
    a, b, magnitude = tensors["a"], tensors["b"], tensors.get("m")
    if is_dora is not (magnitude is not None):
        raise InputRefused(
            "the config has fine_tune_type dora, but m is missing"
            if is_dora
            else "m is present, but the config's fine_tune_type is not dora"
        )
    if a.ndim == 3 and not is_dora:
        owner, _, projection = module.rpartition(".")
        parameter = f"{STACKED.sub('.experts', owner)}.{projection}"
        if not is_stacked(parameter, a, b):
            raise InputRefused(f"A {a.shape} and B {b.shape} are not (experts, rank, in) and (experts, out, rank)")
        return {expert_name(parameter, number): pair for number, pair in enumerate(stacked_pairs(a, b, scale))}
    if (a.ndim, b.ndim) != (2, 2):
        raise InputRefused(f"A {a.shape} and B {b.shape} are not (in, rank) and (rank, out)")
    embedding = is_embedding(module)
    if embedding and is_dora:
        raise InputRefused("mlx-lm's DoRA of embeddings has a length for each row, which PEFT's has not: not supported")
    return {module: LoraPair(a=a.T, b=b.T, scale=scale, magnitude=magnitude, embedding=embedding)}


def _ties(pairs: Mapping[str, LoraPair], config: Mapping[str, Any]) -> dict[str, str]:
    """mlx-lm applies the pair of tied input embeddings at the output too: the output head -> the table."""
    if config.get("tie_word_embeddings") is not True:
        return {}
    tables = [name for name, pair in pairs.items() if pair.embedding and name.endswith("embed_tokens")]
    heads = {f"{table.removesuffix('model.embed_tokens')}lm_head": table for table in tables}
    return {head: table for head, table in heads.items() if head not in pairs}


# --- Written ---


def write(adapter: Adapter, path: Path, options: WriteOptions) -> tuple[str, ...]:
    """Write an adapter for mlx-lm into a folder. It has one rank and one scale, and DoRA on all layers or none."""
    base = adapter_files.base_config(None, options.reading) or {}
    experts = expert_stacks(adapter, model_types(base))
    problems = beyond_pairs(adapter, {"magnitude", "tied"})
    # mlx-lm applies the pair of tied embeddings at both. `beyond_pairs` named what is no pair of A and B.
    own = ((name, pair) for name, pair in experts.plain.items() if name not in adapter.tied)
    plain = {name: pair for name, pair in own if not why_no_low_rank(pair)}
    pairs = [*plain.values(), *(pair for stack in experts.stacks.values() for pair in stack.values())]
    kinds = {(pair.rank, pair.scale) for pair in pairs}
    if len(kinds) > 1:
        shown = ", ".join(f"{rank} and {scale:g}" for rank, scale in sorted(kinds)[:5])
        problems.append(f"several ranks and scales: {shown}; mlx-lm has one for all layers")
    if len({pair.magnitude is not None for pair in pairs}) > 1:
        problems.append("DoRA on some layers; mlx-lm has it on all or none")
    tensors: dict[str, NDArray[np.float32]] = {}
    for name, pair in plain.items():
        if pair.a.ndim != 2 or (pair.embedding and pair.magnitude is not None):
            problems.append(f"{name}: a convolution, or DoRA on an embedding")
            continue
        tensors |= {f"{name}.lora_a": pair.a.T, f"{name}.lora_b": pair.b.T}
        tensors |= {} if pair.magnitude is None else {f"{name}.m": pair.magnitude}
    experts_name = next((row["experts"] for row in _rows_of(base) if "experts" in row), OTHERS_EXPERTS)
    for owner, kind, stack in experts.whole():
        if any(pair.magnitude is not None for pair in stack):
            problems.append(f"{owner}: experts with DoRA")
        module = re.sub(r"experts$", experts_name, owner)
        factors = zip("ab", stacked_factors(stack), strict=True)
        tensors |= {f"{module}.{kind}_proj.lora_{side}": array for side, array in factors}
    if not tensors:
        problems.append("it has no low-rank pair")
    refuse_inexpressible(adapter, "mlx", problems + experts.problems)
    dtype = smallest_dtype(tensors.values())
    rank, scale = kinds.pop()
    modules = sorted({key.rpartition(".")[0] for key in tensors})
    layers = {match[1] for module in modules if (match := re.search(r"\.(\d+)\.", module))}
    config: dict[str, Any] = {
        "fine_tune_type": "dora" if pairs[0].magnitude is not None else "lora",
        "num_layers": len(layers),
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": modules},
    }
    if isinstance(model := adapter.metadata.get("model"), str):
        config["model"] = model
    safetensors_file.write(path / MLX_WEIGHTS, {key: tensors[key].astype(dtype) for key in sorted(tensors)})
    json_files.write_json(path / MLX_CONFIG, config)
    return ()
