"""Graphs that read one weight in many ways. For the tests of readers and of fused operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.plan import Layout

WEIGHT = np.float32([[1, 2, 3], [4, 5, 6]])  # (out, in)

X = np.float32([[1, 10, 100], [2, -1, 5]])

STORED = {Layout.OUT_IN: ("float[2,3]", "1,2,3,4,5,6"), Layout.IN_OUT: ("float[3,2]", "1,4,2,5,3,6")}


def graph_reading(
    body: str, layout: Layout, *, x: str = "float[N,3]", y: str = "float[N,2]", functions: str = ""
) -> ir.Model:
    """A graph whose body reads WEIGHT as `W`. The initializer is `m.weight`, stored in this layout."""
    dtype, numbers = STORED[layout]
    return ir.from_onnx_text(f"""
        <ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1, "own" : 1]>
        g ({x} x) => ({y} y) <{dtype} "m.weight" = {{{numbers}}}>
        {{ {body.replace("W", '"m.weight"')} }}
        {functions}""")


def attention_graph(hidden: int = 4, heads: int = 2) -> ir.Model:
    """A graph of onnxruntime's Attention, with q, k and v in the initializer `w` (hidden, 3 hidden)."""
    rng = np.random.default_rng(0)
    model = ir.from_onnx_text(f"""
        <ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
        g (float[B,S,{hidden}] x) => (float[B,S,{hidden}] y)
        <float[1] "w" = {{0}}, float[{3 * hidden}] b = {{{",".join("0" * (3 * hidden))}}}>
        {{ y = com.microsoft.Attention <num_heads = {heads}> (x, w, b) }}""")
    value = model.graph.initializers["w"]
    value.const_value = ir.Tensor(rng.normal(size=(hidden, 3 * hidden)).astype(np.float32), name="w")
    value.shape = ir.Shape([hidden, 3 * hidden])
    return model


def attention(x: NDArray[Any], q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], heads: int = 2) -> NDArray[Any]:
    """softmax(Q Kᵀ / √d) V by head, in NumPy. The weights are (out, in)."""
    batch, length, hidden = x.shape
    queries, keys, values = (
        (x @ weight.T).reshape(batch, length, heads, -1).transpose(0, 2, 1, 3) for weight in (q, k, v)
    )
    scores = np.exp(queries @ keys.transpose(0, 1, 3, 2) / np.sqrt(hidden // heads))
    scores /= scores.sum(-1, keepdims=True)
    return (scores @ values).transpose(0, 2, 1, 3).reshape(batch, length, hidden)
