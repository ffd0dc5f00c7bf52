"""The graph that candidates were made from: generated inputs that it accepts, the user's inputs, fp64 outputs."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from lora_export.errors import InputRefused
from lora_export.verification.references.base_graph import BaseGraph, inferred_types, open_graph_session, run_in_fp64
from support.graphs import a_graph

DOUBLED = "g (float[N,2] x) => (float[N,2] y) <float[2] w = {2,2}> { y = Mul(x, w) }"
# Which values `lengths` may have is unknown: nothing looks them up.
LENGTHS = "g (int64[N] lengths, float[N,2] x) => (float[N,2] y, int64[N] kept) { y = Relu(x) kept = Identity(lengths) }"
# Accepts batches of 2 rows only, although it declares any.
TWO_ROWS = "g (float[N,2] x) => (float[M,2] y) <int64[2] shape = {2,2}> { y = Reshape(x, shape) }"
# With a cache, it accepts one token at a time: a cache of 5 is padded to 6 positions, which are added to the tokens.
ONE_TOKEN = """
g (float[B,S,4] x, float[B,2,P,4] past_key) => (float[B,T,4] y)
<int64[1] heads = {1}, int64[6] one_before = {0,1,0,0,0,0}>
{ cache = ReduceMean <keepdims = 0> (past_key, heads)
  positions = Pad (cache, one_before)
  y = Add(x, positions) }
"""


def base_graph(text: str, path: Path = Path("base.onnx"), **options: Any) -> BaseGraph:
    return BaseGraph(path, a_graph(text), **options)


def test_three_cases_of_several_sizes_are_generated() -> None:
    inputs = base_graph(DOUBLED).inputs
    assert list(inputs.cases) == ["batch 1 x length 5", "batch 3 x length 16", "batch 4 x length 29"]
    assert [len(arrays["x"]) for arrays in inputs.cases.values()] == [1, 3, 4]
    first, again, other = (base_graph(DOUBLED, seed=seed).inputs.cases["batch 1 x length 5"]["x"] for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_one_case_is_drawn_again_input_by_input() -> None:
    inputs = base_graph("g (float[N,2] x, float[N,2] z) => (float[N,2] y) { y = Add(x, z) }").inputs
    assert set(inputs.perturbed) == {"x", "z"}
    assert np.array_equal(inputs.perturbed["x"]["z"], inputs.varied["z"])
    assert not np.array_equal(inputs.perturbed["x"]["x"], inputs.varied["x"])


def test_sizes_that_the_graph_refuses_are_replaced() -> None:
    cases = base_graph(ONE_TOKEN).inputs.cases
    assert list(cases) == ["batch 1 x length 5 after 0", "batch 3 x length 1 after 5", "batch 4 x length 29 after 0"]
    one = cases["batch 3 x length 1 after 5"]
    assert (one["x"].shape, one["past_key"].shape) == ((3, 1, 4), (3, 2, 5, 4))


def test_a_graph_that_refuses_every_input_is_refused_with_advice() -> None:
    with pytest.raises(
        InputRefused, match=r"^base\.onnx refuses the inputs that are generated for it \(.*\)\. Give inp"
    ):
        _ = base_graph(TWO_ROWS).inputs
    with pytest.raises(InputRefused, match=r'inputs="FILE.npz", with an array for each of lengths, x$'):
        _ = base_graph(LENGTHS).inputs


@pytest.mark.parametrize(
    ("text", "arrays", "problem"),
    [
        (LENGTHS, {"lengths": [3, 4]}, "inputs for {path} cannot be made: the valid values of lengths (int64 [N]) are"),
        (TWO_ROWS, {}, "{path} refuses the inputs that are generated for it ("),
    ],
)
def test_user_inputs_are_the_only_case_where_none_is_generated(
    tmp_path: Path, text: str, arrays: dict[str, Any], problem: str
) -> None:
    path, own = tmp_path / "a. Give b.onnx", tmp_path / "own.npz"
    np.savez(own, x=np.ones((2, 2), np.float32), **arrays)
    inputs = base_graph(text, path, user_inputs=own).inputs
    note, untested = inputs.findings.notes
    assert untested == "whether each input affects the outputs was not tested"
    assert list(inputs.cases) == ["own.npz"] and not inputs.varied
    assert note.startswith(f"{own} is the only case: {problem.format(path=path)}") and "inputs=" not in note


def test_an_input_that_cannot_be_varied_is_noted() -> None:
    text = "g (float[N,2] x, float[1] mask) => (float[N,2] y) { y = Mul(x, mask) }"
    inputs = base_graph(text).inputs
    assert list(inputs.perturbed) == ["x"]
    assert inputs.findings.notes == ("the input mask has a single value: its effect was not tested",)


def test_user_inputs_are_one_more_case(tmp_path: Path) -> None:
    own = tmp_path / "own.npz"
    np.savez(own, x=np.ones((2, 2), np.float32))
    inputs = base_graph(DOUBLED, user_inputs=own).inputs
    assert len(inputs.cases) == 4 and inputs.cases["own.npz"]["x"].tolist() == [[1, 1], [1, 1]]
    np.savez(own, z=np.ones((2, 2), np.float32))
    with pytest.raises(InputRefused, match=r"own\.npz contains z; the graph takes x"):
        _ = base_graph(DOUBLED, user_inputs=own).inputs


def test_outputs_are_computed_in_fp64_and_the_model_is_unchanged(tmp_path: Path) -> None:
    own = tmp_path / "own.npz"
    np.savez(own, x=np.float32([[1, 2**24 + 2]]))
    third = "g (float[N,2] x) => (float[N,2] y) <float[2] w = {1,1}> { y = Add(x, w) }"
    base = base_graph(third, user_inputs=own)
    before = ir.to_proto(base.model).SerializeToString()
    outputs = base.fp64.by_case["own.npz"]["y"]
    assert outputs.dtype == np.float64 and outputs.tolist() == [[2, 2**24 + 3]]  # 2^24 + 3 is no float32
    assert ir.to_proto(base.model).SerializeToString() == before and base.fp64 is base.fp64


def test_the_dtype_is_the_coarsest_of_the_weights() -> None:
    text = "g (float[N] x) => (float[N] y) <{0}> {{ y = Relu(x) }}"
    for weights, dtype in [
        ("float[1] a = {1}", "float32"),
        ("float[1] a = {1}, float16[1] b = {1}", "float16"),
        ("float16[1] a = {1}, bfloat16[1] b = {1}", "bfloat16"),
        ("int64[1] a = {1}", "float32"),
    ]:
        assert base_graph(text.format(weights)).dtype == dtype


def test_the_hash_is_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "base.onnx"
    path.write_bytes(b"a graph")
    assert base_graph(DOUBLED, path).sha256 == hashlib.sha256(b"a graph").hexdigest()


# --- graph sessions ---

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
