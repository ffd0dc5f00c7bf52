"""Adapters as nodes beside the weights: what is computed, and what it is called."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lora_export import plan
from lora_export.errors import InputRefused
from lora_export.graph.find_sites import Sites, find_sites
from lora_export.graph.insert.adapter_nodes import insert_nodes
from lora_export.graph.values import new_initializer
from lora_export.lora import Adapter, LoraPair
from lora_export.models import export
from lora_export.weights.merge_report import StepResult
from support.exported_models import EVERY_MODEL, attached, eager, exported, inputs, with_changes
from support.graphs import a_graph, an_adapter, contents, planned, quantised, run, stored
from support.small_graphs import GEMM, LINEAR, PAIR, SHARED, SQUARE, folded, random_adapter

X = np.float32([[1, 1, 2], [0, 3, 1]])


def woven(model: ir.Model, *adapters: Adapter, **options: Any) -> list[StepResult]:
    found, steps = planned(model, *adapters, **options)
    results = insert_nodes(model, found, steps)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return results


def computed(body: str, **feeds: Any) -> NDArray[Any]:
    return run(a_graph(body), **feeds)["y"]


# --- one layer, by hand ---


def test_a_branch_adds_its_product_to_the_layers() -> None:
    model = a_graph("""
        g (float[N,3] x) => (float[N,2] y)
        <float[3,2] m.weight = {1,4,2,5,3,6}>
        { [n] h = MatMul(x, m.weight)
          [r] y = Relu(h) }""")
    woven(model, an_adapter({"m": PAIR}))
    assert [(node.op_type, node.name) for node in model.graph] == [
        ("MatMul", "n"),
        ("MatMul", "/m/lora_A/MatMul"),
        ("MatMul", "/m/lora_B/MatMul"),
        ("Add", "/m/lora_B/Add"),
        ("Relu", "r"),
    ]
    # x W^T = [[9, 21], [9, 21]]; x A^T = [-1, -1], times s B^T = [2, 4]
    assert np.array_equal(run(model, x=X)["y"], [[9 - 2, 21 - 4], [9 - 2, 21 - 4]])


def test_a_and_b_lie_as_a_matmul_reads_them_with_the_scale_in_b() -> None:
    model = a_graph(LINEAR)
    woven(model, an_adapter({"m": PAIR}), strengths=[0.5])
    assert np.array_equal(stored(model, "m.lora_A.weight"), [[1], [0], [-1]])
    assert np.array_equal(stored(model, "m.lora_B.weight"), [[1 * 2 * 0.5, 2 * 2 * 0.5]])


def test_every_initializer_of_the_base_keeps_its_bytes() -> None:
    model = a_graph(LINEAR)
    before = contents(model)
    woven(model, an_adapter({"m": PAIR}))
    after = contents(model)
    assert before.items() < after.items()
    assert after.keys() - before.keys() == {"m.lora_A.weight", "m.lora_B.weight"}


def test_an_output_of_the_graph_keeps_its_name_and_shape() -> None:
    model = a_graph(GEMM)
    woven(model, an_adapter({"m": PAIR}))
    (output,) = model.graph.outputs
    assert (output.name, str(output.shape)) == ("y", "[N,2]")
    assert np.array_equal(run(model, x=X)["y"], [[7, 17], [7, 17]])


def test_several_adapters_carry_their_names_and_add_up() -> None:
    model = a_graph(GEMM)
    woven(model, an_adapter({"m": PAIR}, name="a_lora_A"), an_adapter({"m": PAIR}, name="blue"), strengths=[1.0, -3.0])
    adapters = [f"m.{part}.{name}.weight" for name in ("a_lora_A", "blue") for part in ("lora_A", "lora_B")]
    assert list(model.graph.initializers) == ["m.weight", *adapters]
    names = [node.name for node in model.graph]
    side, other = "/m/lora_A.a_lora_A", "/m/lora_B.a_lora_A"
    assert names[1:] == [f"{side}/Concat", f"{other}/Concat", f"{side}/MatMul", f"{other}/MatMul", f"{other}/Add"]
    assert np.array_equal(run(model, x=X)["y"], [[9 + 4, 21 + 8], [9 + 4, 21 + 8]])


@pytest.mark.parametrize(
    "gemm",
    [
        "Gemm <transB = 1, alpha = 2.0, beta = 3.0> (x, m.weight, m.bias)",
        "Gemm <transA = 1, transB = 1> (t, m.weight, m.bias)",
        "Gemm <transA = 1, transB = 1, alpha = 0.5> (t, m.weight, m.bias)",
    ],
)
def test_a_gemms_attributes_hold_for_its_branch(gemm: str) -> None:
    body = f"""
        g (float[2,3] x) => (float[2,2] y)
        <float[2,3] m.weight = {{1,2,3,4,5,6}}, float[2] m.bias = {{10,20}}>
        {{ t = Transpose(x)
           [n] y = {gemm} }}"""
    merged, beside = a_graph(body), a_graph(body)
    folded(merged, an_adapter({"m": PAIR}))
    woven(beside, an_adapter({"m": PAIR}))
    assert np.array_equal(run(beside, x=X)["y"], run(merged, x=X)["y"])
    assert not np.array_equal(run(beside, x=X)["y"], computed(body, x=X))


def test_a_packed_projection_and_a_bare_weight_lend_their_modules_names() -> None:
    packed = a_graph(GEMM.replace("m.weight", "attn.in_proj_weight"))
    woven(packed, an_adapter({"attn": PAIR}))
    assert "attn.lora_A.weight" in packed.graph.initializers
    bare = a_graph(GEMM.replace("m.weight", "weight"))
    woven(bare, an_adapter({"weight": PAIR}))
    assert "lora_A.weight" in bare.graph.initializers
    assert bare.graph[1].name == "/lora_A/MatMul"


def test_a_and_b_have_the_weights_dtype() -> None:
    model = a_graph(GEMM)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.dtype = ir.DataType.FLOAT16
    weight = model.graph.initializers["m.weight"]
    weight.const_value, weight.dtype = ir.Tensor(stored(model, "m.weight").astype(np.float16)), ir.DataType.FLOAT16
    woven(model, an_adapter({"m": PAIR}))
    assert {stored(model, name).dtype for name in model.graph.initializers} == {np.dtype(np.float16)}
    assert np.array_equal(run(model, x=X.astype(np.float16))["y"], [[7, 17], [7, 17]])


def test_biases_and_whole_tensors_are_folded_in() -> None:
    model = a_graph(LINEAR)
    whole = np.float32([1, 2])
    adapter = an_adapter({"m": PAIR}, biases={"m": np.float32([1, 1])}, replaced={"other.bias": whole})
    results = woven(model, adapter)
    assert np.array_equal(stored(model, "m.bias"), [11, 21])
    assert np.array_equal(stored(model, "other.bias"), whole)
    assert [result.weight for result in results] == ["m.bias"]


def test_a_layer_in_a_subgraph_gets_its_branch_there() -> None:
    model = a_graph("""
        g (float[N,2] x, bool c) => (float[N,2] y)
        <float[2,2] fc.weight = {1,2,3,4}>
        { y = If (c) <
            then_branch = t () => (float[N,2] a) { [inner] a = MatMul(x, fc.weight) },
            else_branch = e () => (float[N,2] b) { [other] b = Identity(x) }> }""")
    woven(model, an_adapter({"fc": SQUARE}))
    assert np.array_equal(run(model, x=np.float32([[1, 0]]), c=np.array(True))["y"], [[2, 4]])
    assert np.array_equal(run(model, x=np.float32([[1, 0]]), c=np.array(False))["y"], [[1, 0]])


# --- DoRA: y = m / ‖W + sBA‖ * x (W + sBA)^T + bias ---

W = np.float64([[1, 2, 3], [4, 5, 6]])  # of m, (out, in)
DORA = dataclasses.replace(PAIR, magnitude=[5.0, 0.5])


def rescaled(weight: NDArray[Any], pair: LoraPair) -> NDArray[np.float64]:
    """m / ‖W + sBA‖ * (W + sBA), in the (out, in, ...) view."""
    assert pair.magnitude is not None
    a, b = pair.a.astype(np.float64), pair.b.astype(np.float64)
    total = weight + pair.scale * (b.reshape(-1, pair.rank) @ a.reshape(pair.rank, -1)).reshape(weight.shape)
    length = np.sqrt(np.square(total).sum(axis=tuple(range(1, total.ndim))))
    return total * (pair.magnitude / length).reshape(-1, *[1] * (total.ndim - 1))


def test_dora_rescales_the_product_and_its_branch_and_the_base_keeps_its_bytes() -> None:
    model = a_graph(LINEAR)
    before = contents(model)
    woven(model, an_adapter({"m": DORA}))
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
def test_a_gemms_bias_is_not_rescaled_by_dora(gemm: str, bias: Any, alpha: float, beta: float) -> None:
    model = a_graph(f"""
        g (float[2,3] x) => (float[2,2] y)
        <float[2,3] m.weight = {{1,2,3,4,5,6}}, float[2] row = {{10,20}}, float[2,1] column = {{7,8}},
         float one = {{1}}>
        {{ t = Transpose(x)
           k = Add(row, one)
           [n] y = Gemm {gemm} }}""")
    before = contents(model)
    woven(model, an_adapter({"m": DORA}))
    assert before.items() < contents(model).items()
    expected = alpha * X @ rescaled(W, DORA).T + beta * np.array(bias)
    np.testing.assert_allclose(run(model, x=X)["y"], expected, rtol=1e-6)


def test_doras_length_is_that_of_the_weight_at_its_adapters_strength() -> None:
    model = a_graph(GEMM)
    woven(model, an_adapter({"m": DORA}), strengths=[-1.5])
    expected = X @ rescaled(W, dataclasses.replace(DORA, scale=DORA.scale * -1.5)).T
    np.testing.assert_allclose(run(model, x=X)["y"], expected, rtol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("as_pairs", [False, True])
def test_dora_beside_a_quantised_weight_has_the_lengths_of_what_it_stands_for(as_pairs: bool, bias: bool) -> None:
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
    assert np.linalg.norm(site.matrix - weight) > 0.05 * np.linalg.norm(weight)  # they differ, and so do the lengths
    pair = LoraPair(a=rng.normal(size=(2, 40)), b=rng.normal(size=(6, 2)), scale=0.5, magnitude=np.arange(6) - 2.5)
    total = site.matrix.astype(np.float64) + pair.delta()
    x, before = rng.normal(size=(5, 40)).astype(np.float32), contents(model)
    # onnxruntime rounds x too where it fuses the two nodes: its own base is the base here.
    expected = run(model, x=x)["y"] - shift + x @ pair.delta().T.astype(np.float64)
    expected = expected * (pair.magnitude / np.linalg.norm(total, axis=1)) + shift
    woven(model, an_adapter({"m": pair}))
    assert before.items() < contents(model).items()
    np.testing.assert_allclose(run(model, x=x)["y"], expected, rtol=1e-5, atol=1e-5)


def test_dora_and_a_shift_of_the_bias_in_the_same_gemm_meet() -> None:
    model = a_graph("""
        g (float[2,3] x) => (float[2,2] y, float[2,2] z)
        <float[2,3] m.weight = {1,2,3,4,5,6}, float[2] m.bias = {10,20}, float[2,3] o.weight = {1,2,3,4,5,6}>
        { [n] y = Gemm <transB = 1> (x, m.weight, m.bias)
          [o] z = Gemm <transB = 1> (x, o.weight, m.bias) }""", modules={"n": "m", "o": "o"})  # fmt: skip
    woven(model, an_adapter({"m": DORA}, biases={"m": np.float32([1, 2])}))
    answer = run(model, x=X)
    np.testing.assert_allclose(answer["y"], X @ rescaled(W, DORA).T + [11, 22], rtol=1e-6)
    assert np.array_equal(answer["z"], X @ W.T + [10, 20])


def test_a_module_that_is_called_twice_has_one_length() -> None:
    model = a_graph(SHARED, modules={"first": "a.fc", "second": "a.fc"})
    pair = dataclasses.replace(SQUARE, magnitude=[3, 4])
    woven(model, an_adapter({"a.fc": pair}))
    assert len(model.graph.initializers) == 4
    weight = rescaled(np.float64([[1, 3], [2, 4]]), pair)
    np.testing.assert_allclose(run(model, x=np.float32([[1, 2]]))["y"], [[1, 2]] @ weight.T @ weight.T, rtol=1e-6)


@pytest.mark.parametrize("last", [6, 7])
def test_weights_of_one_name_have_one_length_only_where_they_are_equal(last: int) -> None:
    model = a_graph(f"""
        g (float[N,3] x) => (float[N,2] y, float[N,2] z)
        <float[2,3] m.weight = {{1,2,3,4,5,6}}, float[2,3] o.weight = {{1,2,3,4,5,{last}}}>
        {{ y = Gemm <transB = 1> (x, m.weight)
           z = Gemm <transB = 1> (x, o.weight) }}""")
    found = find_sites(model)
    both = Sites({"m.weight": tuple(site for there in found.by_name.values() for site in there)}, (), ())
    insert_nodes(model, both, plan.make([an_adapter({"m": DORA})], both.specs))
    answer = run(model, x=X)
    np.testing.assert_allclose(answer["y"], X @ rescaled(W, DORA).T, rtol=1e-6)
    other = np.float64([[1, 2, 3], [4, 5, last]])
    np.testing.assert_allclose(answer["z"], X @ rescaled(other, DORA).T, rtol=1e-6)
    assert len([name for name in model.graph.initializers if "magnitude" in name]) == (1 if last == 6 else 2)


def test_doras_length_carries_the_name_of_one_adapter_of_several() -> None:
    model = a_graph(SHARED.replace("y = MatMul(h, a.fc.weight)", "y = MatMul(h, b.weight)").replace(
        "3,4}>", "3,4}, float[2,2] b.weight = {1,0,0,1}>"
    ))  # fmt: skip
    pair = dataclasses.replace(SQUARE, magnitude=[3, 4])
    woven(model, an_adapter({"a.fc": pair}, name="one"), an_adapter({"b": SQUARE}, name="two"))
    assert "a.fc.lora_magnitude_vector.one.weight" in model.graph.initializers
    assert "b.lora_magnitude_vector.two.weight" not in model.graph.initializers
    weights = rescaled(np.float64([[1, 3], [2, 4]]), pair), np.eye(2) + SQUARE.delta()
    np.testing.assert_allclose(
        run(model, x=np.float32([[1, 2]]))["y"], [[1, 2]] @ weights[0].T @ weights[1].T, rtol=1e-6
    )


def test_doras_length_has_the_weights_dtype() -> None:
    model = a_graph(GEMM)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.dtype = ir.DataType.FLOAT16
    weight = model.graph.initializers["m.weight"]
    weight.const_value, weight.dtype = ir.Tensor(stored(model, "m.weight").astype(np.float16)), ir.DataType.FLOAT16
    woven(model, an_adapter({"m": DORA}))
    assert stored(model, "m.lora_magnitude_vector.weight").dtype == np.float16
    np.testing.assert_allclose(run(model, x=X.astype(np.float16))["y"], X @ rescaled(W, DORA).T, rtol=2e-3)


@pytest.mark.parametrize(
    ("pair", "told"),
    [
        (
            LoraPair(a=[[1, 2, 3]], b=[[-1], [0]], scale=1.0, magnitude=[1, 1]),
            r"m\.weight: 1 outputs of W \+ s·BA are zero",
        ),
        (LoraPair(a=[[1, 2, 3 - 1e-6]], b=[[-1], [0]], scale=1.0, magnitude=[3e38, 1]), "vector.weight: 1 values"),
    ],
)
def test_a_length_that_cannot_be_given_is_refused(pair: LoraPair, told: str) -> None:
    with pytest.raises(InputRefused, match=told):
        woven(a_graph(GEMM), an_adapter({"m": pair}))


def test_dora_beside_the_weights_of_an_old_graph_is_refused() -> None:
    model = a_graph(GEMM)
    model.opset_imports[""] = 10
    with pytest.raises(InputRefused, match=r"the graph has opset 10, and DoRA beside its weights needs 11"):
        woven(model, an_adapter({"m": DORA}))


# --- embeddings ---

WORDS = """
g (int64[N,L] ids) => (float[N,L,2] y)
<float[5,2] words.weight = {1,2,3,4,5,6,7,8,9,1}>
{ [n] y = Gather(words.weight, ids) }
"""
TABLE = np.float64([[1, 2], [3, 4], [5, 6], [7, 8], [9, 1]])  # (num, dim)
LOOKUP = LoraPair(a=[[1, 0, 2, 0, -1], [0, 1, 0, 0, 3]], b=[[1, 2], [0, -1]], scale=0.5, embedding=True)
IDS = np.array([[0, 4, 2], [-1, -5, 1]])  # negative ones count from the end


def test_an_embeddings_branch_looks_up_the_rows_of_a() -> None:
    model = a_graph(WORDS)
    before = contents(model)
    woven(model, an_adapter({"words": LOOKUP}))
    assert [(node.op_type, node.name) for node in model.graph] == [
        ("Gather", "n"),
        ("Gather", "/words/lora_A/Gather"),
        ("MatMul", "/words/lora_B/MatMul"),
        ("Add", "/words/lora_B/Add"),
    ]
    assert before.items() < contents(model).items()
    assert np.array_equal(stored(model, "words.lora_A.weight"), LOOKUP.a.T)
    assert np.array_equal(run(model, ids=IDS)["y"], (TABLE + LOOKUP.delta().T)[IDS])


def test_an_embeddings_doras_lengths_are_those_of_its_columns() -> None:
    model = a_graph(WORDS)
    pair = dataclasses.replace(LOOKUP, magnitude=[3, -0.5])
    woven(model, an_adapter({"words": pair}))
    assert stored(model, "words.lora_magnitude_vector.weight").shape == (2,)
    np.testing.assert_allclose(run(model, ids=IDS)["y"], rescaled(TABLE.T, pair).T[IDS], rtol=1e-6)


def test_an_embeddings_branch_leaves_its_tied_head_alone() -> None:
    model = a_graph(
        """
        g (int64[N,L] ids, float[N,2] x) => (float[N,L,2] y, float[N,5] z)
        <float[5,2] words.weight = {1,2,3,4,5,6,7,8,9,1}>
        { [e] y = Gather(words.weight, ids)
          [n] z = Gemm <transB = 1> (x, words.weight) }""",
        modules={"e": "words", "n": "head"},
    )
    woven(model, an_adapter({"words": LOOKUP}))
    x = np.float32([[1, 2], [3, 4]])
    answer = run(model, ids=IDS, x=x)
    assert np.array_equal(answer["y"], (TABLE + LOOKUP.delta().T)[IDS])
    assert np.array_equal(answer["z"], x @ TABLE.T)


TIED = """
g (int64[N] ids) => (float[N,5] y)
<float[5,2] words.weight = {1,2,3,4,5,6,7,8,9,1}>
{ [e] x = Gather(words.weight, ids)
  [n] y = Gemm <transB = 1> (x, words.weight) }
"""
INSIDE = """
<ir_version: 10, opset_import: ["" : 20, "own" : 1]>
g (int64[N] ids) => (float[N,2] y)
<float[5,2] "words.weight" = {1,2,3,4,5,6,7,8,9,1}>
{ y = own.look(ids, "words.weight") }
<domain: "own", opset_import: ["" : 20]>
look (ids, table) => (y) { y = Gather(table, ids) }
"""


@pytest.mark.parametrize(
    ("model", "told"),
    [(a_graph(TIED, modules={"e": "", "n": ""}), "Gemm"), (ir.from_onnx_text(INSIDE), "look")],
    ids=["tied", "in a function"],
)
def test_an_embeddings_adapter_beside_another_reader_is_refused_by_name(model: ir.Model, told: str) -> None:
    found = find_sites(model)
    specs = [dataclasses.replace(spec, shape=(5, 2), layout=plan.Layout.EMBEDDING) for spec in found.specs]
    with pytest.raises(InputRefused, match=rf"words\.weight is read by {told}, beside which no branch"):
        insert_nodes(model, found, plan.make([an_adapter({"words": LOOKUP})], specs))


def test_an_embeddings_adapter_beside_some_rows_of_a_larger_table_is_refused() -> None:
    model = a_graph(WORDS)
    (site,) = find_sites(model).by_name["words.weight"]
    found = Sites({"small.weight": (dataclasses.replace(site, block=range(2)),)}, (), ())
    with pytest.raises(InputRefused, match=r"small\.weight is read by Gather, beside which no branch"):
        pair = LoraPair(a=[[1, 2]], b=[[1], [2]], scale=1.0, embedding=True)
        insert_nodes(model, found, plan.make([an_adapter({"small": pair})], found.specs))


@pytest.mark.parametrize("dora", [False, True])
def test_an_exports_embeddings_compute_what_pytorch_computes(dora: bool) -> None:
    made = exported("bert")
    rng = np.random.default_rng(0)
    pairs = {
        spec.name.removesuffix(".weight"): LoraPair(
            a=rng.normal(size=(2, spec.shape[0])), b=rng.normal(size=(spec.shape[1], 2)), scale=0.5, embedding=True,
            magnitude=rng.uniform(1, 2, spec.shape[1]) if dora else None,
        )
        for spec in find_sites(made.graph).specs if spec.layout is plan.Layout.EMBEDDING
    }  # fmt: skip
    assert "bert.embeddings.word_embeddings" in pairs
    base, adapter = made.graph.clone(), an_adapter(pairs)
    woven(made.graph, adapter)
    assert contents(base).items() < contents(made.graph).items()
    feeds = inputs("bert", 3, 12, seed=2)
    arrays = {key: value.numpy() for key, value in feeds.items()}
    answer, before = run(made.graph, **arrays), run(base, **arrays)
    for key, value in eager(attached(made.module, adapter), feeds).items():
        np.testing.assert_allclose(answer[key], value, rtol=1e-4, atol=1e-5)
        assert np.abs(value - before[key]).max() > 1e-2


# --- convolutions ---


class Strided(nn.Module):
    """Convolutions over one, two and three dimensions, one with everything that a convolution can have."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(2, 3, 3, stride=2, padding=2, dilation=2)
        self.two = nn.Conv2d(2, 4, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1), bias=False)
        self.three = nn.Conv3d(2, 3, (2, 1, 3), padding=(0, 1, 1))
        self.point = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> dict[str, Tensor]:
        return {"one": self.one(x), "two": self.point(torch.relu(self.two(y))), "three": self.three(z)}


@functools.cache
def strided() -> tuple[nn.Module, ir.Model, dict[str, Tensor]]:
    torch.manual_seed(0)
    module = Strided().eval()
    feeds = {"x": torch.randn(2, 2, 12), "y": torch.randn(2, 2, 9, 8), "z": torch.randn(2, 2, 4, 5, 6)}
    axes: Any = {name: {0: "batch", 2: f"length_{name}"} for name in feeds}
    return module, export.to_onnx(module, feeds, axes=axes), feeds


@pytest.mark.parametrize("dora", [False, True])
def test_an_exports_convolutions_compute_what_pytorch_computes(dora: bool) -> None:
    module, graph, feeds = strided()
    graph, rng = graph.clone(), np.random.default_rng(0)
    pairs = {
        name: LoraPair(
            a=rng.normal(size=(2, *layer.weight.shape[1:])), scale=0.5,
            b=rng.normal(size=(layer.weight.shape[0], 2, *[1] * (layer.weight.ndim - 2))),
            magnitude=rng.uniform(1, 2, layer.weight.shape[0]) if dora else None,
        )
        for name, layer in module.named_children()
    }  # fmt: skip
    base, adapter = graph.clone(), an_adapter(pairs)
    woven(graph, adapter)
    assert contents(base).items() < contents(graph).items()
    assert len([node for node in graph.graph if node.op_type == "Conv"]) == 3 * len(pairs)
    larger = {name: torch.cat([value, value.flip(2)], 2)[:1] for name, value in feeds.items()}
    for fed in (feeds, larger):
        arrays = {key: value.numpy() for key, value in fed.items()}
        answer, before = run(graph, **arrays), run(base, **arrays)
        for key, value in eager(attached(module, adapter), fed).items():
            np.testing.assert_allclose(answer[key], value, rtol=1e-4, atol=1e-5)
            assert np.abs(value - before[key]).max() > 0.1


CONV = """
g (float[N,2,L] x) => (float[N,3,M] y)
<float[3,2,2] c.weight = {1,2,3,4,5,6,7,8,9,1,2,3}, float[3] c.bias = {10,20,30}>
{ [n] y = Conv <ATTRIBUTES> (x, c.weight, c.bias) }
"""
KERNEL = np.float64([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3]).reshape(3, 2, 2)
CONVOLVED = LoraPair(
    a=[[[1, 0], [2, -1]]], b=np.float32([1, -2, 3]).reshape(3, 1, 1), scale=0.5, magnitude=[1, 2, -3]
)  # fmt: skip


@pytest.mark.parametrize(
    "attributes",
    [
        "strides = [1]",
        'auto_pad = "SAME_UPPER", strides = [2]',
        'auto_pad = "SAME_LOWER"',
        "kernel_shape = [2], pads = [1, 0]",
    ],
)
@pytest.mark.parametrize("dora", [False, True])
def test_a_convolutions_attributes_hold_for_its_branch(attributes: str, dora: bool) -> None:
    body = CONV.replace("ATTRIBUTES", attributes)
    model, merged = a_graph(body), a_graph(body)
    pair = CONVOLVED if dora else dataclasses.replace(CONVOLVED, magnitude=None)
    woven(model, an_adapter({"c": pair}))
    weight = rescaled(KERNEL, pair) if dora else KERNEL + pair.delta()
    merged.graph.initializers["c.weight"].const_value = ir.Tensor(weight.astype(np.float32), name="c.weight")
    x = np.random.default_rng(0).normal(size=(2, 2, 7)).astype(np.float32)
    np.testing.assert_allclose(run(model, x=x)["y"], run(merged, x=x)["y"], rtol=1e-5, atol=1e-5)
    assert not np.allclose(run(model, x=x)["y"], computed(body, x=x), atol=0.1)


def test_a_convolutions_branch_is_named_as_others_are_and_holds_the_pair_as_it_is() -> None:
    model = a_graph(CONV.replace("ATTRIBUTES", "strides = [1]"))
    before = contents(model)
    woven(model, an_adapter({"c": CONVOLVED}))
    assert before.items() < contents(model).items()
    assert [node.name for node in model.graph] == [
        "n", "/c/lora_A/Conv", "/c/lora_B/Conv", "/c/lora_B/Add", "/c/lora_magnitude_vector/Mul",
        "/c/lora_magnitude_vector/Reshape", "/c/lora_magnitude_vector/Add",
    ]  # fmt: skip
    assert np.array_equal(stored(model, "c.lora_A.weight"), CONVOLVED.a)
    assert np.array_equal(stored(model, "c.lora_B.weight"), 0.5 * CONVOLVED.b)
    assert stored(model, "c.lora_magnitude_vector.weight").shape == (3, 1)
    (output,) = model.graph.outputs
    assert (output.name, str(output.shape)) == ("y", "[N,3,M]")


@pytest.mark.parametrize(
    ("body", "module", "pair", "feeds"),
    [
        (CONV.replace("ATTRIBUTES", "strides = [1]"), "c", CONVOLVED, {"x": np.arange(14.0).reshape(1, 2, 7)}),
        (WORDS, "words", LOOKUP, {"ids": IDS}),
    ],
)
def test_two_adapters_of_any_layer_are_one_product_of_all_their_ranks(
    body: str, module: str, pair: LoraPair, feeds: dict[str, Any]
) -> None:
    feeds = {name: array.astype(np.int64 if name == "ids" else np.float32) for name, array in feeds.items()}
    one = dataclasses.replace(pair, magnitude=None)
    two = dataclasses.replace(one, a=one.a * 3 - 1, scale=-0.25)
    model, base = a_graph(body), computed(body, **feeds)
    woven(model, an_adapter({module: one}, name="one"), an_adapter({module: two}, name="two"))
    alone = [a_graph(body) for _ in range(2)]
    for graph, there in zip(alone, (one, two), strict=True):
        woven(graph, an_adapter({module: there}))
    changes = [run(graph, **feeds)["y"] - base for graph in alone]
    assert np.allclose(run(model, **feeds)["y"], base + sum(changes), rtol=1e-5)
    assert min(np.abs(change).max() for change in changes) > 1
    assert [node.op_type for node in model.graph].count("Add") == 1


def test_a_convolution_in_groups_is_refused_by_name() -> None:
    model = a_graph(CONV.replace("ATTRIBUTES", "group = 3").replace("[N,2,L]", "[N,6,L]"))
    with pytest.raises(InputRefused, match=r"c\.weight: a pair has no meaning beside a convolution of 3 groups"):
        woven(model, an_adapter({"c": CONVOLVED}))


def test_a_convolution_with_its_activation_inside_is_refused_by_name() -> None:
    body = CONV.replace("Conv <ATTRIBUTES>", 'com.microsoft.FusedConv <activation = "Relu">')
    model = a_graph(body.replace("com.microsoft.FusedConv", "FusedConv"))
    model.graph[0].domain, model.opset_imports["com.microsoft"] = "com.microsoft", 1
    with pytest.raises(InputRefused, match=r"c\.weight is read by FusedConv, beside which no branch can be inserted"):
        woven(model, an_adapter({"c": CONVOLVED}))


def test_a_pair_on_a_tensor_that_its_adapter_brings_is_refused_by_name() -> None:
    adapter = an_adapter({"m": PAIR}, replaced={"m.weight": np.ones((2, 3), np.float32)})
    with pytest.raises(InputRefused, match=r"default: m\.weight: the adapter has a whole tensor and a low-rank pair"):
        woven(a_graph(GEMM), adapter)


# --- shared tensors ---


def test_a_branch_stands_beside_one_reader_of_a_shared_tensor() -> None:
    model = a_graph(SHARED, modules={"first": "a.fc", "second": "b.fc"})
    woven(model, an_adapter({"b.fc": SQUARE}))
    assert np.array_equal(run(model, x=np.float32([[1, 0]]))["y"], [[1 * 2 + 2 * 3, 1 * 4 + 2 * 4]])
    assert set(model.graph.initializers) == {"a.fc.weight", "b.fc.lora_A.weight", "b.fc.lora_B.weight"}


def test_a_module_that_is_called_twice_has_a_branch_at_both_places_and_one_pair() -> None:
    model = a_graph(SHARED, modules={"first": "a.fc", "second": "a.fc"})
    merged = model.clone()
    woven(model, an_adapter({"a.fc": SQUARE}))
    folded(merged, an_adapter({"a.fc": SQUARE}))
    assert len(model.graph.initializers) == 3
    names = [node.name for node in model.graph]
    assert names[4:] == ["second", "/a.fc/lora_A/MatMul_1", "/a.fc/lora_B/MatMul_1", "/a.fc/lora_B/Add_1"]
    x = np.float32([[1, 2]])
    assert np.array_equal(run(model, x=x)["y"], run(merged, x=x)["y"])


# --- refusals ---


def test_a_second_weaving_is_refused() -> None:
    model = a_graph(GEMM)
    woven(model, an_adapter({"m": PAIR}))
    with pytest.raises(InputRefused, match=r"the graph holds m.lora_A.weight already"):
        woven(model, an_adapter({"m": PAIR}))


def test_a_weight_that_is_also_looked_up_is_refused() -> None:
    model = a_graph(
        """
        g (int64[N] ids) => (float[N,3] y)
        <float[3,2] tied.weight = {1,2,3,4,5,6}>
        { [e] x = Gather(tied.weight, ids)
          [t] w = Transpose(tied.weight)
          [n] y = MatMul(x, w) }""",
        modules={"e": "", "n": ""},
    )
    with pytest.raises(InputRefused, match=r"tied.weight is read by Gather"):
        woven(model, an_adapter({"tied": LoraPair(a=[[1, 0]], b=[[0], [0], [1]], scale=1.0)}))


def test_a_factor_that_overflows_the_graphs_dtype_is_refused() -> None:
    model = a_graph(GEMM)
    model.graph.initializers["m.weight"].const_value = ir.Tensor(np.ones((2, 3), np.float16), name="m.weight")
    with pytest.raises(InputRefused, match=r"m.lora_B.weight: 2 values .* float16 is 65504"):
        woven(model, an_adapter({"m": LoraPair(a=PAIR.a, b=PAIR.b, scale=70_000.0)}))


# --- real exports, against PyTorch ---


@EVERY_MODEL
def test_a_woven_export_computes_what_pytorch_computes(name: str) -> None:
    made = exported(name)
    adapter, changes = random_adapter(made.graph)
    base = made.graph.clone()
    woven(made.graph, adapter)
    assert contents(base).items() < contents(made.graph).items()
    reference = with_changes(made.module, changes)
    for batch, length in [(1, 5), (3, 12)]:
        feeds = inputs(name, batch, length, seed=2)
        arrays = {key: value.numpy() for key, value in feeds.items()}
        answer, before = run(made.graph, **arrays), run(base, **arrays)
        for key, value in eager(reference, feeds).items():
            np.testing.assert_allclose(answer[key], value, rtol=1e-4, atol=1e-5)
            assert np.abs(value - before[key]).max() > 1e-2  # the adapter is seen


@EVERY_MODEL
def test_an_export_with_dora_everywhere_computes_what_pytorch_computes(name: str) -> None:
    made = exported(name)
    rng = np.random.default_rng(0)
    pairs = {
        module: dataclasses.replace(pair, magnitude=rng.uniform(0.5, 1.5, pair.shape[0]))
        for module, pair in random_adapter(made.graph)[0].pairs.items()
    }
    base, lora, adapter = made.graph.clone(), made.graph.clone(), an_adapter(pairs)
    woven(made.graph, adapter)
    assert contents(base).items() < contents(made.graph).items()
    woven(lora, an_adapter({module: dataclasses.replace(pair, magnitude=None) for module, pair in pairs.items()}))
    feeds = inputs(name, 3, 12, seed=2)
    arrays = {key: value.numpy() for key, value in feeds.items()}
    answer, before, without = (run(graph, **arrays) for graph in (made.graph, base, lora))
    for key, value in eager(attached(made.module, adapter), feeds).items():
        np.testing.assert_allclose(answer[key], value, rtol=1e-4, atol=1e-5)
        assert min(np.abs(value - before[key]).max(), np.abs(value - without[key]).max()) > 1e-2  # its lengths are seen


def test_two_adapters_beside_an_export_are_their_sum() -> None:
    made = exported("encoder")
    (one, first), (other, second) = random_adapter(made.graph, seed=1), random_adapter(made.graph, seed=2)
    other = an_adapter(other.pairs, name="other")
    woven(made.graph, one, other, strengths=[1.0, -0.5])
    reference = with_changes(made.module, {name: first[name] - 0.5 * second[name] for name in first})
    feeds = inputs("encoder", 3, 5, seed=2)
    answer = run(made.graph, x=feeds["x"].numpy())
    np.testing.assert_allclose(answer["scores"], eager(reference, feeds)["scores"], rtol=1e-4, atol=1e-5)


def test_the_base_of_a_woven_graph_is_still_found() -> None:
    made = exported("encoder")
    before = {site.name for site in find_sites(made.graph).linear}
    woven(made.graph, random_adapter(made.graph)[0])
    assert before < {site.name for site in find_sites(made.graph).linear}
