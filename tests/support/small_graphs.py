"""Small graphs as ONNX text, and adapters whose ΔW can be computed by hand. For the tests of graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export import plan
from lora_export.graph.find_sites import find_sites
from lora_export.graph.merge.fold import fold_graph
from lora_export.lora import Adapter, LoraPair
from lora_export.weights.merge_report import StepResult
from support.graphs import a_graph, an_adapter, planned

PAIR = LoraPair(a=[[1, 0, -1]], b=[[1], [2]], scale=2.0)
DELTA = np.float32([[2, 0, -2], [4, 0, -4]])  # ΔW of PAIR, 2 * [[1], [2]] [[1, 0, -1]] (out, in)
SQUARE = LoraPair(a=[[1, 0]], b=[[1], [2]], scale=1.0)  # ΔW = [[1, 0], [2, 0]] (out, in)

LINEAR = """
g (float[N,3] x) => (float[N,2] y)
<float[3,2] m.weight = {1,4,2,5,3,6}, float[2] m.bias = {10,20}, float[2] other.bias = {7,8}>
{ [n] h = MatMul(x, m.weight)
  [b] k = Add(h, m.bias)
  [o] y = Mul(k, other.bias) }
"""
LINEAR_WEIGHT = [[1, 4], [2, 5], [3, 6]]  # of LINEAR (in, out)

GEMM = """
g (float[N,3] x) => (float[N,2] y)
<float[2,3] m.weight = {1,2,3,4,5,6}>
{ [n] y = Gemm <transB = 1> (x, m.weight) }
"""

# Two 2 x 2 layers that share [[1, 2], [3, 4]] (in, out).
SHARED = """
g (float[N,2] x) => (float[N,2] y)
<float[2,2] a.fc.weight = {1,2,3,4}>
{ [first] h = MatMul(x, a.fc.weight)
  [second] y = MatMul(h, a.fc.weight) }
"""

# An embedding whose table is the weight of a linear layer too.
TIED_TABLE = """
g (int64[N] ids) => (float[N,3] y)
<float[3,2] tied.weight = {1,2,3,4,5,6}>
{ [e] x = Gather(tied.weight, ids)
  [t] w = Transpose(tied.weight)
  [n] y = MatMul(x, w) }
"""

# The head is a MatMul and an Add, behind a layer of its own.
CLASSIFIER = """
g (float[N,2] x) => (float[N,3] logits)
<float[2,2] a.weight = {1,2,3,4}, float[2,3] head.weight = {1,0,2,1,1,0}, float[3] head.bias = {5,6,7}>
{ [a] h = MatMul(x, a.weight)
  [head] y = MatMul(h, head.weight)
  [plus] logits = Add(y, head.bias) }
"""

MATMUL = """
g (float[N,2] x) => (float[N,3] y)
<float[2,3] W = {1,2,3,4,5,6}>
{ [n] y = MatMul(x, W) }
"""


def a_matmul(name: str, node: str = "n", *, module: str = "", **origins: str) -> ir.Model:
    """A graph of one MatMul by the initializer `name` (2, 3), which was traced in `module`."""
    model = a_graph(MATMUL, modules={"n": module} if module else None, **origins)
    model.graph.initializers["W"].name = name
    model.graph[0].name = node
    return model


def filled(body: str, **arrays: NDArray[Any]) -> ir.Model:
    """A graph whose initializers `NAME = {0}` are these arrays."""
    model = a_graph(body)
    for name, array in arrays.items():
        value = model.graph.initializers[name]
        value.const_value = ir.Tensor(np.ascontiguousarray(array), name=name)
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(value.const_value.dtype)
    return model


def graph_with_external_data(folder: Path, **fields: str) -> Path:
    """LINEAR in a file, with its weight (24 bytes) after 8 others in `weights.data`. `fields` replace its location."""
    proto = ir.to_proto(a_graph(LINEAR))
    tensor = proto.graph.initializer[0]
    (folder / "weights.data").write_bytes(b"\0" * 8 + np.float32(LINEAR_WEIGHT).tobytes())
    tensor.ClearField("float_data")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in ({"location": "weights.data", "offset": "8", "length": "24"} | fields).items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def folded(model: ir.Model, *adapters: Adapter, **options: Any) -> list[StepResult]:
    """Fold adapters into a graph."""
    sites, steps = planned(model, *adapters, **options)
    return fold_graph(model, sites, steps)


def random_adapter(model: ir.Model, *, seed: int = 0) -> tuple[Adapter, dict[str, NDArray[Any]]]:
    """Random pairs for every linear layer, and their ΔW by weight."""
    rng = np.random.default_rng(seed)
    pairs, changes = {}, {}
    for spec in find_sites(model).specs:
        if spec.layout not in (plan.Layout.OUT_IN, plan.Layout.IN_OUT) or len(spec.shape) > 2:
            continue
        out, inner = spec.matrix
        pair = LoraPair(a=rng.normal(size=(2, inner)), b=rng.normal(size=(out, 2)) * 0.3, scale=0.5)
        pairs[spec.name.removesuffix(".weight").removesuffix(".in_proj_weight")] = pair
        changes[spec.name] = 0.5 * pair.b.astype(np.float64) @ pair.a.astype(np.float64)
    return an_adapter(pairs), changes
