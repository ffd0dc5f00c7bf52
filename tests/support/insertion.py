"""Graphs with adapters inserted beside their weights. For the tests of graph/insert."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export import plan
from lora_export.formats import onnx_adapter
from lora_export.formats.contract import Contract
from lora_export.graph.find_sites import Sites, find_sites
from lora_export.graph.insert.adapter_inputs import insert_inputs
from lora_export.graph.insert.adapter_nodes import insert_nodes
from lora_export.graph.insert.adapter_rows import insert_rows
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.lora import Adapter, LoraPair
from lora_export.weights.checkpoint import open_checkpoint
from lora_export.weights.merge_report import StepResult
from support.graphs import a_graph, planned, quantised, run
from support.handmade import base_file

X = np.float32([[1, 1, 2], [0, 3, 1]])  # an input of GEMM and LINEAR
W = np.float32([[1, 2, 3], [4, 5, 6]])  # their weight `m.weight` (out, in)
OTHER_PAIR = LoraPair(a=[[0, 1, 0], [1, 0, 0]], b=[[1, 0], [0, 1]], scale=3.0)  # ΔW x = 3 [x1, x0]

TWO_LAYERS = """
g (float[N,2] x) => (float[N,2] y)
<float[2,2] a.weight = {1,2,3,4}, float[2,2] b.weight = {1,0,1,1}>
{ [a] h = MatMul(x, a.weight)
  [b] y = MatMul(h, b.weight) }
"""

EMBEDDING = """
g (int64[N,L] ids) => (float[N,L,2] y)
<float[5,2] words.weight = {1,2,3,4,5,6,7,8,9,1}>
{ [n] y = Gather(words.weight, ids) }
"""
TABLE = np.float64([[1, 2], [3, 4], [5, 6], [7, 8], [9, 1]])  # its weight (num, dim)
IDS = np.array([[0, 4, 2], [-1, -5, 1]])  # an input of it; negative ones count from the end
EMBEDDING_PAIR = LoraPair(a=[[1, 0, 2, 0, -1], [0, 1, 0, 0, 3]], b=[[1, 2], [0, -1]], scale=0.5, embedding=True)

CONVOLUTION = """
g (float[N,2,L] x) => (float[N,3,M] y)
<float[3,2,2] c.weight = {1,2,3,4,5,6,7,8,9,1,2,3}, float[3] c.bias = {10,20,30}>
{ [n] y = Conv <ATTRIBUTES> (x, c.weight, c.bias) }
"""
CONVOLUTION_PAIR = LoraPair(
    a=[[[1, 0], [2, -1]]], b=np.float32([1, -2, 3]).reshape(3, 1, 1), scale=0.5, magnitude=[1, 2, -3]
)

RNG = np.random.default_rng(3)
WEIGHTS = {name: RNG.normal(size=(size, 32)).astype(np.float32) for name, size in {"q": 8, "k": 4, "o": 6}.items()}


def output_of(body: str, **feeds: Any) -> NDArray[Any]:
    """The output `y` of a graph without an adapter."""
    return run(a_graph(body), **feeds)["y"]


def row_ids(*numbers: int) -> NDArray[np.int64]:
    """The adapters of the rows of a batch."""
    return np.array(numbers, np.int64)


def with_nodes(model: ir.Model, *adapters: Adapter, strength_input: bool = False, **options: Any) -> list[StepResult]:
    """Insert adapters as nodes, and check the graph."""
    sites, steps = planned(model, *adapters, **options)
    results = insert_nodes(model, sites, steps, strength_input=strength_input)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return results


def with_inputs(model: ir.Model, *weights: str, **options: Any) -> Contract:
    """Insert inputs for adapters of these weights, and check the graph."""
    contract = insert_inputs(model, find_sites(model), weights, **options)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return contract


def with_rows(
    model: ir.Model, *adapters: Adapter, batch: str = "N", max_rank: int = 0, per_row: int = 1, **options: Any
) -> None:
    """Insert adapters that `adapter_ids` selects per row, and check the graph."""
    sites, steps = planned(model, *adapters, **options)
    insert_rows(model, sites, steps, batch=batch, max_rank=max_rank, per_row=per_row)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def adapter_inputs(contract: Contract, adapter: Adapter, strength: float = 1.0) -> dict[str, NDArray[Any]]:
    """The values of the graph's adapter inputs for one adapter without DoRA."""
    steps = plan.make([adapter], [place.spec for place in contract.places], strengths=[strength])
    return onnx_adapter.input_values(contract, steps, adapter.name)


def dora_weight(weight: NDArray[Any], pair: LoraPair) -> NDArray[np.float64]:
    """m / ‖W + sBA‖ * (W + sBA), in the (out, in, ...) view."""
    assert pair.magnitude is not None
    a, b = pair.a.astype(np.float64), pair.b.astype(np.float64)
    total = weight + pair.scale * (b.reshape(-1, pair.rank) @ a.reshape(pair.rank, -1)).reshape(weight.shape)
    norms = np.sqrt(np.square(total).sum(axis=tuple(range(1, total.ndim))))
    return total * (pair.magnitude / norms).reshape(-1, *[1] * (total.ndim - 1))


def packed_graph(
    folder: Path, *, bits: int = 0, block: int = 32, as_pairs: bool = False, seed: int = 0
) -> tuple[ir.Model, Sites]:
    """A graph of WEIGHTS with q and k packed in one matrix. Only the base checkpoint knows their names."""
    noise = np.random.default_rng(seed).normal(size=(12, 32)).astype(np.float32) * (1e-2 if seed else 0)
    packed = np.concatenate([WEIGHTS["q"], WEIGHTS["k"]]) + noise
    model = a_graph("""
        g (float[N,32] x) => (float[N,12] y, float[N,6] z)
        <float[32,12] W = {0}, float[32,6] V = {0}>
        { [qk] y = MatMul(x, W)
          [o] z = MatMul(x, V) }""")
    for name, array in {"W": packed.T, "V": WEIGHTS["o"].T}.items():
        model.graph.initializers[name].const_value = ir.Tensor(np.ascontiguousarray(array), name=name)
    if bits:
        model = quantised(model, bits=bits, block=block, as_pairs=as_pairs)
    tensors = {"q.weight": packed[:8], "k.weight": packed[8:], "o.weight": WEIGHTS["o"]}
    return model, find_sites(model, open_checkpoint(base_file(folder / f"{seed}.safetensors", tensors)))


def with_reversed_rows(model: ir.Model, value: ir.Value, readers: Iterable[tuple[ir.Node, int]]) -> None:
    """Let readers of a value of rows take what it has for the rows at the other end of the batch."""
    bounds = [ir.tensor([number], ir.DataType.INT64) for number in (-1, -(2**31), 0, -1)]
    constants = [ir.node("Constant", [], {"value": bound}) for bound in bounds]
    reverse = ir.node("Slice", [value, *(node.outputs[0] for node in constants)])
    for reader, index in readers:
        reader.replace_input_with(index, reverse.outputs[0])
    producer = value.producer()
    if producer is None:
        model.graph.insert_before(model.graph[0], [*constants, reverse])
    else:
        model.graph.insert_after(producer, [*constants, reverse])


def with_other_ids(graph: Path, text: str, target: Path) -> Path:
    """The graph whose rows have the ids that this text computes, as `other`, from `adapter_ids`."""
    model = load_graph(graph)
    given = next(value for value in model.graph.inputs if value.name == "adapter_ids")
    kind = f"int64[{', '.join('ab'[: len(given.shape or ())])}]"
    part = a_graph(f"ids ({kind} adapter_ids) => ({kind} other) {{ {text} }}")
    (own,), (other,) = part.graph.inputs, part.graph.outputs
    for old, new in ((given, other), (own, given)):
        for node, index in list(old.uses()):
            node.replace_input_with(index, new)
    nodes = list(part.graph)
    part.graph.outputs.clear()
    part.graph.remove(nodes)
    for number, node in enumerate(nodes):
        node.outputs[0].name = f"other.{number}"
    model.graph.insert_before(model.graph[0], nodes)
    ir.save(model, target)
    return target
