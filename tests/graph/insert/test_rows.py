"""Adapters chosen row by row: what each row is, where the batch lies, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.formats.onnx_adapter import ROW_ADAPTERS_KEY
from lora_export.graph.insert.adapter_rows import insert_rows
from lora_export.lora import Adapter, LoraPair
from support.exported_models import EVERY_MODEL, eager, exported, inputs, with_changes
from support.graphs import a_graph, an_adapter, contents, linear_specs, planned, run, stored
from support.small_graphs import GEMM, PAIR, SHARED, SQUARE

X = np.float32([[1, 1, 2], [0, 3, 1]])
W = np.float32([[1, 2, 3], [4, 5, 6]])  # of m, (out, in)
OTHER = LoraPair(a=[[0, 1, 0], [1, 0, 0]], b=[[1, 0], [0, 1]], scale=3.0)  # ΔW x = 3 [x1, x0]


def by_row(model: ir.Model, *adapters: Adapter, batch: str = "N", **options: Any) -> None:
    found, steps = planned(model, *adapters, **options)
    insert_rows(model, found, steps, batch=batch)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def ids(*numbers: int) -> NDArray[np.int64]:
    return np.array(numbers, np.int64)


# --- by hand ---


def test_each_row_has_its_own_adapter_and_0_is_the_base() -> None:
    model = a_graph(GEMM)
    by_row(model, an_adapter({"m": PAIR}, name="one"), an_adapter({"m": OTHER}, name="two"), strengths=[1.0, -1.0])
    # x W^T = [9, 21] for both rows; PAIR adds [-2, -4] to both, OTHER takes 3 [x1, x0] away
    expected = {0: [[9, 21]] * 2, 1: [[7, 17]] * 2, 2: [[9 - 3, 21 - 3], [9 - 9, 21]]}
    for first in range(3):
        for second in range(3):
            answer = run(model, x=X, adapter_ids=ids(first, second))["y"]
            assert np.array_equal(answer, [expected[first][0], expected[second][1]]), (first, second)


def test_ranks_are_filled_with_zeros_and_the_names_stand_in_the_metadata() -> None:
    model = a_graph(GEMM)
    before = contents(model)
    by_row(model, an_adapter({"m": PAIR}, name="one"), an_adapter({"m": OTHER}, name="two"))
    assert stored(model, "m.lora_A.weight").tolist() == [
        [[0, 0], [0, 0], [0, 0]],
        [[1, 0], [0, 0], [-1, 0]],
        [[0, 1], [1, 0], [0, 0]],
    ]
    assert stored(model, "m.lora_B.weight").tolist() == [[[0, 0], [0, 0]], [[2, 4], [0, 0]], [[3, 0], [0, 3]]]
    assert before.items() < contents(model).items()
    assert json.loads(model.metadata_props[ROW_ADAPTERS_KEY]) == {"adapters": ["one", "two"]}
    assert [(value.name, str(value.shape)) for value in model.graph.inputs] == [("x", "[N,3]"), ("adapter_ids", "[N]")]


SEQUENCES = """
g (float[N,T,3] x) => (float[N,T,2] y)
<float[3,2] m.weight = {1,4,2,5,3,6}>
{ [n] y = MatMul(x, m.weight) }
"""


@pytest.mark.parametrize("rows", [1, 2, 5, 16])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_copies_for_each_row_and_all_adapters_products_are_the_same_and_the_cheaper_is_taken(
    rows: int, tokens: int
) -> None:
    model = a_graph(SEQUENCES)
    by_row(
        model, *(an_adapter({"m": pair}, name=name) for name, pair in {"one": PAIR, "two": OTHER, "3": PAIR}.items())
    )
    (branch,) = (node for node in model.graph if node.op_type == "If")
    (chosen,) = branch.inputs
    assert chosen is not None
    model.graph.outputs.append(chosen)
    which = np.arange(rows) % 4
    x = np.random.default_rng(0).integers(-5, 6, (rows, tokens, 3)).astype(np.float32)
    answer = run(model, x=x, adapter_ids=which)
    weights = [W, W + PAIR.delta(), W + OTHER.delta(), W + PAIR.delta()]
    for row, number in enumerate(which):
        assert np.array_equal(answer["y"][row], x[row] @ weights[number].T)
    assert answer[chosen.name or ""] == (3 * (rows * tokens + 16) <= 32 * rows)


@pytest.mark.parametrize("rows", [1, 8])
def test_what_is_not_finite_by_another_rows_adapter_is_none_of_a_rows(rows: int) -> None:
    model = a_graph(SEQUENCES)
    huge = LoraPair(a=[[3e38, 3e38, 3e38]], b=[[1e-38], [1e-38]], scale=1.0)
    by_row(model, an_adapter({"m": huge}, name="huge"), an_adapter({"m": PAIR}, name="one"))
    x = np.full((rows, 1, 3), 2, np.float32)  # by the first adapter's A it is more than a float can be
    x[1:, 0, 0] = np.inf
    answer = run(model, x=x, adapter_ids=np.full(rows, 2))["y"]
    assert np.array_equal(answer[0], x[0] @ (W + PAIR.delta()).T)
    assert np.array_equal(run(model, x=x[:1].repeat(rows, 0), adapter_ids=0 * np.full(rows, 2))["y"][0], x[0] @ W.T)


def test_of_many_adapters_each_row_has_copies_of_its_own_alone() -> None:
    model = a_graph(SEQUENCES)
    pairs = [LoraPair(a=PAIR.a, b=PAIR.b, scale=float(number)) for number in range(1, 33)]
    by_row(model, *(an_adapter({"m": pair}, name=str(number)) for number, pair in enumerate(pairs)))
    assert not any(node.op_type == "If" for node in model.graph)
    x = np.float32([[[1, 2, 3]]] * 40)
    answer = run(model, x=x, adapter_ids=np.arange(40) % 33)["y"]
    for row in range(40):
        change = pairs[row % 33 - 1].delta() if row % 33 else 0
        assert np.array_equal(answer[row], x[row] @ (W + change).T)


def test_in_half_precision_each_row_has_copies_of_its_own_alone() -> None:
    model = a_graph(SEQUENCES.replace("float[", "float16["))
    model.graph.initializers["m.weight"].const_value = ir.Tensor(W.T.astype(np.float16).copy(), name="m.weight")
    by_row(model, an_adapter({"m": PAIR}, name="one"), an_adapter({"m": OTHER}, name="two"))
    assert not any(node.op_type == "If" for node in model.graph)
    x = np.float16([[[1, 2, 3]]] * 4)
    answer = run(model, x=x, adapter_ids=np.array([2, 0, 1, 2]))["y"]
    weights = [W, W + PAIR.delta(), W + OTHER.delta()]
    for row, number in enumerate([2, 0, 1, 2]):
        np.testing.assert_allclose(answer[row], x[row].astype(np.float32) @ weights[number].T, rtol=2e-3)


TWO_LAYERS = """
g (float[N,2] x) => (float[N,2] y)
<float[2,2] a.weight = {1,2,3,4}, float[2,2] b.weight = {1,0,1,1}>
{ [a] h = MatMul(x, a.weight)
  [b] y = MatMul(h, b.weight) }
"""


def test_adapters_of_different_layers_meet_in_one_batch() -> None:
    # The graph's text tells no shape between the layers: it is inferred.
    model = a_graph(TWO_LAYERS)
    by_row(model, an_adapter({"a": SQUARE}, name="one"), an_adapter({"b": SQUARE}, name="two"))
    a, b, change = np.float32([[1, 2], [3, 4]]), np.float32([[1, 0], [1, 1]]), np.float32([[1, 2], [0, 0]])
    x = np.float32([[1, 2], [3, 4], [5, 6]])
    expected = [x[0] @ (a + change) @ b, x[1] @ a @ (b + change), x[2] @ a @ b]
    assert np.array_equal(run(model, x=x, adapter_ids=ids(1, 2, 0))["y"], expected)


def test_a_module_that_is_called_twice_has_its_adapter_at_both_places() -> None:
    model = a_graph(SHARED, modules={"first": "a.fc", "second": "a.fc"})
    by_row(model, an_adapter({"a.fc": SQUARE}))
    w, x = np.float32([[1, 2], [3, 4]]), np.float32([[1, 2], [1, 2]])
    changed = w + np.float32([[1, 2], [0, 0]])
    assert np.array_equal(run(model, x=x, adapter_ids=ids(1, 0))["y"], [x[0] @ changed @ changed, x[1] @ w @ w])


@pytest.mark.parametrize("sizes", ["N,S,3", "S,N,3", "N,S,4,3", "S,N,4,3", "S,4,N,3"])
def test_the_batch_is_found_wherever_it_lies(sizes: str) -> None:
    model = a_graph(f"""
        g (float[{sizes}] x, float[N] lead) => (float[{sizes[:-1]}2] y)
        <float[3,2] m.weight = {{1,4,2,5,3,6}}>
        {{ [n] y = MatMul(x, m.weight) }}""")
    by_row(model, an_adapter({"m": PAIR}, name="one"), an_adapter({"m": OTHER}, name="two"))
    axis = sizes.split(",").index("N")
    x = whole_numbers(sizes)
    answer = run(model, x=x, lead=np.zeros(3, np.float32), adapter_ids=ids(2, 0, 1))["y"]
    rows, answers = np.moveaxis(x, axis, 0), np.moveaxis(answer, axis, 0)
    for row, change in enumerate([OTHER.delta(), 0, PAIR.delta()]):
        assert np.array_equal(answers[row], rows[row] @ (W + change).T)


def whole_numbers(sizes: str) -> NDArray[np.float32]:
    """Small ones, in an array with these dimensions: a batch N of 3, S of 5, T of 2."""
    shape = [{"N": 3, "S": 5, "T": 2}.get(size) or int(size) for size in sizes.split(",")]
    return np.random.default_rng(0).integers(-3, 4, shape).astype(np.float32)


@pytest.mark.parametrize("before", ["N,S,3", "S,N,3", "2,N,S,3", "S,N,2,3", "N,S,T,3", "N,S,1,3", "S,N,3,1"])
def test_rows_that_were_flattened_are_told_apart_again(before: str) -> None:
    model = a_graph(f"""
        g (float[{before}] t, float[N] lead) => (float[M,2] y)
        <float[3,2] m.weight = {{1,4,2,5,3,6}}, int64[2] flat = {{-1,3}}>
        {{ r = Reshape(t, flat)
           [n] y = MatMul(r, m.weight) }}""")
    by_row(model, an_adapter({"m": PAIR}, name="one"), an_adapter({"m": OTHER}, name="two"))
    x = whole_numbers(before)
    numbers = np.arange(3).reshape([-1 if size == "N" else 1 for size in before.split(",")])
    origin = np.broadcast_to(numbers, x.shape).reshape(-1, 3)[:, 0]  # of each flat row: its place in the batch
    change = [OTHER.delta(), 0, PAIR.delta()]
    expected = [row @ (W + change[of]).T for row, of in zip(x.reshape(-1, 3), origin, strict=True)]
    answer = run(model, t=x, lead=np.zeros(3, np.float32), adapter_ids=ids(2, 0, 1))["y"]
    assert np.array_equal(answer, np.float32(expected))


@pytest.mark.parametrize("wrong", [[3, 0], [-1, 0], [0, -3], [0], [], [0, 0, 0], [1]])
def test_an_id_that_is_none_and_a_count_that_is_not_the_batchs_end_the_run(wrong: list[int]) -> None:
    model = a_graph(GEMM)
    by_row(model, an_adapter({"m": PAIR}, name="one"), an_adapter({"m": OTHER}, name="two"))
    with pytest.raises(Exception, match="ONNXRuntimeError"):
        run(model, x=X, adapter_ids=ids(*wrong))
    assert np.array_equal(run(model, x=X[:1], adapter_ids=ids(0))["y"], [[9, 21]])


# --- refusals ---


@pytest.mark.parametrize(
    ("sizes", "body", "told"),
    [
        (
            "K,3",
            "y = MatMul(t, m.weight)",
            r"m.weight \(MatMul `n`\): its input has the shape \[K,3\], in which no single dimension",
        ),
        ("N,N,3", "y = MatMul(t, m.weight)", r"its input has the shape \[N,N,3\]"),
        ("3,N", "y = Gemm <transA = 1> (t, m.weight)", "transposes or scales"),
        ("N,3", "y = Gemm <alpha = 2.0> (t, m.weight)", "transposes or scales"),
        ("S,N,T,3", "y = MatMul(r, m.weight)", "its input has the shape"),  # r is t, its rows flattened
        ("S,K,3", "y = MatMul(r, m.weight)", "its input has the shape"),
        ("N,S,N,3", "y = MatMul(r, m.weight)", "its input has the shape"),
    ],
)
def test_a_layer_whose_batch_is_not_certain_is_refused_by_name(sizes: str, body: str, told: str) -> None:
    model = a_graph(f"""
        g (float[{sizes}] t, float[N] lead) => (y)
        <float[3,2] m.weight = {{1,4,2,5,3,6}}, int64[2] flat = {{-1,3}}>
        {{ r = Reshape(t, flat)
           [n] {body} }}""")
    with pytest.raises(InputRefused, match=told):
        by_row(model, an_adapter({"m": PAIR}))


def test_of_several_symbols_the_batch_is_the_one_that_enters_every_layer() -> None:
    two = an_adapter({"a": SQUARE, "b": SQUARE})
    by_row(model := a_graph(TWO_LAYERS.replace("[N,2] x", "[N,2] x, float[M,2] z")), two, batch="batch")
    x = np.float32([[1, 2], [3, 4]])
    expected = x @ np.float32([[2, 4], [3, 4]]) @ np.float32([[2, 2], [1, 1]])
    assert np.array_equal(run(model, x=x, z=x[:1], adapter_ids=ids(1, 1))["y"], expected)
    apart = TWO_LAYERS.replace("[N,2] x", "[N,2] x, float[M,2] z").replace("MatMul(h, b", "MatMul(z, b")
    with pytest.raises(InputRefused, match=r"the batch, `batch`, .*: x \[N,2\], z \[M,2\]"):
        by_row(a_graph(apart), two, batch="batch")


def test_a_graph_without_a_batch_is_refused() -> None:
    with pytest.raises(InputRefused, match=r"no input of the graph has the batch, `N`, .*: x \[2,3\]"):
        by_row(a_graph(GEMM.replace("float[N,3]", "float[2,3]")), an_adapter({"m": PAIR}))


def test_all_such_layers_are_told_at_once() -> None:
    model = a_graph(TWO_LAYERS.replace("[N,2] x", "[K,2] x, float[N] lead").replace("[N,2] y", "[K,2] y"))
    with pytest.raises(InputRefused) as refusal:
        by_row(model, an_adapter({"a": SQUARE, "b": SQUARE}))
    assert str(refusal.value).startswith("2 layers cannot have an adapter for each row of the batch, `N`:\n  a.weight")
    assert "\n  b.weight (MatMul `b`): its input has the shape [K,2]" in str(refusal.value)


def harm_opset(model: ir.Model) -> None:
    model.opset_imports[""] = 13


def harm_name(model: ir.Model) -> None:
    model.graph.inputs[0].name = "adapter_ids"


@pytest.mark.parametrize(
    ("harm", "told"), [(harm_opset, "opset 13, and --lora rows needs 15"), (harm_name, "adapter_ids already")]
)
def test_a_graph_that_cannot_have_the_input_is_refused(harm: Callable[[ir.Model], None], told: str) -> None:
    model = a_graph(GEMM)
    harm(model)
    with pytest.raises(InputRefused, match=told):
        by_row(model, an_adapter({"m": PAIR}))


def test_a_factor_that_overflows_and_a_second_weaving_are_refused() -> None:
    model = a_graph(GEMM)
    model.graph.initializers["m.weight"].const_value = ir.Tensor(np.ones((2, 3), np.float16), name="m.weight")
    with pytest.raises(InputRefused, match=r"m.weight: 1 values of lora_B .* float16 is 65504"):
        by_row(model, an_adapter({"m": LoraPair(a=PAIR.a, b=[[1], [2]], scale=4e4)}))
    model = a_graph(GEMM)
    by_row(model, an_adapter({"m": PAIR}))
    with pytest.raises(InputRefused, match="adapter_ids already"):
        by_row(model, an_adapter({"m": PAIR}))


# --- real exports, against PyTorch ---


def everywhere(model: ir.Model, name: str, *, rank: int, every: int) -> tuple[Adapter, dict[str, NDArray[Any]]]:
    """A pair for every so many of the linear layers, and the change of each weight."""
    rng = np.random.default_rng(rank)
    pairs, changes = {}, {}
    for spec in linear_specs(model)[::every]:
        out, into = spec.matrix
        pair = LoraPair(a=rng.standard_normal((rank, into)), b=rng.standard_normal((out, rank)), scale=0.3)
        pairs[re.sub(r"\.(in_proj_)?weight$", "", spec.name)] = pair
        changes[spec.name] = 0.3 * (pair.b.astype(np.float64) @ pair.a.astype(np.float64))
    return an_adapter(pairs, name=name), changes


@EVERY_MODEL
def test_an_exports_mixed_batch_is_row_by_row_what_pytorch_computes(name: str) -> None:
    made = exported(name)
    base = made.graph.clone()
    (one, first), (two, second) = everywhere(base, "one", rank=3, every=1), everywhere(base, "two", rank=5, every=2)
    by_row(made.graph, one, two, batch="batch")
    modules = [made.module, with_changes(made.module, first), with_changes(made.module, second)]
    for batch, length in [(1, 5), (4, 12), (3, 1)]:
        feeds = inputs(name, batch, length, seed=2)
        arrays = {key: value.numpy() for key, value in feeds.items()}
        chosen = (np.arange(batch) + 1) % 3
        answer = run(made.graph, **arrays, adapter_ids=chosen)
        alone, before = [eager(module, feeds) for module in modules], run(base, **arrays)
        for key, value in answer.items():
            expected = np.stack([alone[adapter][key][row] for row, adapter in enumerate(chosen)])
            np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)
            assert np.abs(expected - before[key]).max() > 1e-2  # the adapters are seen
        off = run(made.graph, **arrays, adapter_ids=ids(*[0] * batch))
        assert all(off[key].tobytes() == value.tobytes() for key, value in before.items())
