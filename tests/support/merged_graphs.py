"""Graph files with weights of small integers, whose merges are exact, and merges into them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from lora_export import formats, plan
from lora_export.graph.find_sites import find_sites
from lora_export.graph.merge.copy_parts import MergeRun
from lora_export.graph.merge.fold import fold_graph
from lora_export.graph.merge.merge_graph import merge_graph
from lora_export.graph.onnx_file.reading import load_graph, open_graph
from lora_export.lora import Adapter
from lora_export.weights.merge_report import MergeReport
from support.handmade import base_file, graph_file, peft_adapter

RNG = np.random.default_rng(0)
A, B = RNG.integers(-3, 4, (2, 40)), RNG.integers(-3, 4, (30, 2))  # (rank, in), (out, rank)
WEIGHTS = {
    name: RNG.integers(-9, 10, shape).astype(np.float32)
    for name, shape in {"up.weight": (40, 30), "kept.weight": (40, 50), "down.weight": (40, 30)}.items()
}
DATA = pytest.mark.parametrize(
    "data",
    ["", "all.data", {"up.weight": "a", "kept.weight": "b", "down.weight": "a"}],
    ids=["inside", "beside", "in two files beside"],
)

# Weights that `packed_graph` packs in one matrix, (out, in).
Q, K, V = (RNG.integers(-9, 10, (size, 40)).astype(np.float32) for size in (30, 20, 24))
PARTS = {"q_proj": Q, "k_proj": K, "v_proj": V}


def merge_into(path: Path, stage: Path, *adapters: Adapter, **options: Any) -> MergeReport:
    """Merge adapters into a graph's file. The output has the same name."""
    graph = open_graph(path)
    sites = find_sites(graph.model)
    stage.mkdir()
    return merge_graph(plan.make(adapters, sites.specs), graph, sites, stage, MergeRun(file_name=path.name, **options))


def folded_file(path: Path, *adapters: Adapter) -> ir.Model:
    """The graph of a file with adapters folded into it in memory."""
    model = load_graph(path)
    sites = find_sites(model)
    fold_graph(model, sites, plan.make(adapters, sites.specs))
    return model


def saved_adapter(folder: Path, *modules: str, **config: Any) -> Adapter:
    """An adapter with the pair A, B for each module."""
    return formats.load(peft_adapter(folder, dict.fromkeys(modules, (A, B)), **config))


def packed_graph(folder: Path, data: str = "") -> tuple[Path, Path]:
    """A graph without names that packs q, k and v in one matrix, and its base checkpoint."""
    folder.mkdir()
    other = RNG.integers(-9, 10, (40, 50)).astype(np.float32)
    graph = graph_file(folder / "m.onnx", {"packed_1": np.concatenate([Q, K, V]).T, "val_2": other}, data=data)
    tensors = {f"attn.{name}.weight": part for name, part in PARTS.items()} | {"other.weight": other.T}
    return graph, base_file(folder / "base.safetensors", tensors)
