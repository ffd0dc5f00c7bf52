"""Simplify an exported graph without a change of its weights or of its numbers.

The optimiser is onnxscript's. What it would change although it may not is hidden from it: as a graph input, a tensor
has no value that a rule could read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx_ir as ir
import onnxscript.optimizer
from onnx_ir.passes.common import InlinePass
from onnxscript.optimizer import FOLDED_FROM_KEY

# onnxscript 0.7.2 removes x + c, x - c, x * c and x / c where c is within these tolerances of 0 or 1
# (rewriter/_pattern_ir.py, Constant). Helium's norm divides by sqrt(mean(x * x) + 1e-8): without the 1e-8, a row of
# zeros becomes NaN.
NEUTRAL, RELATIVE, ABSOLUTE = (0.0, 1.0), 1e-5, 1e-8


def simplify(model: ir.Model) -> None:
    """Optimise a graph in place; every weight stays as it is, under its own name.

    The optimiser would fold batch norms into the weights before them, drop zero biases and merge equal tensors of
    different layers: an initializer would no longer be the parameter of its name. It would also take numbers that are
    nearly 0 or 1 for these. A matrix that one Transpose reads is stored transposed, and marked as folded.
    """
    graph = model.graph
    InlinePass()(model)  # so that the numbers in functions are seen
    weights = [(value, value.const_value) for value in graph.initializers.values()]
    hidden = weights + _hidden_numbers(graph)
    count = len(graph.inputs)
    graph.initializers.clear()
    for value, _ in hidden:
        value.const_value = None
        graph.inputs.append(value)
    onnxscript.optimizer.optimize_ir(model)
    del graph.inputs[count:]
    for value, tensor in hidden:
        if value.uses() or value.is_graph_output():
            value.const_value = tensor
            graph.register_initializer(value)
    for value, _ in weights:
        if value.is_initializer():
            _store_transposed(value)


def _hidden_numbers(graph: ir.Graph) -> list[tuple[ir.Value, ir.TensorProtocol | None]]:
    """Numbers that are nearly 0 or 1, each once, with their values, in place of the Constants that had them."""
    found: dict[tuple[ir.DataType, float], ir.Value] = {}
    tensors: list[tuple[ir.Value, ir.TensorProtocol | None]] = []
    for node, tensor in list(_nearly_neutral(graph)):
        (output,) = node.outputs
        key = (tensor.dtype, tensor.numpy().item())
        if key not in found:
            found[key] = ir.Value(
                name=f"number_{len(found)}", shape=ir.Shape(()), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            tensors.append((found[key], tensor))
        ir.convenience.replace_all_uses_with(output, found[key])
        assert node.graph is not None
        node.graph.remove(node, safe=True)
    return tensors


def _nearly_neutral(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.TensorProtocol]]:
    """The Constants of one float that is within the optimiser's tolerance of 0 or 1, and is neither."""
    for node in ir.traversal.RecursiveGraphIterator(graph):
        if node.op_type != "Constant" or node.outputs[0].is_graph_output():
            continue
        tensor = ir.convenience.get_const_tensor(node.outputs[0])
        if tensor is not None and is_nearly_neutral(tensor):
            yield node, tensor


def is_nearly_neutral(tensor: ir.TensorProtocol) -> bool:
    """Whether a tensor is one float that is within the optimiser's tolerance of 0 or 1, and is neither."""
    if tuple(tensor.shape) != () or not tensor.dtype.is_floating_point():
        return False
    number = tensor.numpy().item()
    near = (math.isclose(number, each, rel_tol=RELATIVE, abs_tol=ABSOLUTE) for each in NEUTRAL)
    return number not in NEUTRAL and any(near)


def _store_transposed(weight: ir.Value) -> None:
    """Store a matrix transposed, and marked as folded, if all that reads it is one Transpose."""
    uses = list(weight.uses())
    if len(uses) != 1 or uses[0].node.op_type != "Transpose" or weight.shape is None or len(weight.shape) != 2:
        return
    transpose = uses[0].node
    (transposed,) = transpose.outputs
    if transposed.is_graph_output() or list(transpose.attributes["perm"].as_ints()) != [1, 0]:
        return
    tensor = weight.const_value
    assert tensor is not None and weight.name is not None and transpose.graph is not None
    ir.convenience.replace_all_uses_with(transposed, weight)
    transpose.graph.remove(transpose, safe=True)
    weight.const_value = ir.Tensor(tensor.numpy().T, dtype=tensor.dtype, name=weight.name)  # a view: nothing is copied
    weight.shape = ir.Shape(weight.const_value.shape)
    weight.metadata_props[FOLDED_FROM_KEY] = repr([weight.name])
