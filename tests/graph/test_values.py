"""Values of a graph: stored tensors, names in use, and new initializers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lora_export.graph.values import (
    attribute_tensors,
    initializers,
    is_stored,
    new_initializer,
    stored_dtype,
    stored_shape,
    tensor_of,
    unused_name,
    value_names,
)
from support.graphs import a_graph

SUBGRAPH = """
g (float[N,2] x, bool c) => (float[N,2] y)
<float[2,2] w = {1,2,3,4}>
{ k = Constant <value = float[2] {5, 6}> ()
  y = If (c) <
    then_branch = t () => (float[N,2] a) <float[2,2] v = {1,0,0,1}> { a = MatMul(x, v) },
    else_branch = e () => (float[N,2] b) { b = Add(x, k) }> }
"""


def test_initializers_of_subgraphs_are_included() -> None:
    assert [value.name for value in initializers(a_graph(SUBGRAPH))] == ["w", "v"]


def test_names_of_all_values_are_in_use() -> None:
    assert value_names(a_graph(SUBGRAPH)) == {"x", "c", "w", "k", "y", "v", "a", "b"}


def test_unused_name_is_numbered_and_then_in_use() -> None:
    used = {"a", "a_1"}
    assert [unused_name("a", used), unused_name("a", used), unused_name("b", used)] == ["a_2", "a_3", "b"]
    assert used == {"a", "a_1", "a_2", "a_3", "b"}


def test_constant_node_stores_a_tensor_and_input_does_not() -> None:
    model = a_graph(SUBGRAPH)
    constant, x = model.graph[0].outputs[0], model.graph.inputs[0]
    tensor = tensor_of(constant)
    assert tensor is not None and tensor.numpy().tolist() == [5, 6]
    assert (stored_shape(constant), stored_dtype(constant), is_stored(constant)) == ((2,), "float32", True)
    assert (tensor_of(x), stored_shape(x), stored_dtype(x), is_stored(x)) == (None, (), "", False)
    assert [tensor.numpy().tolist() for tensor in attribute_tensors(model)] == [[5, 6]]


def test_new_initializer_has_type_and_shape_of_its_tensor() -> None:
    model = a_graph(SUBGRAPH)
    value = new_initializer(model, "u", ir.Tensor(np.zeros((3, 4), np.float16)))
    assert model.graph.initializers["u"] is value
    assert (value.dtype, list(value.shape or ())) == (ir.DataType.FLOAT16, [3, 4])
