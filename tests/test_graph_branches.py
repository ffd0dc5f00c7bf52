"""Adapters as nodes beside the weights: what is computed, and what it is called."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import (
    EVERY_MODEL,
    a_graph,
    an_adapter,
    contents,
    eager,
    exported,
    inputs,
    planned,
    run,
    stored,
    with_changes,
)
from numpy.typing import NDArray
from test_graph_fold import GEMM, LINEAR, PAIR, SHARED, SQUARE, everywhere, folded

from lora_export.errors import InputRefused
from lora_export.graph import branches, sites
from lora_export.graph.fold import StepResult
from lora_export.lora import Adapter, LoraPair

X = np.float32([[1, 1, 2], [0, 3, 1]])


def woven(model: ir.Model, *adapters: Adapter, **options: Any) -> list[StepResult]:
    found, steps = planned(model, *adapters, **options)
    results = branches.branch(model, found, steps)
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
    assert names[1:4] == ["/m/lora_A.a_lora_A/MatMul", "/m/lora_B.a_lora_A/MatMul", "/m/lora_B.a_lora_A/Add"]
    assert len(set(names)) == len(names) == 7
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


def test_dora_is_refused_by_name() -> None:
    pair = LoraPair(a=PAIR.a, b=PAIR.b, scale=1.0, magnitude=[1, 1])
    with pytest.raises(InputRefused, match=r"default: m\.weight: DoRA cannot stand beside a graph's weights yet"):
        woven(a_graph(GEMM), an_adapter({"m": pair}))


# --- real exports, against PyTorch ---


@EVERY_MODEL
def test_a_woven_export_computes_what_pytorch_computes(name: str) -> None:
    made = exported(name)
    adapter, changes = everywhere(made.graph)
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


def test_two_adapters_beside_an_export_are_their_sum() -> None:
    made = exported("encoder")
    (one, first), (other, second) = everywhere(made.graph, seed=1), everywhere(made.graph, seed=2)
    other = an_adapter(other.pairs, name="other")
    woven(made.graph, one, other, strengths=[1.0, -0.5])
    reference = with_changes(made.module, {name: first[name] - 0.5 * second[name] for name in first})
    feeds = inputs("encoder", 3, 5, seed=2)
    answer = run(made.graph, x=feeds["x"].numpy())
    np.testing.assert_allclose(answer["scores"], eager(reference, feeds)["scores"], rtol=1e-4, atol=1e-5)


def test_the_base_of_a_woven_graph_is_still_found() -> None:
    made = exported("encoder")
    before = {site.name for site in sites.find(made.graph).linear}
    woven(made.graph, everywhere(made.graph)[0])
    assert before < {site.name for site in sites.find(made.graph).linear}
