"""Scales of a layer's outputs or inputs beside its weight, in every mode, by hand."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from lora_export import plan
from lora_export.errors import InputRefused
from lora_export.formats.lora_changes import input_or_output_scales
from lora_export.graph.insert.adapter_nodes import insert_nodes
from lora_export.lora import LoraPair
from lora_export.pairs.transforms import WeightTransform
from support.graphs import a_graph, an_adapter, run
from support.insertion import (
    CONVOLUTION,
    W,
    X,
    adapter_inputs,
    packed_graph,
    row_ids,
    with_inputs,
    with_nodes,
    with_rows,
)
from support.small_graphs import GEMM, PAIR

BODIES = {
    "MatMul": ("x", "[t] w = Transpose(m.weight)\n[n] k = MatMul(x, w)\n[b] y = Add(k, m.bias)"),
    "Gemm": ("x", "[n] y = Gemm <transB = 1> (x, m.weight, m.bias)"),
    "Gemm of a transposed input": ("t", "[n] y = Gemm <transA = 1, transB = 1, beta = 0.5> (t, m.weight, m.bias)"),
}


def scaled(*factors: float, of_inputs: bool) -> WeightTransform:
    weight = np.float32(factors) - 1
    return input_or_output_scales(weight[None] if of_inputs else weight, np.array([float(of_inputs)]))


OUTPUTS, INPUTS = scaled(2, -1, of_inputs=False), scaled(2, 0, 3, of_inputs=True)


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("at_run_time", [False, True])
@pytest.mark.parametrize(("change", "strength"), [(OUTPUTS, 1.0), (INPUTS, 1.0), (OUTPUTS, 0.5), (INPUTS, -1.0)])
def test_nodes_scale_a_layer(name, change, strength, at_run_time):
    read, body = BODIES[name]
    shape = "float[3,N] t" if read == "t" else "float[N,3] x"
    model = a_graph(f"""
        g ({shape}) => (float[N,2] y)
        <float[2,3] m.weight = {{1,2,3,4,5,6}}, float[2] m.bias = {{10,20}}>
        {{ {body} }}""")
    given = {"adapter_strengths": np.float32([strength])} if at_run_time else {}
    with_nodes(model, an_adapter({"m": change}), strengths=[1 if given else strength], strength_input=at_run_time)
    factors = 1 + strength * (np.float32([2, 0, 3]) - 1), 1 + strength * (np.float32([2, -1]) - 1)
    product = (X * factors[0]) @ W.T if change is INPUTS else X @ W.T * factors[1]
    bias = np.float32([10, 20]) * (0.5 if "transposed" in name else 1)
    assert np.array_equal(run(model, **given, **{read: X.T if read == "t" else X})["y"], product + bias)


def test_a_factor_has_its_bits_at_the_default_strength():
    model = a_graph("""
        g (float16[N,2] x) => (float16[N,2] y)
        <float16[2,2] m.weight = {15360,0,0,15360}>
        { y = MatMul(x, m.weight) }""")
    factors = np.float32([1 / 1024, 3 / 4096])
    with_nodes(model, an_adapter({"m": scaled(*factors, of_inputs=False)}), strength_input=True)
    (y,) = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": np.ones((1, 2), np.float16)})  # all in float16
    assert np.array_equal(y, [factors])


@pytest.mark.parametrize("of_inputs", [False, True])
def test_nodes_scale_a_convolution(of_inputs):
    factors = np.float32([2, -3] if of_inputs else [2, -1, 3])
    kernel, x = np.float32([[[1, 2], [3, 4]], [[5, 6], [7, 8]], [[9, 1], [2, 3]]]), np.float32([[[1, 2, 4], [0, 1, 3]]])
    change = input_or_output_scales((factors - 1).reshape((1, 2, 1) if of_inputs else 3), np.array([float(of_inputs)]))
    model = a_graph(CONVOLUTION.replace("<ATTRIBUTES>", ""))
    with_nodes(model, an_adapter({"c": change}))
    kernel = kernel * (factors[:, None] if of_inputs else factors[:, None, None])
    expected = [[np.sum(each * x[0, :, place : place + 2]) for place in range(2)] for each in kernel]
    assert np.array_equal(run(model, x=x)["y"][0], np.float32(expected) + np.float32([[10], [20], [30]]))


def test_inputs_take_scales_and_are_the_base_without():
    model = a_graph(GEMM)
    contract = with_inputs(model, "m.weight", dora=["m.weight"], scaled=["m.weight"])
    assert np.array_equal(run(model, x=X)["y"], X @ W.T)
    for change, expected in ((OUTPUTS, X @ W.T * [2, -1]), (INPUTS, X * [2, 0, 3] @ W.T), (PAIR, [[7, 17], [7, 17]])):
        values = adapter_inputs(contract, an_adapter({"m": change}))
        assert np.array_equal(run(model, x=X, **values)["y"], expected)


def test_inputs_for_pairs_take_no_scales():
    contract = with_inputs(a_graph(GEMM), "m.weight", dora=["m.weight"])
    with pytest.raises(InputRefused, match=r"no input for the factors of DoRA or IA3 at these weights:\n  default, m"):
        adapter_inputs(contract, an_adapter({"m": INPUTS}))


def test_each_row_has_its_own_scales_or_pair():
    model = a_graph(GEMM)
    adapters = {"outputs": OUTPUTS, "inputs": INPUTS, "pair": PAIR}
    with_rows(model, *(an_adapter({"m": change}, name=name) for name, change in adapters.items()), one_at_a_time=True)
    x = X[[0, 0, 0, 0]]
    expected = [x[0] @ W.T, x[0] @ W.T * [2, -1], x[0] * [2, 0, 3] @ W.T, [7, 17]]
    assert np.array_equal(run(model, x=x, adapter_ids=row_ids(0, 1, 2, 3))["y"], expected)


def test_rows_with_several_adapters_have_no_scales():
    with pytest.raises(InputRefused, match=r"these have no sum:\n  default, m.weight: LyCORIS IA3"):
        with_rows(a_graph(GEMM), an_adapter({"m": OUTPUTS}), per_row=2)


def test_inputs_that_other_weights_read_are_not_scaled(tmp_path):
    model, sites = packed_graph(tmp_path)
    steps = plan.make([an_adapter({"q": scaled(*[2.0] * 31, 3.0, of_inputs=True)})], sites.specs)
    with pytest.raises(InputRefused, match="its inputs cannot be scaled alone"):
        insert_nodes(model, sites, steps)


def test_outputs_of_one_of_the_weights_in_a_matrix_are_scaled(tmp_path):
    model, sites = packed_graph(tmp_path)
    x = np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)
    pair = LoraPair(a=np.ones((1, 32)), b=np.ones((4, 1)), scale=0.5)
    change, before = scaled(*range(8), of_inputs=False), run(model, x=x)["y"]
    steps = plan.make([an_adapter({"q": change, "k": pair})], sites.specs)
    insert_nodes(model, sites, steps)
    expected = np.concatenate([before[:, :8] * np.arange(8), before[:, 8:] + 0.5 * x.sum(1, keepdims=True)], axis=1)
    np.testing.assert_allclose(run(model, x=x)["y"], expected, atol=1e-5)
