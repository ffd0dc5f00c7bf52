"""Notes on weights that are not read."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from lora_export.graph.find_sites import find_sites


@pytest.mark.parametrize(
    ("body", "note"),
    [
        ("y = m.MatMulNBits <K = 2, N = 2> (x, W, x)", "1 MatMulNBits nodes hold quantised weights"),
        ("y = m.FusedThing (x, W)", "1 matrices are read by FusedThing"),
        ("y = Gemm (W, x)", "1 matrices are read by Gemm as its first operand"),
        ("q = Cast <to = 3> (W) z = Cast <to = 1> (q) y = MatMul (x, z)", "1 matrices are read by Cast"),
    ],
)
def test_weights_that_are_not_read_are_noted(body: str, note: str) -> None:
    model = ir.from_onnx_text(f"""
        <ir_version: 10, opset_import: ["" : 20, "m" : 1]>
        g (float[2,2] x) => (float[2,2] y) <float[2,2] W = {{1,2,3,4}}> {{ {body} }}""")
    assert any(note in line for line in find_sites(model).notes)
