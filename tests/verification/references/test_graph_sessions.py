"""Graphs in memory: in their own types, and in fp64."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lora_export.verification.references.graph_sessions import inferred_types, open_graph_session, run_in_fp64
from support.graphs import a_graph

TEXT = "g (float[N,2] x) => (float[N,2] y) <float[2] one = {1,1}> { h = Add(x, one) y = Add(h, one) }"
X = {"x": np.float32([[0, 2**24]])}  # 2^24 + 1 is no float32


def test_a_session_computes_in_the_graphs_own_types() -> None:
    runner = open_graph_session(a_graph(TEXT), "the base graph", "cpu")
    outputs = runner.run(X)
    assert outputs["y"].dtype == np.float32 and outputs["y"].tolist() == [[2, 2**24]]
    assert "the base graph" in str(runner.path)


def test_fp64_keeps_what_fp32_rounds() -> None:
    found = run_in_fp64(a_graph(TEXT), {"one": X, "two": {"x": 2 * X["x"]}})
    assert found.by_case["one"]["y"].dtype == np.float64
    assert found.by_case["one"]["y"].tolist() == [[2, 2**24 + 2]]
    assert found.by_case["two"]["y"].tolist() == [[2, 2**25 + 2]]
    assert found.narrow_operators == frozenset()


def test_operators_without_a_kernel_in_fp64_are_named() -> None:
    found = run_in_fp64(a_graph("g (float[N,2] x) => (float[N,2] y) { y = Elu(x) }"), {"one": X})
    assert found.narrow_operators == {"Elu"} and found.by_case["one"]["y"].tolist() == [[0, 2**24]]


def test_types_that_the_graph_does_not_state_are_inferred() -> None:
    model = a_graph("g (float[N,2] x) => (float16[N,2] y) { h = Neg(x) y = Cast <to = 10> (h) }")
    (neg, _) = model.graph
    neg.outputs[0].type = None
    assert inferred_types(model)[neg.outputs[0].name or ""] is ir.DataType.FLOAT
    assert neg.outputs[0].type is None and len(model.graph.outputs) == 1, "the graph itself is unchanged"
