"""Graphs of one product and base checkpoints for them. For the tests of names by content."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.graph.find_sites import Sites
from lora_export.graph.site import Site
from lora_export.weights.checkpoint import Checkpoint, open_checkpoint
from support.graphs import a_graph
from support.handmade import base_file

WEIGHT = np.float32([[1, 2, 3], [4, 5, 6]])  # (out, in)
OTHER = np.float32([[7, 8, 9], [1, 0, 1]])
MATMUL = "[n] y = MatMul(x, W)"
GEMM = "[n] y = Gemm <transB = 1> (x, W)"

# Three weights and their packed matrix, (out, in).
Q, K, V = np.float32([[1, 2], [3, 4]]), np.float32([[5, 6]]), np.float32([[7, 8]])
PACKED = np.concatenate([Q, K, V])
QKV = {"q.weight": Q, "k.weight": K, "v.weight": V}


def base_checkpoint(folder: Path, tensors: Mapping[str, Any], dtype: Any = np.float32) -> Checkpoint:
    """A checkpoint `base.safetensors` of these tensors."""
    return open_checkpoint(base_file(folder / "base.safetensors", tensors, dtype))


def product_graph(weight: NDArray[Any], node: str = MATMUL, *, name: str = "W", module: str = "") -> ir.Model:
    """A graph of one product by the initializer `name`, which is stored as it is passed."""
    rows, columns = weight.shape
    model = a_graph(
        f"""
        g (float[N,M] x) => (float[N,O] y)
        <float[{rows},{columns}] W = {{{",".join("0" * weight.size)}}}>
        {{ {node} }}""",
        modules={"n": module} if module else None,
    )
    value = model.graph.initializers["W"]
    value.const_value, value.name = ir.Tensor(weight, name=name), name
    return model


def only_site(sites: Sites) -> Site:
    """The graph's only linear layer, with a name or without."""
    (site,) = (*sites.linear, *sites.unnamed)
    return site
