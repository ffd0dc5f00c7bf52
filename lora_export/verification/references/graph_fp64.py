"""A graph in fp64: what it computes when only its stored numbers are rounded.

Weights stay stored as they are and are widened when they are read. The wide graph needs no more disk or memory than
one layer's weight in fp64. An operator without an fp64 kernel in onnxruntime keeps its dtype, between casts, and is
reported.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np
import onnx_ir as ir

from lora_export.graph.insert.fused_operators import take_attention_apart
from lora_export.graph.insert.node_factory import NodeFactory
from lora_export.graph.operators import MICROSOFT, ONNX, operator_id
from lora_export.graph.quantised_weights import MATMUL_NBITS, of_matmul_nbits
from lora_export.graph.values import new_initializer, unused_name, value_names

NARROW_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
DOUBLE = ir.DataType.DOUBLE
GRAPH_ATTRIBUTES = frozenset({ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS})
KEEPS_ROUNDING = "lora_export.rounds"  # metadata key of a Cast whose rounding is intended
# Operators for which onnxruntime's CPU provider has an fp64 kernel for all of their floats (under test).
FP64_OPERATORS = {
    *((ONNX, name) for name in (
        "Abs", "Add", "ArgMax", "ArgMin", "BatchNormalization", "Ceil", "Clip", "Concat", "Cos", "CumSum", "Div",
        "Dropout", "Einsum", "Equal", "Exp", "Expand", "Flatten", "Floor", "Gather", "GatherElements", "GatherND",
        "Gemm", "Greater", "GreaterOrEqual", "Identity", "IsInf", "IsNaN", "LayerNormalization", "Less", "LessOrEqual",
        "Log", "LogSoftmax", "MatMul", "Max", "Min", "Mod", "Mul", "Neg", "Pad", "Pow", "Range", "Reciprocal",
        "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
        "ReduceProd", "ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "Round", "ScatterElements", "ScatterND",
        "Shape", "Sigmoid", "Sign", "SimplifiedLayerNormalization", "Sin", "Size", "Slice", "Softmax", "Split", "Sqrt",
        "Squeeze", "Sub", "Sum", "Tanh", "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze", "Where",
    )),
    (MICROSOFT, "FusedMatMul"),
}  # fmt: skip


def widen(model: ir.Model, types_of: Callable[[ir.Model], Mapping[str, ir.DataType]]) -> tuple[str, ...]:
    """Let a graph compute in fp64, in memory. Returns the operators that have no fp64 kernel.

    Inputs and stored tensors keep their dtypes, float outputs become fp64. A supported MatMulNBits becomes a MatMul by
    its dequantised weight, and an Attention the fp64 product of q, k and v before what keeps its dtype. Nodes with
    subgraphs do not change. `types_of` returns the dtypes of values for which the graph has none.
    """
    factory = NodeFactory(model)
    for node in list(model.graph):
        dequantise(model, node)
        take_attention_apart(factory, node)
    produced = (output for node in model.graph for output in node.outputs if output.name)
    untyped = [output for output in produced if output.dtype in (None, ir.DataType.UNDEFINED)]
    if untyped:
        types = types_of(model)
        for value in untyped:
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
    return tuple(sorted(widener.narrow_operators))


class _Widener:
    """Visits the nodes in their order. Every float value becomes wide, or gets a wide copy."""

    def __init__(self, model: ir.Model):
        self.model, self.used_names = model, value_names(model)
        self.wide: dict[ir.Value, ir.Value] = {}  # a float value -> the same in fp64
        self.narrow: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}  # a wide value -> its copy for an operator
        self.narrow_dtypes: dict[ir.Value, ir.DataType] = {}  # a wide value -> the dtype that it had
        self.narrow_operators: set[str] = set()

    def visit(self, node: ir.Node) -> None:
        """Widen a node, or cast its inputs to their former dtypes."""
        if KEEPS_ROUNDING in node.metadata_props or (operator_id(node) == (ONNX, "Cast") and self._is_float_cast(node)):
            self._widen_cast(node)
        elif operator_id(node) in FP64_OPERATORS:
            self._widen_node(node)
        else:
            self._leave_narrow(node)

    def _is_float_cast(self, node: ir.Node) -> bool:
        return ir.DataType(node.attributes["to"].as_int()) in NARROW_FLOATS

    def _widen_cast(self, node: ir.Node) -> None:
        """A cast from any dtype to a float dtype becomes a cast to fp64, unless its rounding is intended."""
        (source,), (output,) = node.inputs, node.outputs
        assert source is not None
        if self._is_float(source):
            node.replace_input_with(0, self._as_wide(source, node))
        if KEEPS_ROUNDING in node.metadata_props:
            output.type = ir.TensorType(ir.DataType(node.attributes["to"].as_int()))
        else:
            node.attributes["to"] = ir.AttrInt64("to", int(DOUBLE))
            self._make_wide(output)

    def _widen_node(self, node: ir.Node) -> None:
        for index, value in enumerate(node.inputs):
            if value is not None and self._is_float(value):
                node.replace_input_with(index, self._as_wide(value, node))
        for output in node.outputs:
            if output.dtype in NARROW_FLOATS:
                self._make_wide(output)

    def _leave_narrow(self, node: ir.Node) -> None:
        """Keep a node, and give it its inputs in their former dtypes. Includes the nodes of its subgraphs."""
        has_floats = any(self._is_float(value) for value in (*node.inputs, *node.outputs) if value is not None)
        if has_floats and node.op_type not in ("Constant", "DequantizeLinear"):  # these do not compute in floats
            self.narrow_operators.add(node.op_type)
        readers = [node]
        for graph in _subgraphs(node):
            readers += ir.traversal.RecursiveGraphIterator(graph)
            for index, output in enumerate(graph.outputs):
                if output in self.narrow_dtypes:
                    graph.outputs[index] = self._as_narrow(output, node)
        for reader in readers:
            for index, value in enumerate(reader.inputs):
                if value is not None and value in self.narrow_dtypes:
                    reader.replace_input_with(index, self._as_narrow(value, node))

    def _is_float(self, value: ir.Value) -> bool:
        return value in self.narrow_dtypes or value.dtype in NARROW_FLOATS

    def _make_wide(self, value: ir.Value) -> None:
        self.narrow_dtypes[value] = value.dtype if value.dtype in NARROW_FLOATS else ir.DataType.FLOAT
        value.type = ir.TensorType(DOUBLE)
        self.wide[value] = value

    def _as_wide(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        if value not in self.wide:
            self.wide[value] = self._cast(value, DOUBLE, reader)
        return self.wide[value]

    def _as_narrow(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        key = value, self.narrow_dtypes[value]
        if key not in self.narrow:
            self.narrow[key] = self._cast(value, self.narrow_dtypes[value], reader)
        return self.narrow[key]

    def _cast(self, value: ir.Value, dtype: ir.DataType, reader: ir.Node) -> ir.Value:
        name = unused_name(f"{value.name}.{dtype.name.lower()}", self.used_names)
        output = ir.Value(name=name, type=ir.TensorType(dtype), shape=value.shape)
        cast = ir.node("Cast", [value], {"to": int(dtype)}, outputs=[output], name=f"/{name}")
        assert reader.graph is not None
        reader.graph.insert_before(reader, cast)
        return output


def _subgraphs(node: ir.Node) -> list[ir.Graph]:
    """The graphs in a node's attributes."""
    graphs: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type in GRAPH_ATTRIBUTES and not attribute.is_ref():
            graphs += [attribute.value] if attribute.type is ir.AttributeType.GRAPH else attribute.value
    return graphs


def compute_weights_late(model: ir.Model, parts: Collection[ir.Value] = ()) -> None:
    """Let onnxruntime compute each layer's weight just before it is read, where nodes compute it from constants.

    `parts` are inputs of the graph that weights are computed from, too.

    onnxruntime runs the inputs of a node one after the other, and first those whose nodes are later in the graph. Nodes
    at the beginning of the graph run last. Anywhere else, all computed weights would be in memory at once.
    """
    constant_values = set(parts)
    nodes = []
    for node in model.graph:
        is_constant = all(
            value is None or value in constant_values or (value.is_initializer() and not value.is_graph_input())
            for value in node.inputs
        )
        if is_constant and not any(attribute.type in GRAPH_ATTRIBUTES for attribute in node.attributes.values()):
            constant_values |= set(node.outputs)
            nodes.append(node)
    if nodes:
        model.graph.remove(nodes)
        model.graph.insert_before(model.graph[0], nodes)


def dequantise(model: ir.Model, node: ir.Node) -> ir.Node | None:
    """Replace a MatMulNBits by a MatMul by its dequantised weight (in, out), and an Add of its bias.

    Returns the MatMul. Returns None and changes nothing for any other node and for an unsupported format.
    """
    packed = of_matmul_nbits(node, 1) if node.op_type == MATMUL_NBITS else None
    if packed is None or node.graph is None:
        return None
    used, output = value_names(model), node.outputs[0]
    weight = np.ascontiguousarray(packed.rows(slice(None)).T.astype(packed.dtype))  # (in, out)
    value = new_initializer(model, unused_name(f"{node.name or output.name}.weight", used), ir.Tensor(weight))
    product = ir.node("MatMul", [node.inputs[0], value], name=f"{node.name}/MatMul")
    nodes = [product]
    bias = node.inputs[5] if len(node.inputs) > 5 else None
    if bias is not None:
        product.outputs[0].name = unused_name(f"{output.name}.product", used)
        product.outputs[0].type = output.type
        nodes.append(ir.node("Add", [product.outputs[0], bias], name=f"{node.name}/Add"))
    _replace_node(node, nodes)
    return product


def _replace_node(node: ir.Node, nodes: list[ir.Node]) -> None:
    """Replace a node by others, the last of which has its output."""
    old, new = node.outputs[0], nodes[-1].outputs[0]
    new.type, new.shape, name = old.type, old.shape, old.name
    assert node.graph is not None
    node.graph.insert_before(node, nodes)
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)
    new.name = name
