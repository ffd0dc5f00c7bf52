"""The memory that a proof of graph against graph takes: one weight at a time in fp64, not all of them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from support import peak
from support.handmade import peft_adapter

WIDTH, LAYERS = 4096, 8
WEIGHTS = LAYERS * WIDTH * WIDTH * 4 / 2**20  # MiB
WITHOUT = 300  # MiB that a command takes for a small graph


def tower(folder: Path, std: float) -> Path:
    """Layers in a row, with their weights inside the file, and an adapter for all of them."""
    rng = np.random.default_rng(0)
    nodes, tensors, pairs = [], [], {}
    for layer in range(LAYERS):
        name = f"l{layer}"
        weight = rng.standard_normal((WIDTH, WIDTH), np.float32) / np.float32(64)
        tensors.append(numpy_helper.from_array(weight, f"{name}.weight"))
        nodes.append(helper.make_node("MatMul", [f"x{layer}", f"{name}.weight"], [f"{name}.y"], name=name))
        nodes.append(helper.make_node("Tanh", [f"{name}.y"], [f"x{layer + 1}"], name=f"{name}.tanh"))
        pairs[name] = std * rng.standard_normal((8, WIDTH)), std * rng.standard_normal((WIDTH, 8))
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", WIDTH]) for n in ("x0", f"x{LAYERS}")]
    graph = helper.make_graph(nodes, "tower", ends[:1], ends[1:], tensors)
    path = folder / "tower.onnx"
    imports = [helper.make_opsetid("", 21)]
    path.write_bytes(helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString())
    peft_adapter(folder / "a", pairs)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "std", "times"),
    [
        ("merged", 0.03, 5),
        ("merged", 0.1, 6),  # large beside the weights: the other graph is measured merged, too
        ("nodes", 0.03, 6),
    ],
)
def test_proof_takes_fp64_memory_for_one_weight_at_a_time(tmp_path: Path, mode: str, std: float, times: float) -> None:
    graph = tower(tmp_path, std)
    words = ["onnx", graph, "-a", tmp_path / "a", "--lora", mode, "-o", tmp_path / "out.onnx"]
    run = peak.run([sys.executable, "-m", "lora_export", *words])
    assert run.code == 0
    print(f"{mode}: {run.peak:.0f} MiB for {WEIGHTS:.0f} MiB of weights, {run.seconds:.0f} s")
    assert run.peak < WITHOUT + times * WEIGHTS
