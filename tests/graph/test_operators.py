"""Layouts of the matrices that operators read."""

from __future__ import annotations

import pytest

from lora_export.graph.operators import layout_at, transposed_layout
from lora_export.plan import Layout
from support.one_weight_graphs import graph_reading

LAYOUTS = {
    "MatMul": ("y = MatMul(x, W)", 1, 2, Layout.IN_OUT),
    "MatMul, first operand": ("y = MatMul(W, x)", 0, 2, Layout.OUT_IN),
    "Gemm": ("y = Gemm(x, W)", 1, 2, Layout.IN_OUT),
    "Gemm, transB": ("y = Gemm <transB = 1> (x, W)", 1, 2, Layout.OUT_IN),
    "Gemm, first operand": ("y = Gemm(W, x)", 0, 2, Layout.OTHER),
    "Gemm, bias": ("y = Gemm(x, x, W)", 2, 2, Layout.OTHER),
    "FusedMatMul, transA": ("y = com.microsoft.FusedMatMul <transA = 1> (W, x)", 0, 2, Layout.IN_OUT),
    "FusedMatMul, transBatchB": ("y = com.microsoft.FusedMatMul <transBatchB = 1> (x, W)", 1, 2, Layout.OTHER),
    "Attention": ("y = com.microsoft.Attention(x, W)", 1, 2, Layout.IN_OUT),
    "Gather": ("y = Gather(W, x)", 0, 2, Layout.EMBEDDING),
    "Gather, columns": ("y = Gather <axis = 1> (W, x)", 0, 2, Layout.OTHER),
    "Conv": ("y = Conv(x, W)", 1, 3, Layout.OUT_IN),
    "Mul": ("y = Mul(x, W)", 1, 2, Layout.OTHER),
    "MatMul, a vector": ("y = MatMul(x, W)", 1, 1, Layout.OTHER),
}


@pytest.mark.parametrize(("body", "index", "rank", "layout"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_operator_determines_layout(body: str, index: int, rank: int, layout: Layout) -> None:
    (node,) = graph_reading(body, Layout.IN_OUT).graph
    assert layout_at(node, index, rank) is layout


def test_transpose_exchanges_in_and_out_only() -> None:
    assert transposed_layout(Layout.IN_OUT) is Layout.OUT_IN
    assert transposed_layout(Layout.OUT_IN) is Layout.IN_OUT
    assert transposed_layout(Layout.EMBEDDING) is Layout.OTHER
