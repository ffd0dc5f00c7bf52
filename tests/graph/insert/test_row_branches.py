"""Branches with an adapter per row: by copies of the factors, or by the products of all adapters."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from lora_export.lora import LoraPair
from support.graphs import a_graph, an_adapter, run
from support.insertion import OTHER_PAIR, W, with_rows
from support.small_graphs import PAIR

SEQUENCES = """
g (float[N,T,3] x) => (float[N,T,2] y)
<float[3,2] m.weight = {1,4,2,5,3,6}>
{ [n] y = MatMul(x, m.weight) }
"""


@pytest.mark.parametrize("rows", [1, 2, 5, 16])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_cheaper_of_two_equal_methods_is_chosen(rows: int, tokens: int) -> None:
    model = a_graph(SEQUENCES)
    with_rows(
        model,
        *(an_adapter({"m": pair}, name=name) for name, pair in {"one": PAIR, "two": OTHER_PAIR, "3": PAIR}.items()),
    )
    (branch,) = (node for node in model.graph if node.op_type == "If")
    (chosen,) = branch.inputs
    assert chosen is not None
    model.graph.outputs.append(chosen)
    ids = np.arange(rows) % 4
    x = np.random.default_rng(0).integers(-5, 6, (rows, tokens, 3)).astype(np.float32)
    output = run(model, x=x, adapter_ids=ids)
    weights = [W, W + PAIR.delta(), W + OTHER_PAIR.delta(), W + PAIR.delta()]
    for row, number in enumerate(ids):
        assert np.array_equal(output["y"][row], x[row] @ weights[number].T)
    assert output[chosen.name or ""] == (3 * (rows * tokens + 16) <= 32 * rows)


@pytest.mark.parametrize("rows", [1, 8])
def test_infinity_of_other_adapter_does_not_reach_row(rows: int) -> None:
    model = a_graph(SEQUENCES)
    huge = LoraPair(a=[[3e38, 3e38, 3e38]], b=[[1e-38], [1e-38]], scale=1.0)
    with_rows(model, an_adapter({"m": huge}, name="huge"), an_adapter({"m": PAIR}, name="one"))
    x = np.full((rows, 1, 3), 2, np.float32)  # times the first adapter's A this overflows
    x[1:, 0, 0] = np.inf
    output = run(model, x=x, adapter_ids=np.full(rows, 2))["y"]
    assert np.array_equal(output[0], x[0] @ (W + PAIR.delta()).T)
    assert np.array_equal(run(model, x=x[:1].repeat(rows, 0), adapter_ids=0 * np.full(rows, 2))["y"][0], x[0] @ W.T)


def test_many_adapters_are_multiplied_by_copies() -> None:
    model = a_graph(SEQUENCES)
    pairs = [LoraPair(a=PAIR.a, b=PAIR.b, scale=float(number)) for number in range(1, 33)]
    with_rows(model, *(an_adapter({"m": pair}, name=str(number)) for number, pair in enumerate(pairs)))
    assert not any(node.op_type == "If" for node in model.graph)
    x = np.float32([[[1, 2, 3]]] * 40)
    output = run(model, x=x, adapter_ids=np.arange(40) % 33)["y"]
    for row in range(40):
        change = pairs[row % 33 - 1].delta() if row % 33 else 0
        assert np.array_equal(output[row], x[row] @ (W + change).T)


def test_half_precision_is_multiplied_by_copies() -> None:
    model = a_graph(SEQUENCES.replace("float[", "float16["))
    model.graph.initializers["m.weight"].const_value = ir.Tensor(W.T.astype(np.float16).copy(), name="m.weight")
    with_rows(model, an_adapter({"m": PAIR}, name="one"), an_adapter({"m": OTHER_PAIR}, name="two"))
    assert not any(node.op_type == "If" for node in model.graph)
    x = np.float16([[[1, 2, 3]]] * 4)
    output = run(model, x=x, adapter_ids=np.array([2, 0, 1, 2]))["y"]
    weights = [W, W + PAIR.delta(), W + OTHER_PAIR.delta()]
    for row, number in enumerate([2, 0, 1, 2]):
        np.testing.assert_allclose(output[row], x[row].astype(np.float32) @ weights[number].T, rtol=2e-3)
