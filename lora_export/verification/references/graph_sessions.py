"""Sessions of graphs in memory: in their own types, and in fp64."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import onnx_ir as ir

from lora_export.graph.onnx_file.writing import in_memory
from lora_export.graph.values import drop_tensors
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.ort_session import InMemoryGraph
from lora_export.runtime.runner import TIMEOUT, Arrays
from lora_export.verification.references.graph_fp64 import compute_weights_late, widen

FLOAT_OUTPUTS = {
    "tensor(float)": ir.DataType.FLOAT,
    "tensor(float16)": ir.DataType.FLOAT16,
    "tensor(bfloat16)": ir.DataType.BFLOAT16,
}


class Fp64Outputs(NamedTuple):
    """The outputs of a graph in fp64, by case, and the operators that have no kernel in fp64."""

    by_case: Mapping[str, Arrays]
    narrow_operators: frozenset[str]


def open_graph_session(model: ir.Model, name: str, provider: str, *, timeout: float = TIMEOUT) -> OnnxRunner:
    """Open a session of a graph, optimised. It gives memory back as soon as it is free."""
    compute_weights_late(model)
    return OnnxRunner(InMemoryGraph(name, *in_memory(model)), provider, low_memory=True, timeout=timeout)


def run_in_fp64(model: ir.Model, cases: Mapping[str, Arrays], *, timeout: float = TIMEOUT) -> Fp64Outputs:
    """Run a graph in fp64 on the CPU, without optimisations. The graph is changed and of no further use."""
    runner, narrow_operators = open_in_fp64(model, timeout=timeout)
    return Fp64Outputs({name: runner.run(arrays) for name, arrays in cases.items()}, narrow_operators)


def open_in_fp64(
    model: ir.Model, *, parts: Collection[ir.Value] = (), timeout: float = TIMEOUT
) -> tuple[OnnxRunner, frozenset[str]]:
    """A session of a graph in fp64 on the CPU, without optimisations, and the operators without a kernel in fp64.

    `parts` are inputs that weights are computed from. The graph is changed and of no further use.
    """
    narrow_operators = frozenset(widen(model, inferred_types))
    compute_weights_late(model, parts)
    graph = InMemoryGraph("the graph in fp64", *in_memory(model))
    drop_tensors(model)  # graphs are cyclic: with them, the weights made for this one would stay in memory
    return OnnxRunner(graph, optimise=False, low_memory=True, timeout=timeout), narrow_operators


def inferred_types(model: ir.Model) -> dict[str, ir.DataType]:
    """The float types that onnxruntime infers for values whose type the graph does not state."""
    exposed = model.clone()
    produced = (value for node in exposed.graph for value in node.outputs if value.name)
    unknown = [value for value in produced if value.dtype in (None, ir.DataType.UNDEFINED)]
    exposed.graph.outputs.extend(value for value in unknown if not value.is_graph_output())
    session = OnnxRunner(InMemoryGraph("the graph", *in_memory(exposed)), optimise=False).session
    return {value.name: FLOAT_OUTPUTS[value.type] for value in session.get_outputs() if value.type in FLOAT_OUTPUTS}
