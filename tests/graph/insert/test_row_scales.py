"""Several adapters on one row, each times a factor: the row computes W + the sum of their changes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.graph.insert.adapter_rows import insert_rows
from lora_export.lora import LoraPair
from lora_export.provenance import ROW_ADAPTERS_KEY
from support.graphs import a_graph, an_adapter, planned, run
from support.insertion import (
    CONVOLUTION,
    CONVOLUTION_PAIR,
    EMBEDDING,
    EMBEDDING_PAIR,
    OTHER_PAIR,
    TABLE,
    W,
    X,
    with_rows,
)
from support.small_graphs import GEMM, PAIR, SQUARE

SEQUENCES = """
g (float[N,T,3] x) => (float[N,T,2] y)
<float[3,2] m.weight = {1,4,2,5,3,6}>
{ [n] y = MatMul(x, m.weight) }
"""
CHANGES = [0 * W, PAIR.delta(), OTHER_PAIR.delta()]


def two_adapters(model: ir.Model, *, per_row: int = 2) -> ir.Model:
    with_rows(model, an_adapter({"m": PAIR}, name="one"), an_adapter({"m": OTHER_PAIR}, name="two"), per_row=per_row)
    return model


def change(ids: list[int], scales: list[float]) -> NDArray[Any]:
    return np.sum([scale * CHANGES[number] for number, scale in zip(ids, scales, strict=True)], axis=0)


def chosen(ids: Any, scales: Any) -> dict[str, NDArray[Any]]:
    return {"adapter_ids": np.array(ids, np.int64), "adapter_scales": np.array(scales, np.float32)}


def test_a_row_is_the_sum_of_its_adapters() -> None:
    model = two_adapters(a_graph(GEMM))
    x = np.concatenate([X, X])
    ids, scales = [[1, 2], [0, 1], [2, 2], [0, 0]], [[1, 1], [5, 2], [3, -1], [7, 7]]
    output = run(model, x=x, **chosen(ids, scales))["y"]
    for row in range(4):
        assert np.array_equal(output[row], x[row] @ (W + change(ids[row], scales[row])).T), row
    unread = np.where(np.array(ids) == 0, [np.nan, np.inf], scales)
    assert np.array_equal(run(model, x=x, **chosen(ids, unread))["y"], output)
    assert json.loads(model.metadata_props[ROW_ADAPTERS_KEY]) == {"adapters": ["one", "two"], "per_row": 2}
    inputs = [(value.name, str(value.shape), str(value.dtype)) for value in model.graph.inputs[1:]]
    assert inputs == [("adapter_ids", "[N,2]", "INT64"), ("adapter_scales", "[N,2]", "FLOAT")]


@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_both_methods_compute_the_sum(rows: int, tokens: int) -> None:
    model = two_adapters(a_graph(SEQUENCES), per_row=3)
    (branch,) = (node for node in model.graph if node.op_type == "If")
    (condition,) = branch.inputs
    assert condition is not None
    model.graph.outputs.append(condition)
    rng = np.random.default_rng(rows)
    x = rng.integers(-5, 6, (rows, tokens, 3)).astype(np.float32)
    ids, scales = rng.integers(0, 3, (rows, 3)), rng.integers(-2, 3, (rows, 3))
    output = run(model, x=x, **chosen(ids, scales))
    for row in range(rows):
        expected = x[row] @ (W + change(ids[row].tolist(), scales[row].tolist())).T
        assert np.array_equal(output["y"][row], expected)
    assert output[condition.name or ""] == (2 * (rows * tokens + 16) <= 3 * 32 * rows)


def test_rows_of_an_embedding_are_summed() -> None:
    model = a_graph(EMBEDDING)
    other = LoraPair(a=EMBEDDING_PAIR.a[::-1], b=EMBEDDING_PAIR.b, scale=2.0, embedding=True)
    with_rows(
        model, an_adapter({"words": EMBEDDING_PAIR}, name="one"), an_adapter({"words": other}, name="two"), per_row=2
    )
    tokens = np.array([[0, 4, 2], [-1, -5, 1], [3, 0, 1]])
    ids, scales = [[1, 2], [2, 0], [1, 1]], [[1, 2], [-1, 1], [0.5, 1]]
    output = run(model, ids=tokens, **chosen(ids, scales))["y"]
    changes = [0 * TABLE, EMBEDDING_PAIR.delta().T, other.delta().T]
    for row in range(3):
        table = TABLE + sum(scale * changes[number] for number, scale in zip(ids[row], scales[row], strict=True))
        assert np.array_equal(output[row], table[tokens[row]])


def test_convolutions_are_summed() -> None:
    body = CONVOLUTION.replace("ATTRIBUTES", "strides = [1]")
    pair = LoraPair(a=CONVOLUTION_PAIR.a, b=CONVOLUTION_PAIR.b, scale=0.5)
    other = LoraPair(a=2 * pair.a[:, ::-1], b=pair.b, scale=1.0)
    model = a_graph(body)
    with_rows(model, an_adapter({"c": pair}, name="one"), an_adapter({"c": other}, name="two"), per_row=2)
    x = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    output = run(model, x=x, **chosen([[1, 2], [2, 0]], [[3, -1], [0.5, 1]]))["y"]
    weight = model.graph.initializers["c.weight"].const_value
    assert weight is not None
    for row, total in enumerate([3 * pair.delta() - other.delta(), 0.5 * other.delta()]):
        plain = a_graph(body)
        plain.graph.initializers["c.weight"].const_value = ir.Tensor(
            (weight.numpy() + total).astype(np.float32), name="c.weight"
        )
        assert np.array_equal(output[row], run(plain, x=x[row : row + 1])["y"][0])


def test_half_precision_takes_factors_in_fp32() -> None:
    model = a_graph(SEQUENCES.replace("float[", "float16["))
    model.graph.initializers["m.weight"].const_value = ir.Tensor(W.T.astype(np.float16).copy(), name="m.weight")
    two_adapters(model)
    x = np.float16([[[1, 2, 3]]] * 2)
    output = run(model, x=x, **chosen([[1, 2], [2, 0]], [[0.5, 1], [-1, 3]]))["y"]
    for row, total in enumerate([change([1, 2], [0.5, 1]), change([2], [-1])]):
        np.testing.assert_allclose(output[row], x[row].astype(np.float32) @ (W + total).T, rtol=2e-3)


@pytest.mark.parametrize("rows", [1, 8])
def test_infinity_of_an_adapter_of_another_row_does_not_reach_a_row(rows: int) -> None:
    model = a_graph(SEQUENCES)
    huge = LoraPair(a=[[3e38, 3e38, 3e38]], b=[[1e-38], [1e-38]], scale=1.0)
    with_rows(model, an_adapter({"m": huge}, name="huge"), an_adapter({"m": PAIR}, name="one"), per_row=2)
    x = np.full((rows, 1, 3), 2, np.float32)  # times the first adapter's A this overflows
    output = run(model, x=x, **chosen([[2, 0]] * rows, [[1, 1]] * rows))["y"]
    assert np.array_equal(output[0], x[0] @ (W + PAIR.delta()).T)


@pytest.mark.parametrize(
    ("ids", "scales"),
    [([[3, 0]] * 2, [[1, 1]] * 2), ([[-1, 0]] * 2, [[1, 1]] * 2), ([[1, 0]], [[1, 1]] * 2), ([[1, 0]] * 2, [[1, 1]])],
)
def test_invalid_ids_and_another_number_of_rows_end_the_run(ids: Any, scales: Any) -> None:
    model = two_adapters(a_graph(GEMM))
    with pytest.raises(Exception, match="ONNXRuntimeError"):
        run(model, x=X, **chosen(ids, scales))
    assert run(model, x=X, **chosen([[1, 0]] * 2, [[1, 1]] * 2))["y"].shape == (2, 2)


def test_what_has_no_sum_is_refused_by_name() -> None:
    with_dora = LoraPair(a=SQUARE.a, b=SQUARE.b, scale=1.0, magnitude=[1, 2])
    model = a_graph("""
        g (float[N,2] x) => (float[N,2] y)
        <float[2,2] a.weight = {1,2,3,4}, float[2,2] h.weight = {1,0,0,1}>
        { [a] z = MatMul(x, a.weight)
          [h] y = MatMul(z, h.weight) }""")
    sites, steps = planned(model, an_adapter({"a": with_dora}, name="one"), one_at_a_time=True)
    with pytest.raises(InputRefused) as refusal:
        insert_rows(model, sites, steps, batch="N", per_row=2, heads=[{"h.weight": np.float32([[1, 2]])}])
    assert str(refusal.value).splitlines()[1:3] == ["  one, a.weight: DoRA", "  one, h.weight: a whole tensor"]
    model = a_graph(GEMM)
    model.graph.inputs[0].name = "adapter_scales"
    with pytest.raises(InputRefused, match="adapter_scales already"):
        two_adapters(model)
