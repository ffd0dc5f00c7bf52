"""Graphs in bfloat16 under ONNX's own reference evaluator: onnxruntime's CPU provider has no kernels for them.

Each node computes in fp32 and rounds its result to bfloat16 once, as processors do that multiply in bfloat16. The
evaluator's own sums in bfloat16 round at every addition, which no deployment does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from lora_export.graph.onnx_file.reading import load_graph
from lora_export.runtime.ort_session import InMemoryGraph
from lora_export.runtime.runner import Arrays, Placement

EVALUATOR = "ONNX reference evaluator"
NARROW = np.dtype(ml_dtypes.bfloat16)
CAST = "Cast"  # its result has the dtype that it names


@dataclass(frozen=True)
class NodeArg:
    """An input or output, as onnxruntime's sessions describe it."""

    name: str
    type: str  # such as `tensor(bfloat16)`
    shape: list[int | str | None]


class ReferenceSession:
    """A graph under the reference evaluator, with those methods of onnxruntime's InferenceSession that are used here.

    Raises any exception of the evaluator for operators that it does not have, such as onnxruntime's own.
    """

    def __init__(self, model: ir.Model):
        graph = model.graph
        self._inputs = [_described(value) for value in graph.inputs if not value.is_initializer()]
        self._defaults = [_described(value) for value in graph.inputs if value.is_initializer()]
        self._outputs = [_described(value) for value in graph.outputs]
        self._metadata = dict(model.metadata_props)
        self._nodes = tuple((node.name or "", node.op_type) for node in graph)
        self._evaluator = ReferenceEvaluator(ir.to_proto(model), new_ops=[GatherElements])
        self._run_options: Any = None
        nodes: list[Any] = self._evaluator.rt_nodes_
        nodes[:] = [_RoundingNode(node, self._is_stopped) for node in nodes]

    def get_inputs(self) -> list[NodeArg]:
        """The inputs without a default value."""
        return self._inputs

    def get_overridable_initializers(self) -> list[NodeArg]:
        """The inputs with a default value."""
        return self._defaults

    def get_outputs(self) -> list[NodeArg]:
        return self._outputs

    def get_modelmeta(self) -> Any:
        return SimpleNamespace(custom_metadata_map=self._metadata)

    def run(self, names: Sequence[str], inputs: Arrays, run_options: Any = None) -> list[NDArray[Any]]:
        """One forward pass. Ends with RuntimeError before the next node once `terminate` of the options is set."""
        self._run_options = run_options
        return list(self._evaluator.run(list(names), inputs))

    def _is_stopped(self) -> bool:
        return bool(getattr(self._run_options, "terminate", False))

    def placement(self) -> Placement:
        """All nodes, under the evaluator's name in place of a provider's."""
        return Placement(EVALUATOR, {EVALUATOR: self._nodes}, {}, onnx.__version__)


class GatherElements(OpRun):
    """The operator for any length: the evaluator's own ends at 64 (np.choose)."""

    op_domain = ""

    def _run(self, data: NDArray[Any], indices: NDArray[Any], axis: int = 0) -> tuple[NDArray[Any]]:
        return (np.take_along_axis(data, np.where(indices < 0, indices + data.shape[axis], indices), axis),)


class _RoundingNode:
    """A node of the evaluator that computes in fp32 where its inputs are in bfloat16."""

    def __init__(self, node: Any, is_stopped: Callable[[], bool]):
        self._node, self._is_stopped = node, is_stopped

    def __getattr__(self, name: str) -> Any:
        return getattr(self._node, name)

    def run(self, *inputs: Any, **options: Any) -> tuple[Any, ...]:
        if self._is_stopped():
            raise RuntimeError("the run was stopped")
        is_narrow = [getattr(value, "dtype", None) == NARROW for value in inputs]
        if not any(is_narrow) or self._node.onnx_node.op_type == CAST:
            return tuple(self._node.run(*inputs, **options))
        wide = [value.astype(np.float32) if narrow else value for value, narrow in zip(inputs, is_narrow, strict=True)]
        outputs = self._node.run(*wide, **options)
        return tuple(
            value.astype(NARROW) if getattr(value, "dtype", None) == np.float32 else value for value in outputs
        )


def open_reference(graph: Path | InMemoryGraph) -> ReferenceSession | None:
    """The graph under the reference evaluator, all of it in memory; None for a graph without values in bfloat16."""
    model = load_graph(graph) if isinstance(graph, Path) else _from_memory(graph)
    values = [*model.graph.initializers.values(), *model.graph.inputs]
    if all(value.dtype is not ir.DataType.BFLOAT16 for value in values):
        return None
    return ReferenceSession(ir.external_data.load_to_model(model))


def open_evaluated(path: str) -> Callable[[Arrays], Arrays]:
    """The runner `onnx-reference`: a graph of standard operators under the reference evaluator, in its own types."""
    session = ReferenceSession(ir.external_data.load_to_model(load_graph(Path(path))))
    names = [value.name for value in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))


def _from_memory(graph: InMemoryGraph) -> ir.Model:
    model = ir.from_proto(onnx.load_model_from_string(graph.message))
    for name, array in graph.tensors.items():
        value = model.graph.initializers[name]
        value.const_value = ir.Tensor(array, name=name, dtype=value.dtype)
    if graph.folder is not None:
        ir.external_data.set_base_dir(model.graph, graph.folder)
    return model


def _described(value: ir.Value) -> NodeArg:
    assert value.name is not None
    sizes = [] if value.shape is None else [size if isinstance(size, int) else size.value for size in value.shape]
    kind = "" if value.dtype is None else value.dtype.name.lower()
    return NodeArg(value.name, f"tensor({kind})", sizes)
