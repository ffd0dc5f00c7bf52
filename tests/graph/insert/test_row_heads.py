"""Layers that adapters bring whole, chosen for each row: what each row computes, and which labels are absent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.formats.contract import ABSENT_LABEL, Contract, read_contract
from lora_export.graph.find_sites import find_sites
from lora_export.graph.insert.adapter_rows import insert_rows
from lora_export.graph.insert.adapter_slots import head_values, insert_slots
from lora_export.lora import Adapter, LoraPair
from lora_export.provenance import ROW_ADAPTERS_KEY
from support.graphs import a_graph, an_adapter, planned, run
from support.insertion import W, X, row_ids
from support.small_graphs import CLASSIFIER, PAIR, SQUARE

A, HEAD, BIAS = np.float32([[1, 2], [3, 4]]), np.float32([[1, 0, 2], [1, 1, 0]]), np.float32([5, 6, 7])  # (in, out)
CHANGE = np.float32([[1, 2], [0, 0]])  # of SQUARE, (in, out)
GEMM_WITH_BIAS = """
g (float[N,3] x) => (float[N,2] y, float[N,2] z)
<float[2,3] m.weight = {1,2,3,4,5,6}, float[2] m.bias = {10,20}, float[2,2] k.weight = {1,0,0,1},
 float[3,2] s = {1,0,0,1,0,0}>
{ [m] y = Gemm <transB = 1> (x, m.weight, m.bias)
  [n] c = MatMul(x, s)
  [k] z = MatMul(c, k.weight) }
"""
SMALL = {"head.weight": np.float32([[1, -1], [2, 0]]), "head.bias": np.float32([1, 2])}
LARGE = {"head.weight": np.float32([[1, 1], [0, 1], [1, 0], [2, 2]]), "head.bias": np.float32([0, 0, 0, 9])}
ROWS = np.float32([[1, 2], [3, 4], [5, 6]])


def with_heads(model: ir.Model, heads: list[Mapping[str, NDArray[Any]]], *adapters: Adapter, batch: str = "N") -> None:
    sites, steps = planned(model, *adapters)
    insert_rows(model, sites, steps, batch=batch, heads=heads)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def one_and_two() -> tuple[Adapter, Adapter]:
    return an_adapter({"a": SQUARE}, name="one"), an_adapter({"a": SQUARE}, name="two")


def test_each_row_has_its_own_head_and_its_own_labels() -> None:
    model = a_graph(CLASSIFIER)
    with_heads(model, [SMALL, LARGE], *one_and_two())
    logits = run(model, x=ROWS, adapter_ids=row_ids(1, 0, 2))["logits"]
    changed = ROWS @ (A + CHANGE)
    assert np.array_equal(logits[0], [*(changed[0] @ SMALL["head.weight"].T + [1, 2]), *[ABSENT_LABEL] * 2])
    assert np.array_equal(logits[1], [*(ROWS[1] @ A @ HEAD + BIAS), ABSENT_LABEL])
    assert np.array_equal(logits[2], changed[2] @ LARGE["head.weight"].T + LARGE["head.bias"])
    record = json.loads(model.metadata_props[ROW_ADAPTERS_KEY])
    assert record == {"adapters": ["one", "two"], "labels": {"logits": [3, 2, 4]}, "absent_label": -10000.0}
    assert [(value.name, str(value.shape)) for value in model.graph.outputs] == [("logits", "[N,4]")]


def test_tokens_that_were_sorted_have_the_head_of_their_row() -> None:
    model = a_graph("""
        g (float[N,S,2] x, int64[K] order) => (float[K,3] logits)
        <float[2,2] a.weight = {1,2,3,4}, float[2,3] head.weight = {1,0,2,1,1,0}, float[3] head.bias = {5,6,7},
         int64[2] flat = {-1,2}>
        { [a] h = MatMul(x, a.weight)
          rows = Reshape(h, flat) sorted = Gather <axis = 0> (rows, order)
          [head] y = MatMul(sorted, head.weight)
          [plus] logits = Add(y, head.bias) }""")
    own = {"head.weight": np.float32([[1, -1], [2, 0], [0, 3]]), "head.bias": np.float32([1, 2, 3])}
    with_heads(model, [own], one_and_two()[0])
    order = np.array([3, 1, 0])
    logits = run(model, x=ROWS[None, :2].repeat(2, 0), order=order, adapter_ids=row_ids(0, 1))["logits"]
    assert np.array_equal(logits[0], ROWS[1] @ (A + CHANGE) @ own["head.weight"].T + own["head.bias"])
    assert np.array_equal(logits[1:], ROWS[[1, 0]] @ A @ HEAD + BIAS)


def test_an_adapter_without_a_head_uses_the_base_s() -> None:
    model = a_graph(CLASSIFIER)
    with_heads(model, [{}, SMALL], *one_and_two())
    logits = run(model, x=ROWS, adapter_ids=row_ids(1, 2, 0))["logits"]
    assert np.array_equal(logits[0], ROWS[0] @ (A + CHANGE) @ HEAD + BIAS)
    assert np.array_equal(logits[1], [*(ROWS[1] @ (A + CHANGE) @ SMALL["head.weight"].T + [1, 2]), ABSENT_LABEL])
    assert np.array_equal(logits[2], ROWS[2] @ A @ HEAD + BIAS)
    assert json.loads(model.metadata_props[ROW_ADAPTERS_KEY])["labels"] == {"logits": [3, 3, 2]}


def test_a_pair_beside_a_bias_of_the_same_adapter_is_refused() -> None:
    model = a_graph(CLASSIFIER)
    pair = LoraPair(a=np.float32([[1, 2]]), b=np.float32([[1], [0], [3]]), scale=1.0)
    adapters = an_adapter({"head": pair}, name="one"), an_adapter({"a": SQUARE}, name="two")
    message = r"not one tensor of a layer that has a pair, too:\s+one, head\.bias\s+Merge such an adapter"
    with pytest.raises(InputRefused, match=message):
        with_heads(model, [{"head.bias": np.float32([1, 1, 1])}, {}], *adapters)
    with_heads(model, [{}, {"head.bias": np.float32([1, 1, 1])}], *adapters)
    logits = run(model, x=ROWS, adapter_ids=row_ids(1, 2, 0))["logits"]
    assert np.array_equal(logits[0], ROWS[0] @ A @ (HEAD + pair.delta().T) + BIAS)
    assert np.array_equal(logits[1], ROWS[1] @ (A + CHANGE) @ HEAD + [1, 1, 1])


def test_one_adapter_has_a_pair_where_another_has_the_layer() -> None:
    model = a_graph(CLASSIFIER)
    pair = LoraPair(a=[[1, -1]], b=[[1], [2], [3]], scale=2.0)
    with_heads(model, [{}, SMALL], an_adapter({"head": pair}, name="one"), an_adapter({"a": SQUARE}, name="two"))
    logits = run(model, x=ROWS, adapter_ids=row_ids(1, 2, 0))["logits"]
    assert np.array_equal(logits[0], ROWS[0] @ A @ (HEAD + pair.delta().T) + BIAS)
    assert np.array_equal(logits[1], [*(ROWS[1] @ (A + CHANGE) @ SMALL["head.weight"].T + [1, 2]), ABSENT_LABEL])
    assert np.array_equal(logits[2], ROWS[2] @ A @ HEAD + BIAS)


def test_a_bias_in_the_product_s_own_node_is_chosen_too() -> None:
    model = a_graph(GEMM_WITH_BIAS)
    own = {"m.weight": np.float32([[1, 0, 1]]), "m.bias": np.float32([7])}
    with_heads(model, [{}, own], an_adapter({"m": PAIR}, name="one"), an_adapter({"k": SQUARE}, name="two"))
    x = np.concatenate([X, X[:1]])
    output = run(model, x=x, adapter_ids=row_ids(1, 2, 0))["y"]
    assert np.array_equal(output[0], x[0] @ (W + PAIR.delta()).T + [10, 20])
    assert np.array_equal(output[1], [x[1] @ [1, 0, 1] + 7, ABSENT_LABEL])
    assert np.array_equal(output[2], x[2] @ W.T + [10, 20])


def test_rows_with_id_zero_have_the_bits_of_the_base() -> None:
    rng = np.random.default_rng(0)
    model, base = a_graph(CLASSIFIER), a_graph(CLASSIFIER)
    with_heads(model, [SMALL, LARGE], *one_and_two())
    x = rng.standard_normal((5, 2)).astype(np.float32)
    logits = run(model, x=x, adapter_ids=row_ids(*[0] * 5))["logits"]
    assert logits[:, :3].tobytes() == run(base, x=x)["logits"].tobytes()


SEQUENCES = """
g (float[N,T,2] x) => (float[N,T,3] logits)
<float[2,2] a.weight = {1,2,3,4}, float[2,3] head.weight = {1,0,2,1,1,0}>
{ [a] h = MatMul(x, a.weight)
  [head] logits = MatMul(h, head.weight) }
"""
FLAT = """
g (float[N,4,2] x) => (float[M,3] logits)
<float[2,2] a.weight = {1,2,3,4}, float[2,3] head.weight = {1,0,2,1,1,0}, int64[2] sizes = {-1, 2}>
{ [a] h = MatMul(x, a.weight)
  [n] flat = Reshape(h, sizes)
  [head] logits = MatMul(flat, head.weight) }
"""
SECOND = """
g (float[T,N,2] x, float[N] other) => (float[T,N,3] logits, float[N] o)
<float[2,2] a.weight = {1,2,3,4}, float[2,3] head.weight = {1,0,2,1,1,0}>
{ [a] h = MatMul(x, a.weight)
  [head] logits = MatMul(h, head.weight)
  [n] o = Identity(other) }
"""


@pytest.mark.parametrize("body", [SEQUENCES, FLAT, SECOND], ids=["sequences", "flat", "batch second"])
def test_every_position_of_a_row_has_the_head_of_the_row(body: str) -> None:
    model = a_graph(body)
    heads = [{"head.weight": LARGE["head.weight"]}, {"head.weight": SMALL["head.weight"]}]
    with_heads(model, heads, *one_and_two())
    x = np.random.default_rng(1).integers(-4, 5, (3, 4, 2)).astype(np.float32)
    feeds = {"x": x.transpose(1, 0, 2).copy(), "other": np.zeros(3, np.float32)} if body is SECOND else {"x": x}
    logits = run(model, **feeds, adapter_ids=row_ids(2, 0, 1))["logits"]
    logits = logits.transpose(1, 0, 2) if body is SECOND else logits.reshape(3, 4, 4)
    assert np.array_equal(logits[0, :, :2], x[0] @ (A + CHANGE) @ SMALL["head.weight"].T)
    assert np.array_equal(logits[1, :, :3], x[1] @ A @ HEAD)
    assert np.array_equal(logits[2], x[2] @ (A + CHANGE) @ LARGE["head.weight"].T)
    assert (logits[0, :, 2:] == ABSENT_LABEL).all() and (logits[1, :, 3] == ABSENT_LABEL).all()


def test_heads_of_equal_labels_may_pass_any_operator() -> None:
    body = CLASSIFIER.replace("logits = Add(y, head.bias) }", "z = Add(y, head.bias)\n  [n] logits = Softmax(z) }")
    model = a_graph(body)
    equal = {"head.weight": LARGE["head.weight"][:3], "head.bias": np.float32([1, 2, 3])}
    with_heads(model, [equal, {}], *one_and_two())
    logits = run(model, x=ROWS, adapter_ids=row_ids(1, 2, 0))["logits"]
    exponents = np.exp(ROWS[0] @ (A + CHANGE) @ equal["head.weight"].T + equal["head.bias"])
    np.testing.assert_allclose(logits[0], exponents / exponents.sum(), rtol=1e-6)
    with pytest.raises(
        InputRefused, match=r"head: the heads have 2, 3 labels, which pass Softmax before they are an output"
    ):
        with_heads(a_graph(body), [SMALL, {}], *one_and_two())


NORM = """
g (float[N,2] x) => (float[N,2] y)
<float[2,2] a.weight = {1,2,3,4}, float[2] norm.weight = {1,2}, float[2,2] b.weight = {1,0,0,1}>
{ [a] h = MatMul(x, a.weight)
  [norm] i = Mul(h, norm.weight)
  [b] y = MatMul(i, b.weight) }
"""


def test_what_is_no_linear_layer_is_refused_by_name() -> None:
    heads: list[Mapping[str, NDArray[Any]]] = [{"norm.weight": np.float32([3, 4])}, {"b.bias": np.float32([1, 1])}]
    with pytest.raises(InputRefused) as refusal:
        with_heads(a_graph(NORM), heads, *one_and_two())
    assert str(refusal.value).splitlines()[1:3] == [
        "  norm.weight: read by Mul",
        "  b.bias: the graph's layer has no bias of this name",
    ]


SCALED_GEMM = """
g (float[N,2] x) => (float[N,3] y) <float[2,2] a.weight = {1,2,3,4}, float[2,3] b.weight = {1,0,2,1,1,0},
 float[3] b.bias = {5,6,7}>
{ [a] h = MatMul(x, a.weight)
  [b] y = OPERATOR (h, b.weight, b.bias) }
"""


@pytest.mark.parametrize(
    ("operator", "reason"),
    [
        ("Gemm <alpha = 2.0>", "its product is multiplied by a number"),
        ("Gemm <beta = 0.5>", "its bias is multiplied by a number"),
    ],
)
@pytest.mark.parametrize("mode", ["rows", "slots"])
def test_a_head_whose_gemm_multiplies_is_refused_by_name(operator: str, reason: str, mode: str) -> None:
    body = SCALED_GEMM.replace("OPERATOR", operator)
    head = {"b.weight": HEAD.T + 1, "b.bias": BIAS}
    with pytest.raises(InputRefused, match=rf"\n  b\.weight: {reason}"):
        with_heads(a_graph(body), [head], one_and_two()[0]) if mode == "rows" else in_slots(body, head)


def test_an_overflow_in_half_precision_is_refused() -> None:
    model = a_graph(SEQUENCES.replace("float[", "float16["))
    for name, value in (("a.weight", A), ("head.weight", HEAD)):
        model.graph.initializers[name].const_value = ir.Tensor(value.astype(np.float16), name=name)
    with pytest.raises(InputRefused, match=r"head: 1 value of weight would not be finite: the largest float16"):
        with_heads(model, [{"head.weight": np.float32([[7e4, 1]])}, {}], *one_and_two())
    model = a_graph(SEQUENCES.replace("float[", "float16["))
    for name, value in (("a.weight", A), ("head.weight", HEAD)):
        model.graph.initializers[name].const_value = ir.Tensor(value.astype(np.float16), name=name)
    with_heads(model, [{"head.weight": SMALL["head.weight"]}, {}], *one_and_two())
    logits = run(model, x=ROWS[:, None].astype(np.float16), adapter_ids=row_ids(1, 0, 2))["logits"]
    assert logits.dtype == np.float16 and logits[0, 0, 2] == ABSENT_LABEL and logits[1, 0].min() > 0


# --- In slots: the layers are inputs, and later adapters bring their own ---


def in_slots(body: str, head: Mapping[str, NDArray[Any]]) -> tuple[ir.Model, Contract]:
    """A graph of two slots that was made with an adapter that has this head."""
    model = a_graph(body)
    sites, steps = planned(model, one_and_two()[0])
    contract = insert_slots(model, sites, ["a.weight"], steps, slots=2, max_rank=1, heads=[head], batch="N")
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert read_contract(model.metadata_props, "") == contract
    return model, contract


@pytest.mark.parametrize("bias", ["its own", "the base's"])
def test_a_slot_has_the_head_of_its_adapter(bias: str) -> None:
    model, contract = in_slots(CLASSIFIER, LARGE)
    own = HEAD.T + 1
    later = {"head.weight": own} | ({"head.bias": BIAS * 2} if bias == "its own" else {})
    stacks, sites = contract.stacks(), find_sites(model)
    for slot, head in enumerate((SMALL, later), 1):
        contract.fill(stacks, slot, head_values(contract, sites, "x", head))
    logits = run(model, x=ROWS, adapter_ids=row_ids(2, 0, 1), **stacks)["logits"]
    expected = ROWS[0] @ A @ own.T + (BIAS * 2 if bias == "its own" else BIAS)
    assert np.array_equal(logits[0], [*expected, ABSENT_LABEL])
    assert np.array_equal(logits[1], [*(ROWS[1] @ A @ HEAD + BIAS), ABSENT_LABEL])
    assert np.array_equal(logits[2], [*(ROWS[2] @ A @ SMALL["head.weight"].T + [1, 2]), *[ABSENT_LABEL] * 2])
    values = [head_values(contract, sites, "x", head) for head in (SMALL, later, {})]
    assert contract.labels(values) == {"logits": [3, 2, 3, 3]}


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (
            {"head.weight": np.zeros((5, 2)), "head.bias": np.zeros(5)},
            "x, head.weight: 5 labels, the graph takes at most 4",
        ),
        ({"other.weight": np.zeros((2, 2))}, "x, other.weight: the graph takes no such layer"),
        ({"head.weight": np.full((2, 2), 1e39), "head.bias": np.zeros(2)}, "would not be finite"),
    ],
)
def test_a_head_that_does_not_fit_a_slot_is_refused(head: Mapping[str, NDArray[Any]], message: str) -> None:
    model, contract = in_slots(CLASSIFIER, LARGE)
    with pytest.raises(InputRefused, match=message):
        head_values(contract, find_sites(model), "x", head)


def test_a_head_behind_another_operator_has_all_labels() -> None:
    body = CLASSIFIER.replace("logits = Add(y, head.bias)", "z = Add(y, head.bias) logits = Softmax(z)")
    equal = {"head.weight": HEAD.T + 1, "head.bias": BIAS}
    model, contract = in_slots(body, equal)
    assert head_values(contract, find_sites(model), "x", equal)
    with pytest.raises(InputRefused, match=r"x, head\.weight: 2 labels, the graph takes 3"):
        head_values(contract, find_sites(model), "x", SMALL)
