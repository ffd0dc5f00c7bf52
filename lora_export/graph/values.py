"""Values of a graph: the tensors that they hold, the names that are in use, and new initializers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx_ir as ir

from lora_export.errors import InputRefused

MIN_IR_VERSION = 4  # before it, every initializer had to be an input, and no input was optional


def initializers(model: ir.Model) -> Iterator[ir.Value]:
    """Every initializer of the main graph and of all subgraphs."""
    return (value for graph in model.graphs() for value in graph.initializers.values())


def drop_unused(values: Iterable[ir.Value | None]) -> None:
    """Take initializers out of their graphs that nothing reads any more."""
    for value in values:
        if value is not None and value.is_initializer() and not value.uses() and not value.is_graph_output():
            assert value.graph is not None
            value.graph.initializers.pop(value.name or "")


def drop_tensors(model: ir.Model) -> None:
    """Take the tensors of all initializers out of a graph that is no longer used.

    onnxscript's rules hold the last graph that they were applied to, and with it all weights.
    """
    for value in initializers(model):
        value.const_value = None


def initializer_tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """The tensors of all initializers, except strings, which have no bytes of their own."""
    for value in initializers(model):
        if value.const_value is not None and not value.const_value.dtype.is_string():
            yield value.const_value


def attribute_tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """The tensors in attributes of nodes (Constant, above all), except strings. Functions and subgraphs included."""
    for _, attribute in _node_attributes(model):
        tensors = {ir.AttributeType.TENSOR: [attribute.value], ir.AttributeType.TENSORS: attribute.value}
        for tensor in tensors.get(attribute.type) or ():
            if not tensor.dtype.is_string():
                yield tensor


def keep_in_nodes(model: ir.Model) -> None:
    """Make external tensors in attributes a part of the graph's message: a copy of their file would have no owner."""
    for node, attribute in list(_node_attributes(model)):
        if attribute.type is ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
            node.attributes[attribute.name] = ir.AttrTensor(attribute.name, read_later(attribute.value))


def _node_attributes(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Attr]]:
    """The attributes that nodes have themselves. Functions and subgraphs included."""
    bodies: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for body in bodies:
        for node in ir.traversal.RecursiveGraphIterator(body):
            yield from ((node, attribute) for attribute in node.attributes.values() if not attribute.is_ref())


def stored_at(
    tensor: ir.TensorProtocol,
    location: str,
    offset: int | None,
    length: int | None = None,
    *,
    name: str | None,
    folder: str | Path = "",
) -> ir.ExternalTensor:
    """A tensor of this dtype and shape whose bytes are in a file, from `offset` on. Reads nothing."""
    return ir.ExternalTensor(
        *(location, offset, tensor.nbytes if length is None else length, tensor.dtype),
        shape=ir.Shape(tensor.shape.numpy()),
        name=name or "",
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
        base_dir=folder,
    )


def read_later(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
    """The tensor as one of the graph's message: its bytes are read where the message is written."""
    return ir.LazyTensor(
        lambda: tensor, dtype=tensor.dtype, shape=ir.Shape(tensor.shape), name=tensor.name, doc_string=tensor.doc_string
    )


def tensor_of(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of an initializer or a Constant node. None where the value is computed."""
    if value.const_value is not None:
        return value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    attribute = node.attributes.get("value")
    return attribute.as_tensor() if attribute is not None and not attribute.is_ref() else None


def before_reshapes(value: ir.Value) -> Iterator[ir.Value]:
    """A value, and the values of which it is only a cast or another shape."""
    yield value
    node = value.producer()
    if node is not None and node.op_type in ("Reshape", "Cast", "Identity", "Unsqueeze") and node.inputs[0] is not None:
        yield from before_reshapes(node.inputs[0])


def is_stored(value: ir.Value | None) -> bool:
    """Whether the graph stores the value as a tensor."""
    return value is not None and tensor_of(value) is not None


def stored_shape(value: ir.Value) -> tuple[int, ...]:
    """The shape of a stored tensor. Empty where the value is computed."""
    tensor = tensor_of(value)
    return tuple(int(size) for size in tensor.shape.numpy()) if tensor is not None else ()


def stored_dtype(value: ir.Value) -> str:
    """NumPy's name for the dtype of a stored tensor. Empty where the value is computed."""
    tensor = tensor_of(value)
    if tensor is None:
        return ""
    return "string" if tensor.dtype.is_string() else str(tensor.dtype.numpy())


def value_names(model: ir.Model) -> set[str]:
    """The names of all values in the model's graph and subgraphs."""
    values = [value for graph in model.graphs() for value in (*graph.inputs, *graph.initializers.values())]
    values += [output for node in ir.traversal.RecursiveGraphIterator(model.graph) for output in node.outputs]
    return {value.name for value in values if value.name}


def unused_name(name: str, used: set[str]) -> str:
    """`name`, or `name_1`, `name_2` and so on where it is in use. Adds the result to `used`."""
    number, unused = 0, name
    while unused in used:
        number += 1
        unused = f"{name}_{number}"
    used.add(unused)
    return unused


def refuse_old_ir(model: ir.Model) -> None:
    """Raise InputRefused for a graph that is to get tensors, in an IR version in which every such is an input."""
    if model.ir_version < MIN_IR_VERSION:
        raise InputRefused(
            f"the graph has IR version {model.ir_version}, in which every stored tensor is an input: convert it to "
            f"version {MIN_IR_VERSION} or later"
        )


def new_initializer(model: ir.Model, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Register an initializer with the main graph, where every subgraph sees it."""
    shape = ir.Shape(tensor.shape.numpy())
    value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=shape)
    model.graph.register_initializer(value)
    return value
