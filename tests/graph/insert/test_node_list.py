"""New nodes in order: their names, shapes and types."""

from __future__ import annotations

import onnx_ir as ir

from lora_export.graph.insert.node_factory import NodeFactory, NodeList, last_size, sizes_of
from support.graphs import a_graph
from support.small_graphs import GEMM


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
