"""A graph in fp64: what it computes when nothing but its stored numbers is rounded.

Weights stay stored as they are and are widened as they are read, so that the wide graph takes no more room on
disk or in memory than one layer's weight in fp64. An operator for which onnxruntime has no fp64 kernel stays in
the type that it had, between casts, and is named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from lora_export.graph.fold import new_initializer
from lora_export.graph.quantised.layouts import NBITS, of_node
from lora_export.graph.readers import MICROSOFT, ONNX, identity
from lora_export.graph.sites import unused, value_names

FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
DOUBLE = ir.DataType.DOUBLE
GRAPHS = frozenset({ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS})
ROUNDS = "lora_export.rounds"  # on a cast that stays one: its rounding is meant
# Operators of which onnxruntime's CPU provider has a kernel in fp64 for all of their floats (a test asks it).
WIDE = {
    *((ONNX, name) for name in (
        "Abs", "Add", "ArgMax", "ArgMin", "BatchNormalization", "Ceil", "Clip", "Concat", "Cos", "CumSum", "Div",
        "Dropout", "Einsum", "Equal", "Exp", "Expand", "Flatten", "Floor", "Gather", "GatherElements", "GatherND",
        "Gemm", "Greater", "GreaterOrEqual", "Identity", "IsInf", "IsNaN", "LayerNormalization", "Less", "LessOrEqual",
        "Log", "LogSoftmax", "MatMul", "Max", "Min", "Mod", "Mul", "Neg", "Pad", "Pow", "Range", "Reciprocal",
        "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
        "ReduceProd", "ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "Round", "ScatterElements", "ScatterND",
        "Shape", "Sigmoid", "Sign", "SimplifiedLayerNormalization", "Sin", "Size", "Slice", "Softmax", "Split", "Sqrt",
        "Squeeze", "Sub", "Sum", "Tanh", "Tile", "Transpose", "Trilu", "Unsqueeze", "Where",
    )),
    (MICROSOFT, "FusedMatMul"),
}  # fmt: skip


def widen(model: ir.Model, types_of: Callable[[ir.Model], Mapping[str, ir.DataType]]) -> tuple[str, ...]:
    """Turn a graph into one that computes in fp64, in memory; returns the operators that could not.

    Its inputs and its stored tensors keep their types, its float outputs become fp64. A MatMulNBits that is
    understood becomes a MatMul by what its bits stand for. Nodes with graphs of their own stay as they are.
    `types_of` is asked for the types of values where the graph does not tell them.
    """
    _dequantise_all(model)
    unknown = [output for node in model.graph for output in node.outputs if output.name and _lacks_type(output)]
    if unknown:
        types = types_of(model)
        for value in unknown:
            if dtype := types.get(value.name or ""):
                value.type = ir.TensorType(dtype)
    widener = _Widener(model)
    for node in list(model.graph):
        widener.visit(node)
    for index, output in enumerate(model.graph.outputs):
        wide = widener.wide.get(output)
        if wide is not None and wide is not output:
            output.name, wide.name = f"{output.name}.narrow", output.name
            model.graph.outputs[index] = wide
    return tuple(sorted(widener.stayed))


def _lacks_type(value: ir.Value) -> bool:
    return value.dtype is None or value.dtype is ir.DataType.UNDEFINED


class _Widener:
    """Goes over the nodes in their order; every float value is either wide itself or has a wide copy."""

    def __init__(self, model: ir.Model):
        self.model, self.taken = model, value_names(model)
        self.wide: dict[ir.Value, ir.Value] = {}  # a float value -> the same in fp64
        self.narrow: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}  # a wide value -> as an operator wants it
        self.was: dict[ir.Value, ir.DataType] = {}  # what a wide value was
        self.stayed: set[str] = set()

    def visit(self, node: ir.Node) -> None:
        if ROUNDS in node.metadata_props:
            self._round(node)
        elif identity(node) == (ONNX, "Cast") and self._is_float_cast(node):
            self._widen_cast(node)
        elif identity(node) in WIDE:
            self._widen_node(node)
        else:
            self._leave(node)

    def _is_float_cast(self, node: ir.Node) -> bool:
        return ir.DataType(node.attributes["to"].as_int()) in FLOATS

    def _widen_cast(self, node: ir.Node) -> None:
        """A cast to a float type, whatever it comes from, is a cast to fp64."""
        (source,), (output,) = node.inputs, node.outputs
        assert source is not None
        if self._is_float(source):
            node.replace_input_with(0, self._as_wide(source, node))
        node.attributes["to"] = ir.AttrInt64("to", int(DOUBLE))
        self._becomes_wide(output)

    def _round(self, node: ir.Node) -> None:
        """A cast that rounds what is to be judged so rounded."""
        (source,), (output,) = node.inputs, node.outputs
        assert source is not None
        if self._is_float(source):
            node.replace_input_with(0, self._as_wide(source, node))
        output.type = ir.TensorType(ir.DataType(node.attributes["to"].as_int()))

    def _widen_node(self, node: ir.Node) -> None:
        for index, value in enumerate(node.inputs):
            if value is not None and self._is_float(value):
                node.replace_input_with(index, self._as_wide(value, node))
        for output in node.outputs:
            if output.dtype in FLOATS:
                self._becomes_wide(output)

    def _leave(self, node: ir.Node) -> None:
        """The node as it is, its inputs as they were: those of its inner graphs, too."""
        floats = any(self._is_float(value) for value in (*node.inputs, *node.outputs) if value is not None)
        if floats and node.op_type not in ("Constant", "DequantizeLinear"):  # these hold numbers, and compute none
            self.stayed.add(node.op_type)
        readers = [node]
        for attribute in node.attributes.values():
            if attribute.type in GRAPHS and not attribute.is_ref():
                graphs = [attribute.value] if attribute.type is ir.AttributeType.GRAPH else attribute.value
                for graph in graphs:
                    readers += ir.traversal.RecursiveGraphIterator(graph)
                    for index, output in enumerate(graph.outputs):
                        if output in self.was:
                            graph.outputs[index] = self._as_narrow(output, node)
        for reader in readers:
            for index, value in enumerate(reader.inputs):
                if value is not None and value in self.was:
                    reader.replace_input_with(index, self._as_narrow(value, node))

    def _is_float(self, value: ir.Value) -> bool:
        return value in self.was or value.dtype in FLOATS

    def _becomes_wide(self, value: ir.Value) -> None:
        self.was[value] = value.dtype if value.dtype in FLOATS else ir.DataType.FLOAT
        value.type = ir.TensorType(DOUBLE)
        self.wide[value] = value

    def _as_wide(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        if value not in self.wide:
            self.wide[value] = self._cast(value, DOUBLE, reader)
        return self.wide[value]

    def _as_narrow(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        key = value, self.was[value]
        if key not in self.narrow:
            self.narrow[key] = self._cast(value, self.was[value], reader)
        return self.narrow[key]

    def _cast(self, value: ir.Value, dtype: ir.DataType, reader: ir.Node) -> ir.Value:
        name = unused(f"{value.name}.{dtype.name.lower()}", self.taken)
        output = ir.Value(name=name, type=ir.TensorType(dtype), shape=value.shape)
        cast = ir.node("Cast", [value], {"to": int(dtype)}, outputs=[output], name=f"/{name}")
        assert reader.graph is not None
        reader.graph.insert_before(reader, cast)
        return output


def late_weights(model: ir.Model) -> None:
    """Let onnxruntime compute what only constants lead to just before it is read, one layer's weight after the other.

    It runs a node's inputs one after the other, those first whose nodes stand later in the graph: what stands at the
    beginning is left for last. Left among the others, every weight of the graph would be there at once.
    """
    made: set[ir.Value] = set()
    early = []
    for node in model.graph:
        constant = all(
            value is None or value in made or (value.is_initializer() and not value.is_graph_input())
            for value in node.inputs
        )
        if constant and not any(attribute.type in GRAPHS for attribute in node.attributes.values()):
            made |= set(node.outputs)
            early.append(node)
    if early:
        model.graph.remove(early)
        model.graph.insert_before(model.graph[0], early)


def _dequantise_all(model: ir.Model) -> None:
    for node in list(model.graph):
        dequantise(model, node)


def dequantise(model: ir.Model, node: ir.Node) -> ir.Node | None:
    """Put a MatMul by the weight (in, out) that a MatMulNBits stands for in its place, and an Add of its bias.

    Returns the MatMul; None, and nothing changes, for any other node and for bits that are not understood.
    """
    held = of_node(node, 1) if node.op_type == NBITS else None
    if held is None or node.graph is None:
        return None
    taken, output = value_names(model), node.outputs[0]
    weight = np.ascontiguousarray(held.rows(slice(None)).T.astype(held.dtype))  # (in, out)
    value = new_initializer(model, unused(f"{node.name or output.name}.weight", taken), ir.Tensor(weight))
    product = ir.node("MatMul", [node.inputs[0], value], name=f"{node.name}/MatMul")
    nodes = [product]
    bias = node.inputs[5] if len(node.inputs) > 5 else None
    if bias is not None:
        product.outputs[0].name = unused(f"{output.name}.product", taken)
        product.outputs[0].type = output.type
        nodes.append(ir.node("Add", [product.outputs[0], bias], name=f"{node.name}/Add"))
    _take_the_place_of(node, nodes)
    return product


def _take_the_place_of(node: ir.Node, nodes: list[ir.Node]) -> None:
    old, new = node.outputs[0], nodes[-1].outputs[0]
    new.type, new.shape, name = old.type, old.shape, old.name
    assert node.graph is not None
    node.graph.insert_before(node, nodes)
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)
    new.name = name
