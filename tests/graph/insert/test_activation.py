"""Adapters that act from their invocation tokens on, in a graph. NumPy computes what is expected."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.lora import Adapter, LoraPair
from support.graphs import a_graph, an_adapter, run
from support.insertion import with_nodes

PAIR = LoraPair(a=[[1, 0, -1], [2, 1, 0]], b=[[1, 3], [2, -1]], scale=2.0)
TABLE = "float[9,3] words = {1,2,3, 4,5,6, 7,8,9, 1,0,1, 2,1,0, 0,1,1, 3,3,1, 1,4,2, 2,2,5}"
WEIGHT = "float[3,2] m.weight = {1,4,2,5,3,6}"
TEXTS = f"""
g (int64[batch,tokens] input_ids) => (float[batch,tokens,2] y)
<{TABLE}, {WEIGHT}>
{{ x = Gather(words, input_ids)
  [m] y = MatMul(x, m.weight) }}
"""
FLAT = f"""
g (int32[batch,tokens] input_ids) => (float[rows,2] y)
<{TABLE}, {WEIGHT}, int64[2] shape = {{-1,3}}>
{{ [w] x = Gather(words, input_ids)
  [r] rows = Reshape(x, shape)
  [m] y = Gemm <alpha = 0.5> (rows, m.weight) }}
"""
IDS = np.array([[1, 7, 8, 2, 0], [7, 8, 7, 8, 7], [0, 1, 2, 7, 8], [8, 7, 0, 0, 7]])


def activated(*invocation: int, name: str = "default", pair: LoraPair = PAIR) -> Adapter:
    return an_adapter({"m": pair}, name=name, invocation_tokens=invocation)


def expected(ids: NDArray[np.int64], *adapters: Adapter) -> NDArray[np.float64]:
    """(batch, tokens, out): x Wᵀ, and x ΔWᵀ of each adapter from the last occurrence of its tokens on."""
    words = np.array(
        [[1, 2, 3], [4, 5, 6], [7, 8, 9], [1, 0, 1], [2, 1, 0], [0, 1, 1], [3, 3, 1], [1, 4, 2], [2, 2, 5]]
    )
    x = words[ids].astype(np.float64)
    total = x @ np.array([[1, 4], [2, 5], [3, 6]], np.float64)
    for adapter in adapters:
        wanted = list(adapter.invocation_tokens)
        for row, text in enumerate(ids.tolist()):
            starts = [at for at in range(len(text)) if text[at : at + len(wanted)] == wanted]
            if starts:
                total[row, starts[-1] :] += x[row, starts[-1] :] @ adapter.pairs["m"].delta().T.astype(np.float64)
    return total


@pytest.mark.parametrize("invocation", [(7,), (7, 8), (8, 7), (7, 8, 7), (1, 2, 3), (1, 2, 3, 4, 5, 6)])
def test_a_pair_acts_from_the_last_occurrence_on(invocation: tuple[int, ...]) -> None:
    model, adapter = a_graph(TEXTS), activated(*invocation)
    with_nodes(model, adapter)
    assert np.array_equal(run(model, input_ids=IDS)["y"], expected(IDS, adapter))
    one_token = np.array([[7], [0]])
    assert np.array_equal(run(model, input_ids=one_token)["y"], expected(one_token, adapter))


def test_flattened_rows_are_the_tokens_of_all_texts() -> None:
    model, adapter = a_graph(FLAT), activated(7, 8)
    _set_shape(model, "x", ["batch", "tokens", 3])
    with_nodes(model, adapter)
    found = run(model, input_ids=IDS.astype(np.int32))["y"]
    assert np.array_equal(found, 0.5 * expected(IDS, adapter).reshape(-1, 2))


@pytest.mark.parametrize("first", ["m", "n"])
def test_layers_of_both_dtypes_have_gates_of_their_own(first: str) -> None:
    layers = {"m": "[m] y = MatMul(x, m.weight)", "n": "h = Cast <to = 10> (x) [n] z = MatMul(h, n.weight)"}
    bits = ",".join(map(str, np.float16([1, 4, 2, 5, 3, 6]).view(np.uint16)))
    body = " ".join(layers[name] for name in (first, *(layers.keys() - {first})))
    model = a_graph(f"""
        g (int64[batch,tokens] input_ids) => (float[batch,tokens,2] y, float16[batch,tokens,2] z)
        <{TABLE}, {WEIGHT}, float16[3,2] n.weight = {{{bits}}}>
        {{ x = Gather(words, input_ids) {body} }}""")
    with_nodes(model, an_adapter({"m": PAIR, "n": PAIR}, invocation_tokens=(7, 8)))
    found, wanted = run(model, input_ids=IDS), expected(IDS, activated(7, 8))
    assert np.array_equal(found["y"], wanted) and np.array_equal(found["z"], wanted)
    assert found["z"].dtype == np.float16


def test_each_adapter_has_its_own_tokens_and_a_plain_one_all() -> None:
    other = LoraPair(a=[[0, 1, 1]], b=[[1], [-2]], scale=1.0)
    adapters = [activated(7, 8, name="a"), activated(0, name="b", pair=other)]
    model, plain = a_graph(TEXTS), an_adapter({"m": other}, name="c")
    with_nodes(model, *adapters, plain)
    everywhere = np.einsum("bti,oi->bto", _looked_up(), other.delta())
    assert np.array_equal(run(model, input_ids=IDS)["y"], expected(IDS, *adapters) + everywhere)


def test_strength_is_an_input() -> None:
    model, adapter = a_graph(TEXTS), activated(7, 8)
    with_nodes(model, adapter, strength_input=True)
    base = expected(IDS)
    changed = run(model, input_ids=IDS, adapter_strengths=np.float32([-0.5]))["y"]
    assert np.array_equal(changed, base - 0.5 * (expected(IDS, adapter) - base))


def test_tokens_are_found_once_for_all_layers() -> None:
    model = a_graph(TEXTS.replace("{ x", "{ z = Identity(input_ids) x"))
    with_nodes(model, activated(7, 8))
    operators = [node.op_type for node in model.graph]
    assert [operators.count(name) for name in ("Conv", "CumSum", "Mul")] == [1, 1, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([("input_ids", "ids")], "finds its tokens in an input `input_ids` of (batch, tokens). The graph takes ids"),
        ([("] input_ids)", "] input_ids, float[batch,2] past.0)")], "takes a cache of earlier tokens (`past.0`)"),
        ([("batch,tokens] input_ids", "tokens] input_ids")], "an input `input_ids` of (batch, tokens)"),
        (
            [("x = Gather(words, input_ids)", "h = Gather(words, input_ids) x = Transpose<perm=[1,0,2]>(h)")],
            "acts beside linear layers on (batch, tokens, features). The input of MatMul is",
        ),
    ],
)
def test_graphs_without_whole_texts_are_refused(changes: list[tuple[str, str]], message: str) -> None:
    body = TEXTS
    for old, new in changes:
        assert old in body
        body = body.replace(old, new)
    with pytest.raises(InputRefused) as refused:
        with_nodes(a_graph(body), activated(7, 8))
    assert message in str(refused.value)


def test_tokens_whose_number_is_unknown_are_refused() -> None:
    model = a_graph(FLAT)
    _set_shape(model, "x", [None, None, 3])
    model.graph.inputs[0].shape = ir.Shape([None, None])
    with pytest.raises(InputRefused, match="The input of Gemm is"):
        with_nodes(model, activated(7, 8))


def _looked_up() -> NDArray[np.float32]:
    return run(a_graph(TEXTS.replace("[m] y = MatMul(x, m.weight)", "y = Identity(x)")), input_ids=IDS)["y"]


def _set_shape(model: ir.Model, name: str, sizes: list[str | int | None]) -> None:
    for node in model.graph:
        for output in node.outputs:
            if output.name == name:
                output.shape, output.type = ir.Shape(sizes), ir.TensorType(ir.DataType.FLOAT)
