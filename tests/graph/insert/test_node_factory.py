"""New nodes and initializers under names that are not in use."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from lora_export.errors import InputRefused
from lora_export.graph.insert.node_factory import NodeFactory, NodeList, last_size, sizes_of
from support.graphs import a_graph
from support.small_graphs import GEMM, LINEAR


def test_nodes_of_one_path_are_numbered() -> None:
    factory = NodeFactory(a_graph(GEMM))
    x = factory.model.graph.inputs[0]
    nodes = [factory.node("MatMul", [x, x], "/m/lora_A") for _ in range(2)]
    assert [node.name for node in nodes] == ["/m/lora_A/MatMul", "/m/lora_A/MatMul_1"]
    assert [node.outputs[0].name for node in nodes] == ["/m/lora_A/MatMul_output_0", "/m/lora_A/MatMul_1_output_0"]
    assert nodes[0].outputs[0].dtype is x.dtype


def test_cast_changes_type_and_keeps_shape() -> None:
    factory = NodeFactory(a_graph(GEMM))
    x = factory.model.graph.inputs[0]
    output = NodeList(factory, "/m").cast(x, ir.DataType.FLOAT16)
    assert (output.dtype, output.shape) == (ir.DataType.FLOAT16, x.shape)


def test_factors_and_constants_become_initializers() -> None:
    factory = NodeFactory(a_graph(GEMM))
    factor = factory.factor("m", "lora_A", np.zeros((3, 1), np.float32))
    assert (factor.value.name, factor.path) == ("m.lora_A.weight", "/m/lora_A")
    constant = factory.constant("/m/lora_A", "shape", np.array([1], np.int64))
    assert [factor.value.name, constant.name] == list(factory.model.graph.initializers)[1:]
    assert constant.name == "m.lora_A.shape"


def test_factor_under_name_of_original_value_is_refused() -> None:
    factory = NodeFactory(a_graph(GEMM))
    with pytest.raises(InputRefused, match=r"the graph holds m\.weight already"):
        factory.factor("", "m", np.zeros(1, np.float32))


def test_an_inner_value_is_not_searched_for_in_all_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is one for each layer, and the search visits all nodes."""
    factory = NodeFactory(a_graph(LINEAR))
    monkeypatch.setattr(ir.Model, "graphs", lambda _: pytest.fail("searched"))
    factory.replace_graph_outputs(factory.model.graph[0].outputs[0], factory.model.graph.inputs[0])


def test_older_opset_is_refused_with_feature() -> None:
    factory = NodeFactory(a_graph(GEMM))
    factory.require_opset(20, "a feature")
    with pytest.raises(InputRefused, match="the graph has opset 20, and a feature needs 21"):
        factory.require_opset(21, "a feature")


# --- New nodes in order: their names, shapes and types. ---


def test_nodes_keep_their_order_and_outputs_have_shape_and_type() -> None:
    model = a_graph(GEMM)
    nodes = NodeList(NodeFactory(model), "/m")
    (x,) = model.graph.inputs
    halves = nodes.add("Cast", [x], ["N", 3], ir.DataType.FLOAT16, to=int(ir.DataType.FLOAT16))
    turned = nodes.add("Transpose", [halves], [3, "N"], perm=[1, 0])
    assert [node.op_type for node in nodes.nodes] == ["Cast", "Transpose"]
    assert [node.name for node in nodes.nodes] == ["/m/Cast", "/m/Transpose"]
    assert turned.dtype == ir.DataType.FLOAT16 and nodes.add("Relu", [turned], None).shape is None
    assert [str(size) for size in sizes_of(turned)] == ["3", "N"] and last_size(halves) == 3
    assert list(nodes.nodes[1].attributes.get_ints("perm") or ()) == [1, 0]
