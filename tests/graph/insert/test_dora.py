"""DoRA beside the weights of a graph: m / ‖W + sBA‖ * x (W + sBA)^T + bias."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from lora_export import plan
from lora_export.errors import InputRefused
from lora_export.graph.find_sites import Sites, find_sites
from lora_export.graph.insert.adapter_nodes import insert_nodes
from lora_export.graph.insert.adapter_rows import insert_rows
from lora_export.graph.insert.branches import dora_factors_by_weight
from lora_export.graph.values import new_initializer
from lora_export.lora import LoraPair
from support.graphs import a_graph, an_adapter, contents, quantised, run, stored
from support.insertion import EMBEDDING, EMBEDDING_PAIR, IDS, TABLE, W, X, dora_weight, with_nodes
from support.small_graphs import GEMM, LINEAR, PAIR, SHARED, SQUARE

DORA = dataclasses.replace(PAIR, magnitude=[5.0, 0.5])


def test_dora_multiplies_product_and_branch() -> None:
    model = a_graph(LINEAR)
    before = contents(model)
    with_nodes(model, an_adapter({"m": DORA}))
    after = contents(model)
    names = {f"m.{part}.weight" for part in ("lora_A", "lora_B", "lora_magnitude_vector")}
    assert before.items() < after.items()
    assert after.keys() - before.keys() == names
    assert [node.name for node in model.graph][2:6] == [
        "/m/lora_B/MatMul", "/m/lora_B/Add", "/m/lora_magnitude_vector/Mul", "b",
    ]  # fmt: skip
    # W + sBA = [[3, 2, 1], [8, 5, 2]]
    factor = [5 / np.sqrt(9 + 4 + 1), 0.5 / np.sqrt(64 + 25 + 4)]
    np.testing.assert_allclose(stored(model, "m.lora_magnitude_vector.weight"), factor, rtol=1e-7)
    np.testing.assert_allclose(run(model, x=X)["y"], ([[7, 17], [7, 17]] * np.array(factor) + [10, 20]) * [7, 8], 1e-6)


@pytest.mark.parametrize(
    ("gemm", "bias", "alpha", "beta"),
    [
        ("<transB = 1> (x, m.weight, row)", [10, 20], 1, 1),
        ("<transB = 1> (x, m.weight)", [0, 0], 1, 1),
        ("<transB = 1, alpha = 0.5, beta = 3.0> (x, m.weight, row)", [10, 20], 0.5, 3),
        ("<transB = 1, beta = 0.0> (x, m.weight, row)", [10, 20], 1, 0),
        ("<transA = 1, transB = 1, alpha = 2.0> (t, m.weight, column)", [[7], [8]], 2, 1),
        ("<transB = 1> (x, m.weight, k)", [11, 21], 1, 1),
    ],
)
def test_bias_of_gemm_is_added_after_dora(gemm: str, bias: Any, alpha: float, beta: float) -> None:
    model = a_graph(f"""
        g (float[2,3] x) => (float[2,2] y)
        <float[2,3] m.weight = {{1,2,3,4,5,6}}, float[2] row = {{10,20}}, float[2,1] column = {{7,8}},
         float one = {{1}}>
        {{ t = Transpose(x)
           k = Add(row, one)
           [n] y = Gemm {gemm} }}""")
    before = contents(model)
    with_nodes(model, an_adapter({"m": DORA}))
    assert before.items() < contents(model).items()
    expected = alpha * X @ dora_weight(W, DORA).T + beta * np.array(bias)
    np.testing.assert_allclose(run(model, x=X)["y"], expected, rtol=1e-6)


def test_dora_norm_includes_strength_of_adapter() -> None:
    model = a_graph(GEMM)
    with_nodes(model, an_adapter({"m": DORA}), strengths=[-1.5])
    expected = X @ dora_weight(W, dataclasses.replace(DORA, scale=DORA.scale * -1.5)).T
    np.testing.assert_allclose(run(model, x=X)["y"], expected, rtol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("as_pairs", [False, True])
def test_dora_norm_is_that_of_dequantised_weight(as_pairs: bool, bias: bool) -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(6, 40)).astype(np.float32)
    model = a_graph(f"""
        g (float[N,40] x) => (float[N,6] y) <float[40,6] m.weight = {{{",".join(map(str, weight.T.flat))}}}>
        {{ [n] y = MatMul(x, m.weight) }}""")
    model = quantised(model, as_pairs=as_pairs)
    shift = np.arange(6, dtype=np.float32) if bias and not as_pairs else np.zeros(6, np.float32)
    if shift.any():
        model.graph[0].resize_inputs(6)
        model.graph[0].replace_input_with(5, new_initializer(model, "m.bias", ir.Tensor(shift)))
    (site,) = find_sites(model).by_name["m.weight"]
    assert np.linalg.norm(site.matrix - weight) > 0.05 * np.linalg.norm(
        weight
    )  # the dequantised weight has other norms
    pair = LoraPair(a=rng.normal(size=(2, 40)), b=rng.normal(size=(6, 2)), scale=0.5, magnitude=np.arange(6) - 2.5)
    total = site.matrix.astype(np.float64) + pair.delta()
    x, before = rng.normal(size=(5, 40)).astype(np.float32), contents(model)
    # onnxruntime rounds x too where it fuses the two nodes, so the base is what onnxruntime computes.
    expected = run(model, x=x)["y"] - shift + x @ pair.delta().T.astype(np.float64)
    expected = expected * (pair.magnitude / np.linalg.norm(total, axis=1)) + shift
    with_nodes(model, an_adapter({"m": pair}))
    assert before.items() < contents(model).items()
    np.testing.assert_allclose(run(model, x=x)["y"], expected, rtol=1e-5, atol=1e-5)


def test_dora_and_changed_bias_in_one_gemm() -> None:
    model = a_graph("""
        g (float[2,3] x) => (float[2,2] y, float[2,2] z)
        <float[2,3] m.weight = {1,2,3,4,5,6}, float[2] m.bias = {10,20}, float[2,3] o.weight = {1,2,3,4,5,6}>
        { [n] y = Gemm <transB = 1> (x, m.weight, m.bias)
          [o] z = Gemm <transB = 1> (x, o.weight, m.bias) }""", modules={"n": "m", "o": "o"})  # fmt: skip
    with_nodes(model, an_adapter({"m": DORA}, biases={"m": np.float32([1, 2])}))
    output = run(model, x=X)
    np.testing.assert_allclose(output["y"], X @ dora_weight(W, DORA).T + [11, 22], rtol=1e-6)
    assert np.array_equal(output["z"], X @ W.T + [10, 20])


def test_module_called_twice_has_one_factor() -> None:
    model = a_graph(SHARED, modules={"first": "a.fc", "second": "a.fc"})
    pair = dataclasses.replace(SQUARE, magnitude=[3, 4])
    with_nodes(model, an_adapter({"a.fc": pair}))
    assert len(model.graph.initializers) == 4
    weight = dora_weight(np.float64([[1, 3], [2, 4]]), pair)
    np.testing.assert_allclose(run(model, x=np.float32([[1, 2]]))["y"], [[1, 2]] @ weight.T @ weight.T, rtol=1e-6)


@pytest.mark.parametrize("last", [6, 7])
def test_only_equal_weights_of_one_name_share_factor(last: int) -> None:
    model = a_graph(f"""
        g (float[N,3] x) => (float[N,2] y, float[N,2] z)
        <float[2,3] m.weight = {{1,2,3,4,5,6}}, float[2,3] o.weight = {{1,2,3,4,5,{last}}}>
        {{ y = Gemm <transB = 1> (x, m.weight)
           z = Gemm <transB = 1> (x, o.weight) }}""")
    found = find_sites(model)
    both = Sites({"m.weight": tuple(site for sites in found.by_name.values() for site in sites)}, (), ())
    insert_nodes(model, both, plan.make([an_adapter({"m": DORA})], both.specs))
    output = run(model, x=X)
    np.testing.assert_allclose(output["y"], X @ dora_weight(W, DORA).T, rtol=1e-6)
    other = np.float64([[1, 2, 3], [4, 5, last]])
    np.testing.assert_allclose(output["z"], X @ dora_weight(other, DORA).T, rtol=1e-6)
    assert len([name for name in model.graph.initializers if "magnitude" in name]) == (1 if last == 6 else 2)


def test_factor_has_name_of_its_adapter() -> None:
    model = a_graph(SHARED.replace("y = MatMul(h, a.fc.weight)", "y = MatMul(h, b.weight)").replace(
        "3,4}>", "3,4}, float[2,2] b.weight = {1,0,0,1}>"
    ))  # fmt: skip
    pair = dataclasses.replace(SQUARE, magnitude=[3, 4])
    with_nodes(model, an_adapter({"a.fc": pair}, name="one"), an_adapter({"b": SQUARE}, name="two"))
    assert "a.fc.lora_magnitude_vector.one.weight" in model.graph.initializers
    assert "b.lora_magnitude_vector.two.weight" not in model.graph.initializers
    weights = dora_weight(np.float64([[1, 3], [2, 4]]), pair), np.eye(2) + SQUARE.delta()
    np.testing.assert_allclose(
        run(model, x=np.float32([[1, 2]]))["y"], [[1, 2]] @ weights[0].T @ weights[1].T, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (
            LoraPair(a=[[1, 2, 3]], b=[[-1], [0]], scale=1.0, magnitude=[1, 1]),
            r"m\.weight: 1 outputs of W \+ s·BA are zero",
        ),
        (LoraPair(a=[[1, 2, 3 - 1e-6]], b=[[-1], [0]], scale=1.0, magnitude=[3e38, 1]), "vector.weight: 1 value"),
    ],
)
def test_zero_output_and_overflowing_factor_are_refused(pair: LoraPair, message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        with_nodes(a_graph(GEMM), an_adapter({"m": pair}))


def test_dora_in_old_opset_is_refused() -> None:
    model = a_graph(GEMM)
    model.opset_imports[""] = 10
    with pytest.raises(InputRefused, match=r"the graph has opset 10, and DoRA beside its weights needs 11"):
        with_nodes(model, an_adapter({"m": DORA}))


def test_dora_norm_of_embedding_is_that_of_columns() -> None:
    model = a_graph(EMBEDDING)
    pair = dataclasses.replace(EMBEDDING_PAIR, magnitude=[3, -0.5])
    with_nodes(model, an_adapter({"words": pair}))
    assert stored(model, "words.lora_magnitude_vector.weight").shape == (2,)
    np.testing.assert_allclose(run(model, ids=IDS)["y"], dora_weight(TABLE.T, pair).T[IDS], rtol=1e-6)


@pytest.mark.parametrize("last", [6, 7])
def test_copies_of_weight_need_equal_factor(last: int) -> None:
    model = a_graph(f"""
        g (float[N,3] x) => (float[N,2] y, float[N,2] z)
        <float[2,3] m.weight = {{1,2,3,4,5,6}}, float[2,3] o.weight = {{1,2,3,4,5,{last}}}>
        {{ y = Gemm <transB = 1> (x, m.weight)
           z = Gemm <transB = 1> (x, o.weight) }}""")
    sites = tuple(site for found in find_sites(model).by_name.values() for site in found)
    pair = LoraPair(a=PAIR.a, b=PAIR.b, scale=2.0, magnitude=[1, 2])
    both = Sites({"m.weight": sites}, (), ())
    steps = plan.make([an_adapter({"m": pair})], both.specs)
    if last == 6:
        assert dora_factors_by_weight(steps.steps, "default", both.by_name.__getitem__)["m.weight"].shape == (2,)
        return
    with pytest.raises(InputRefused, match=r"m\.weight is stored more than once in the graph, with different"):
        insert_rows(model, both, steps, batch="N")
