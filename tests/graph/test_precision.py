"""In which precision a graph stores its weights and computes."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from lora_export.graph.find_sites import find_sites
from lora_export.graph.precision import precision_of

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
