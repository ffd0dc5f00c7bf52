"""Graphs with adapters under ONNX's own reference evaluator, in every float dtype, in subgraphs and in functions.

The evaluator shares no code with onnxruntime, and computes in bfloat16, which onnxruntime's CPU provider does not.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.formats import onnx_adapter
from lora_export.graph.exporter_names import NAME_SCOPES
from lora_export.graph.insert.adapter_inputs import insert_inputs
from lora_export.graph.insert.adapter_nodes import insert_nodes
from lora_export.graph.insert.adapter_rows import insert_rows
from lora_export.graph.merge.fold import fold_graph
from support.graphs import Arrays, an_adapter, contents, evaluated, planned, run
from support.small_graphs import PAIR

X = np.array([[1, 1, 2], [0, 3, 1], [2, -1, 0]])
W = np.array([[1, 2, 3], [4, 5, 6]])  # of m, (out, in)
BIAS = np.array([10, 20])
CHANGED = W + PAIR.delta()
LAYOUTS = {"W": ("[2,3]", "1,2,3,4,5,6"), "V": ("[3,2]", "1,4,2,5,3,6")}  # as a Gemm and as a MatMul reads it
LINEAR = """
<domain: "own", opset_import: ["" : 20]>
linear (a, b) => (c) { d = Transpose <perm = [1, 0]> (b)
                       c = MatMul(a, d) }"""


@dataclass(frozen=True)
class Text:
    """A graph that reads W or V and computes x W^T + b."""

    nodes: str
    x: str = "N"
    functions: str = ""


GRAPHS = {
    "MatMul": Text("h = MatMul(x, V)\n y = Add(h, b)"),
    "Gemm": Text("y = Gemm <transB = 1> (x, W, b)"),
    "three dimensions": Text("h = MatMul(x, V)\n y = Add(h, b)", "N,1"),
    "a subgraph": Text("""
        h = If (c) <
            then_branch = t () => (float[N,2] p) { [first] p = MatMul(x, V) },
            else_branch = e () => (float[N,2] q) { [second] q = MatMul(x, V) }>
        y = Add(h, b)"""),
    "a function": Text("h = own.linear(x, W)\n y = Add(h, b)", functions=LINEAR),
}
FLOATS = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def a_graph_in(text: Text, dtype: Any) -> ir.Model:
    """The graph with its floats in this dtype. Its weight is `m.weight`, which only the module `m` reads."""
    (symbol,) = LAYOUTS.keys() & set(re.findall(r"\b[VW]\b", text.nodes))
    shape, numbers = LAYOUTS[symbol]
    nodes = re.sub(rf"\b{symbol}\b", '"m.weight"', text.nodes)
    model = ir.from_onnx_text(f"""
        <ir_version: 10, opset_import: ["" : 20, "own" : 1]>
        g (float[{text.x},3] x, bool c) => (float[{text.x},2] y)
        <float{shape} "m.weight" = {{{numbers}}}, float[2] b = {{10,20}}> {{ {nodes} }} {text.functions}""")
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type == "MatMul":
            node.metadata_props[NAME_SCOPES] = repr(["", "m", "linear"])
    for graph in model.graphs():
        for value in [*graph.inputs, *graph.outputs, *graph.initializers.values()]:
            value.dtype = ir.DataType.from_numpy(np.dtype(dtype)) if value.dtype == ir.DataType.FLOAT else value.dtype
            if value.const_value is not None:
                value.const_value = ir.Tensor(value.const_value.numpy().astype(dtype), name=value.name)
    return model


def insert_adapter(model: ir.Model, mode: str) -> Arrays:
    """Insert the adapter by this mode. Returns the inputs that select it."""
    adapter = an_adapter({"m": PAIR})
    found, steps = planned(model, adapter)
    if mode == "inputs":
        contract = insert_inputs(model, found, ["m.weight"])
        return onnx_adapter.input_values(contract, steps, adapter.name)
    if mode == "rows":
        insert_rows(model, found, steps, batch="N")
        return {"adapter_ids": np.ones(len(X), np.int64)}
    {"merged": fold_graph, "nodes": insert_nodes}[mode](model, found, steps)
    return {}


def reference(model: ir.Model, **feeds: Any) -> Arrays:
    return {"y": evaluated(model, **feeds)}


EVALUATORS: dict[str, Callable[..., Arrays]] = {"reference": reference, "onnxruntime": run}


def computed(model: ir.Model, *, evaluator: str, dtype: Any, **feeds: Any) -> NDArray[Any]:
    sizes = model.graph.inputs[0].shape
    assert sizes is not None
    x = X.reshape([size if isinstance(size, int) else len(X) for size in sizes]).astype(dtype)
    output = EVALUATORS[evaluator](model, x=x, **feeds)["y"]
    assert output.dtype == dtype
    return output.reshape(len(X), -1).astype(np.float64)


@pytest.mark.parametrize(
    ("name", "dtype", "evaluator"),
    [
        *((name, *each) for name in GRAPHS for each in (("bfloat16", "reference"), ("float32", "onnxruntime"))),
        ("Gemm", "float16", "reference"), ("MatMul", "float16", "onnxruntime"), ("a subgraph", "float32", "reference"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("mode", ["merged", "nodes", "inputs", "rows"])
def test_every_mode_computes_the_same_numbers(name: str, mode: str, dtype: str, evaluator: str) -> None:
    kind, text = FLOATS[dtype], GRAPHS[name]
    base = a_graph_in(text, kind)
    model = base.clone()
    if text.functions and mode != "merged":
        with pytest.raises(InputRefused, match=r"m\.weight is read by the function linear, beside which no branch"):
            insert_adapter(model, mode)
        return
    selected = insert_adapter(model, mode)
    for choice in (True, False):
        compute = functools.partial(computed, evaluator=evaluator, dtype=kind, c=np.array(choice))
        assert np.array_equal(compute(base), X @ W.T + BIAS)
        assert np.array_equal(compute(model, **selected), X @ CHANGED.T + BIAS)
        if mode == "inputs":
            assert np.array_equal(compute(model), X @ W.T + BIAS)
        if mode == "rows":
            mixed = compute(model, adapter_ids=np.array([0, 1, 0]))
            assert np.array_equal(mixed, [X[0] @ W.T + BIAS, X[1] @ CHANGED.T + BIAS, X[2] @ W.T + BIAS])
    if mode != "merged":
        assert contents(base).items() <= contents(model).items()
