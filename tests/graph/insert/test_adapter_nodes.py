"""Adapters as nodes: the nodes and initializers that are inserted, and what the graph computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from lora_export.errors import InputRefused
from lora_export.graph.find_sites import find_sites
from lora_export.lora import LoraPair
from support.exported_models import eager, exported, inputs, with_changes
from support.graphs import a_graph, an_adapter, contents, run, stored
from support.insertion import CONVOLUTION, CONVOLUTION_PAIR, EMBEDDING, EMBEDDING_PAIR, IDS, X, output_of, with_nodes
from support.small_graphs import GEMM, LINEAR, PAIR, SHARED, SQUARE, folded, random_adapter


def test_branch_adds_its_product_to_that_of_layer() -> None:
    model = a_graph("""
        g (float[N,3] x) => (float[N,2] y)
        <float[3,2] m.weight = {1,4,2,5,3,6}>
        { [n] h = MatMul(x, m.weight)
          [r] y = Relu(h) }""")
    with_nodes(model, an_adapter({"m": PAIR}))
    assert [(node.op_type, node.name) for node in model.graph] == [
        ("MatMul", "n"),
        ("MatMul", "/m/lora_A/MatMul"),
        ("MatMul", "/m/lora_B/MatMul"),
        ("Add", "/m/lora_B/Add"),
        ("Relu", "r"),
    ]
    # x W^T = [[9, 21], [9, 21]]; x A^T = [-1, -1], times s B^T = [2, 4]
    assert np.array_equal(run(model, x=X)["y"], [[9 - 2, 21 - 4], [9 - 2, 21 - 4]])


def test_a_and_b_are_in_out_with_scale_in_b() -> None:
    model = a_graph(LINEAR)
    with_nodes(model, an_adapter({"m": PAIR}), strengths=[0.5])
    assert np.array_equal(stored(model, "m.lora_A.weight"), [[1], [0], [-1]])
    assert np.array_equal(stored(model, "m.lora_B.weight"), [[1 * 2 * 0.5, 2 * 2 * 0.5]])


def test_initializers_of_base_keep_their_bytes() -> None:
    model = a_graph(LINEAR)
    before = contents(model)
    with_nodes(model, an_adapter({"m": PAIR}))
    after = contents(model)
    assert before.items() < after.items()
    assert after.keys() - before.keys() == {"m.lora_A.weight", "m.lora_B.weight"}


def test_graph_output_keeps_name_and_shape() -> None:
    model = a_graph(GEMM)
    with_nodes(model, an_adapter({"m": PAIR}))
    (output,) = model.graph.outputs
    assert (output.name, str(output.shape)) == ("y", "[N,2]")
    assert np.array_equal(run(model, x=X)["y"], [[7, 17], [7, 17]])


def test_several_adapters_have_their_names_and_are_summed() -> None:
    model = a_graph(GEMM)
    with_nodes(
        model, an_adapter({"m": PAIR}, name="a_lora_A"), an_adapter({"m": PAIR}, name="blue"), strengths=[1.0, -3.0]
    )
    adapters = [f"m.{part}.{name}.weight" for name in ("a_lora_A", "blue") for part in ("lora_A", "lora_B")]
    assert list(model.graph.initializers) == ["m.weight", *adapters]
    names = [node.name for node in model.graph]
    path_a, path_b = "/m/lora_A.a_lora_A", "/m/lora_B.a_lora_A"
    assert names[1:] == [
        f"{path_a}/Concat",
        f"{path_b}/Concat",
        f"{path_a}/MatMul",
        f"{path_b}/MatMul",
        f"{path_b}/Add",
    ]
    assert np.array_equal(run(model, x=X)["y"], [[9 + 4, 21 + 8], [9 + 4, 21 + 8]])


@pytest.mark.parametrize(
    "gemm",
    [
        "Gemm <transB = 1, alpha = 2.0, beta = 3.0> (x, m.weight, m.bias)",
        "Gemm <transA = 1, transB = 1> (t, m.weight, m.bias)",
        "Gemm <transA = 1, transB = 1, alpha = 0.5> (t, m.weight, m.bias)",
    ],
)
def test_branch_has_attributes_of_gemm(gemm: str) -> None:
    body = f"""
        g (float[2,3] x) => (float[2,2] y)
        <float[2,3] m.weight = {{1,2,3,4,5,6}}, float[2] m.bias = {{10,20}}>
        {{ t = Transpose(x)
           [n] y = {gemm} }}"""
    merged, beside = a_graph(body), a_graph(body)
    folded(merged, an_adapter({"m": PAIR}))
    with_nodes(beside, an_adapter({"m": PAIR}))
    assert np.array_equal(run(beside, x=X)["y"], run(merged, x=X)["y"])
    assert not np.array_equal(run(beside, x=X)["y"], output_of(body, x=X))


def test_factors_are_named_after_modules_of_unusual_weights() -> None:
    packed = a_graph(GEMM.replace("m.weight", "attn.in_proj_weight"))
    with_nodes(packed, an_adapter({"attn": PAIR}))
    assert "attn.lora_A.weight" in packed.graph.initializers
    bare = a_graph(GEMM.replace("m.weight", "weight"))
    with_nodes(bare, an_adapter({"weight": PAIR}))
    assert "lora_A.weight" in bare.graph.initializers
    assert bare.graph[1].name == "/lora_A/MatMul"


@pytest.mark.parametrize("pair", [PAIR, dataclasses.replace(PAIR, magnitude=[1, 2])])
def test_factors_have_dtype_of_weight(pair: LoraPair) -> None:
    model = a_graph(GEMM)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.dtype = ir.DataType.FLOAT16
    weight = model.graph.initializers["m.weight"]
    weight.const_value, weight.dtype = ir.Tensor(stored(model, "m.weight").astype(np.float16)), ir.DataType.FLOAT16
    with_nodes(model, an_adapter({"m": pair}))
    assert {stored(model, name).dtype for name in model.graph.initializers} == {np.dtype(np.float16)}
    if pair is PAIR:
        assert np.array_equal(run(model, x=X.astype(np.float16))["y"], [[7, 17], [7, 17]])


def test_biases_and_whole_tensors_are_merged() -> None:
    model = a_graph(LINEAR)
    whole = np.float32([1, 2])
    adapter = an_adapter({"m": PAIR}, biases={"m": np.float32([1, 1])}, replaced={"other.bias": whole})
    results = with_nodes(model, adapter)
    assert np.array_equal(stored(model, "m.bias"), [11, 21])
    assert np.array_equal(stored(model, "other.bias"), whole)
    assert [result.weight for result in results] == ["m.bias"]


@pytest.mark.parametrize("put", [with_nodes, folded])
def test_layer_in_subgraph_is_changed_there(put: Callable[..., Any]) -> None:
    model = a_graph("""
        g (float[N,2] x, bool c) => (float[N,2] y)
        <float[2,2] fc.weight = {1,2,3,4}>
        { y = If (c) <
            then_branch = t () => (float[N,2] a) { [inner] a = MatMul(x, fc.weight) },
            else_branch = e () => (float[N,2] b) { [other] b = Identity(x) }> }""")
    put(model, an_adapter({"fc": SQUARE}))
    assert np.array_equal(run(model, x=np.float32([[1, 0]]), c=np.array(True))["y"], [[2, 4]])
    assert np.array_equal(run(model, x=np.float32([[1, 0]]), c=np.array(False))["y"], [[1, 0]])


@pytest.mark.parametrize(
    ("body", "module", "pair", "feeds"),
    [
        (
            CONVOLUTION.replace("ATTRIBUTES", "strides = [1]"),
            "c",
            CONVOLUTION_PAIR,
            {"x": np.arange(14.0).reshape(1, 2, 7)},
        ),
        (EMBEDDING, "words", EMBEDDING_PAIR, {"ids": IDS}),
    ],
)
def test_two_adapters_are_one_product_of_all_ranks(
    body: str, module: str, pair: LoraPair, feeds: dict[str, Any]
) -> None:
    feeds = {name: array.astype(np.int64 if name == "ids" else np.float32) for name, array in feeds.items()}
    one = dataclasses.replace(pair, magnitude=None)
    two = dataclasses.replace(one, a=one.a * 3 - 1, scale=-0.25)
    model, base = a_graph(body), output_of(body, **feeds)
    with_nodes(model, an_adapter({module: one}, name="one"), an_adapter({module: two}, name="two"))
    alone = [a_graph(body) for _ in range(2)]
    for graph, pair in zip(alone, (one, two), strict=True):
        with_nodes(graph, an_adapter({module: pair}))
    changes = [run(graph, **feeds)["y"] - base for graph in alone]
    assert np.allclose(run(model, **feeds)["y"], base + sum(changes), rtol=1e-5)
    assert min(np.abs(change).max() for change in changes) > 1
    assert [node.op_type for node in model.graph].count("Add") == 1


def test_branch_is_inserted_beside_one_reader_of_shared_tensor() -> None:
    model = a_graph(SHARED, modules={"first": "a.fc", "second": "b.fc"})
    with_nodes(model, an_adapter({"b.fc": SQUARE}))
    assert np.array_equal(run(model, x=np.float32([[1, 0]]))["y"], [[1 * 2 + 2 * 3, 1 * 4 + 2 * 4]])
    assert set(model.graph.initializers) == {"a.fc.weight", "b.fc.lora_A.weight", "b.fc.lora_B.weight"}


def test_module_called_twice_has_two_branches_and_one_pair() -> None:
    model = a_graph(SHARED, modules={"first": "a.fc", "second": "a.fc"})
    merged = model.clone()
    with_nodes(model, an_adapter({"a.fc": SQUARE}))
    folded(merged, an_adapter({"a.fc": SQUARE}))
    assert len(model.graph.initializers) == 3
    names = [node.name for node in model.graph]
    assert names[4:] == ["second", "/a.fc/lora_A/MatMul_1", "/a.fc/lora_B/MatMul_1", "/a.fc/lora_B/Add_1"]
    x = np.float32([[1, 2]])
    assert np.array_equal(run(model, x=x)["y"], run(merged, x=x)["y"])


def test_second_insertion_is_refused() -> None:
    model = a_graph(GEMM)
    with_nodes(model, an_adapter({"m": PAIR}))
    with pytest.raises(InputRefused, match=r"the graph holds m.lora_A.weight already"):
        with_nodes(model, an_adapter({"m": PAIR}))


def test_factor_that_overflows_dtype_of_graph_is_refused() -> None:
    model = a_graph(GEMM)
    model.graph.initializers["m.weight"].const_value = ir.Tensor(np.ones((2, 3), np.float16), name="m.weight")
    with pytest.raises(InputRefused, match=r"m.lora_B.weight: 2 values .* float16 is 65504"):
        with_nodes(model, an_adapter({"m": LoraPair(a=PAIR.a, b=PAIR.b, scale=70_000.0)}))


def test_export_with_two_adapters_equals_pytorch() -> None:
    made = exported("encoder")
    (one, first), (other, second) = random_adapter(made.graph, seed=1), random_adapter(made.graph, seed=2)
    other = an_adapter(other.pairs, name="other")
    with_nodes(made.graph, one, other, strengths=[1.0, -0.5])
    reference = with_changes(made.module, {name: first[name] - 0.5 * second[name] for name in first})
    feeds = inputs("encoder", 3, 5, seed=2)
    output = run(made.graph, x=feeds["x"].numpy())
    np.testing.assert_allclose(output["scores"], eager(reference, feeds)["scores"], rtol=1e-4, atol=1e-5)


def test_base_weights_are_found_after_insertion() -> None:
    made = exported("encoder")
    before = {site.name for site in find_sites(made.graph).linear}
    with_nodes(made.graph, random_adapter(made.graph)[0])
    assert before < {site.name for site in find_sites(made.graph).linear}
