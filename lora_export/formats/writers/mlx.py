"""Adapters for mlx-lm: `adapters.safetensors` and its own `adapter_config.json`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.formats.base_config import base_config
from lora_export.formats.mlx import MLX_CONFIG, MLX_WEIGHTS
from lora_export.formats.writers import WriteOptions
from lora_export.formats.writers.exact_values import beyond_pairs, refuse_inexpressible, smallest_dtype
from lora_export.formats.writers.expert_stacks import expert_stacks
from lora_export.lora import Adapter, LoraPair
from lora_export.names.experts import model_types
from lora_export.names.families import column
from lora_export.storage import json_files, safetensors_file

SUFFIX = ""
OTHERS_EXPERTS = "switch_mlp"  # what mlx-lm calls the module of experts, where no row has a name for it


def write(adapter: Adapter, path: Path, options: WriteOptions) -> tuple[str, ...]:
    """Write an adapter for mlx-lm into a folder. It has one rank and one scale, and DoRA on all layers or none."""
    types = model_types(base_config(None, options.reading) or {})
    experts = expert_stacks(adapter, types)
    problems = beyond_pairs(adapter, {"magnitude", "tied"}) + experts.problems
    pairs = [pair for name, pair in experts.plain.items() if name not in adapter.tied]
    pairs += [pair for stack in experts.stacks.values() for pair in stack.values()]
    kinds = {(pair.rank, pair.scale) for pair in pairs}
    if len(kinds) > 1:
        shown = ", ".join(f"{rank} and {scale:g}" for rank, scale in sorted(kinds)[:5])
        problems.append(f"several ranks and scales: {shown}; mlx-lm has one for all layers")
    if len({pair.magnitude is not None for pair in pairs}) > 1:
        problems.append("DoRA on some layers; mlx-lm has it on all or none")
    tensors: dict[str, NDArray[np.float32]] = {}
    for name, pair in experts.plain.items():
        if name in adapter.tied:
            continue  # mlx-lm applies the pair of tied embeddings at both
        if pair.a.ndim != 2 or (pair.embedding and pair.magnitude is not None):
            problems.append(f"{name}: a convolution, or DoRA on an embedding")
            continue
        tensors |= _linear(name, pair)
    rows = [row for kind, row in column("mlx").items() if kind in types]
    experts_name = next((row["experts"] for row in rows if "experts" in row), OTHERS_EXPERTS)
    for (owner, kind), _ in experts.stacks.items():
        arrays = experts.arrays((owner, kind))
        if arrays is None or any(pair.magnitude is not None for pair in experts.stacks[owner, kind].values()):
            problems.append(f"{owner}: experts of different shapes, without a pair, or with DoRA")
            continue
        module = re.sub(r"experts$", experts_name, owner)
        tensors |= {f"{module}.{kind}_proj.lora_{side}": array for side, array in zip("ab", arrays, strict=True)}
    if not tensors:
        problems.append("it has no low-rank pair")
    refuse_inexpressible(adapter, "mlx", problems)
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


def _linear(name: str, pair: LoraPair) -> dict[str, NDArray[np.float32]]:
    tensors = {f"{name}.lora_a": pair.a.T, f"{name}.lora_b": pair.b.T}
    return tensors if pair.magnitude is None else {**tensors, f"{name}.m": pair.magnitude}
