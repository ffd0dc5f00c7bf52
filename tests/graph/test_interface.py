"""What it takes to run a graph: its inputs and outputs, their types and sizes."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from lora_export.graph.find_sites import find_sites
from lora_export.graph.interface import Port, is_adapter_tensor, precision_of, read_interface
from support.graphs import a_graph
from support.small_graphs import a_matmul


def test_inputs_and_outputs_have_types_sizes_and_defaults() -> None:
    found = read_interface(
        a_graph(
            "g (float[N,3] x, int64[1] ids, float16[2] w) => (bool[N] y, bfloat16[M,4] z) <float16[2] w = {0,0}> {}"
        )
    )
    assert found.inputs == (
        Port("x", "float32", ("N", 3)),
        Port("ids", "int64", (1,)),
        Port("w", "float16", (2,), optional=True),
    )
    assert found.outputs == (Port("y", "bool", ("N",)), Port("z", "bfloat16", ("M", 4)))
    assert dict(found.opsets) == {"": 20}


def test_a_size_without_a_name_is_not_stated() -> None:
    model = a_graph("g (float[N,3] x, string[N] s) => (float[N,3] y) { y = Relu(x) }")
    model.graph.inputs[0].shape = ir.Shape([None, 3])
    model.graph.outputs[0].shape = None
    model.graph.outputs[0].type = None
    found = read_interface(model)
    assert found.inputs[0].shape == (None, 3) and found.inputs[1].dtype == "string"
    assert found.outputs == (Port("y", "unknown", None),)


@pytest.mark.parametrize(("shape", "axes"), [((1, 3), ()), (("N", 3, None), (0, 2)), (None, ())])
def test_axes_that_may_vary_are_those_without_a_number(
    shape: tuple[int | str | None, ...] | None, axes: tuple[int, ...]
) -> None:
    assert Port("x", "float32", shape).dynamic_axes == axes


@pytest.mark.parametrize(
    ("name", "is_adapters"),
    [
        ("m.weight", False),
        ("m.lora_A.weight", True),
        ("m.lora_B", True),
        ("lora_embedding_A.fr", True),
        ("m.lora_magnitude_vector", True),
        ("m.lora_Alpha", False),
        ("explora_A", False),
    ],
)
def test_a_site_of_an_adapter_is_known_by_its_tensors_name(name: str, is_adapters: bool) -> None:
    sites = find_sites(a_matmul(name))
    (site,) = (*sites.linear, *sites.unnamed)
    assert is_adapter_tensor(site) is is_adapters


# --- In which precision a graph stores its weights, and in which it computes with them: they need not be the same ---


GRAPHS = {
    "weights stored in float32, computed in float32": "float[3,2] W = {1,2,3,4,5,6}> { y = MatMul(x, W) }",
    "weights stored in float16, computed in float32": """float16[3,2] W = {1,2,3,4,5,6}>
        { V = Cast <to = 1> (W)  y = MatMul(x, V) }""",
    "weights stored in float32, computed in float16": """float[3,2] W = {1,2,3,4,5,6}>
        { h = Cast <to = 10> (x)  V = Cast <to = 10> (W)  z = MatMul(h, V)  y = Cast <to = 1> (z) }""",
    "weights stored in int8 by tensor, computed in float32": """int8[3,2] W = {1,2,3,4,5,6}, float s = {0.5}>
        { V = DequantizeLinear(W, s)  y = MatMul(x, V) }""",
}


@pytest.mark.parametrize("stated", GRAPHS)
def test_stored_and_computed_are_stated_apart(stated: str) -> None:
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 20]>
        g (float[N,3] x) => (float[N,2] y) <{GRAPHS[stated]}""")
    precision = precision_of(find_sites(model))
    assert str(precision) == stated


def test_most_entries_decide() -> None:
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 20]>
        g (float[N,2] x) => (float[N,9] y) <float16[2,2] W = {1,2,3,4}, float[2,9] V> {
            U = Cast <to = 1> (W)  h = MatMul(x, U)  y = MatMul(h, V) }""")
    assert precision_of(find_sites(model)).stored == "float16"  # V has no value here


def test_a_graph_without_layers_has_no_precision() -> None:
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 20]>
        g (float[N] x) => (float[N] y) { y = Add(x, x) }""")
    assert precision_of(find_sites(model)) is None
