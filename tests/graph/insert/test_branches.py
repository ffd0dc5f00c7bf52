"""Branches beside embeddings and convolutions, and in the dtypes of their readers."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from lora_export import plan
from lora_export.formats import onnx_adapter
from lora_export.graph.find_sites import Sites, find_sites
from lora_export.graph.insert.adapter_inputs import contract_dora_factors, insert_inputs
from lora_export.graph.insert.adapter_nodes import insert_nodes
from lora_export.graph.insert.adapter_rows import insert_rows
from lora_export.graph.site import find_readers
from lora_export.lora import LoraPair
from lora_export.models import export
from support.exported_models import attached, eager
from support.graphs import a_graph, an_adapter, contents, evaluated, run, stored
from support.insertion import (
    CONVOLUTION,
    CONVOLUTION_PAIR,
    EMBEDDING,
    EMBEDDING_PAIR,
    IDS,
    TABLE,
    X,
    dora_weight,
    output_of,
    with_nodes,
)
from support.small_graphs import PAIR


def test_branch_of_embedding_looks_up_rows_of_a() -> None:
    model = a_graph(EMBEDDING)
    before = contents(model)
    with_nodes(model, an_adapter({"words": EMBEDDING_PAIR}))
    assert [(node.op_type, node.name) for node in model.graph] == [
        ("Gather", "n"),
        ("Gather", "/words/lora_A/Gather"),
        ("MatMul", "/words/lora_B/MatMul"),
        ("Add", "/words/lora_B/Add"),
    ]
    assert before.items() < contents(model).items()
    assert np.array_equal(stored(model, "words.lora_A.weight"), EMBEDDING_PAIR.a.T)
    assert np.array_equal(run(model, ids=IDS)["y"], (TABLE + EMBEDDING_PAIR.delta().T)[IDS])


def test_branch_of_embedding_does_not_change_tied_head() -> None:
    model = a_graph(
        """
        g (int64[N,L] ids, float[N,2] x) => (float[N,L,2] y, float[N,5] z)
        <float[5,2] words.weight = {1,2,3,4,5,6,7,8,9,1}>
        { [e] y = Gather(words.weight, ids)
          [n] z = Gemm <transB = 1> (x, words.weight) }""",
        modules={"e": "words", "n": "head"},
    )
    with_nodes(model, an_adapter({"words": EMBEDDING_PAIR}))
    x = np.float32([[1, 2], [3, 4]])
    output = run(model, ids=IDS, x=x)
    assert np.array_equal(output["y"], (TABLE + EMBEDDING_PAIR.delta().T)[IDS])
    assert np.array_equal(output["z"], x @ TABLE.T)


class Strided(nn.Module):
    """Convolutions over one, two and three dimensions, with strides, paddings and dilations."""

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
def test_convolutions_of_export_equal_pytorch(dora: bool) -> None:
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
    with_nodes(graph, adapter)
    assert contents(base).items() < contents(graph).items()
    assert len([node for node in graph.graph if node.op_type == "Conv"]) == 3 * len(pairs)
    larger = {name: torch.cat([value, value.flip(2)], 2)[:1] for name, value in feeds.items()}
    for fed in (feeds, larger):
        arrays = {key: value.numpy() for key, value in fed.items()}
        output, before = run(graph, **arrays), run(base, **arrays)
        for key, value in eager(attached(module, adapter), fed).items():
            np.testing.assert_allclose(output[key], value, rtol=1e-4, atol=1e-5)
            assert np.abs(value - before[key]).max() > 0.1


KERNEL = np.float64([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3]).reshape(3, 2, 2)


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
def test_branch_has_attributes_of_convolution(attributes: str, dora: bool) -> None:
    body = CONVOLUTION.replace("ATTRIBUTES", attributes)
    model, merged = a_graph(body), a_graph(body)
    pair = CONVOLUTION_PAIR if dora else dataclasses.replace(CONVOLUTION_PAIR, magnitude=None)
    with_nodes(model, an_adapter({"c": pair}))
    weight = dora_weight(KERNEL, pair) if dora else KERNEL + pair.delta()
    merged.graph.initializers["c.weight"].const_value = ir.Tensor(weight.astype(np.float32), name="c.weight")
    x = np.random.default_rng(0).normal(size=(2, 2, 7)).astype(np.float32)
    np.testing.assert_allclose(run(model, x=x)["y"], run(merged, x=x)["y"], rtol=1e-5, atol=1e-5)
    assert not np.allclose(run(model, x=x)["y"], output_of(body, x=x), atol=0.1)


def test_branch_of_convolution_has_names_and_unchanged_pair() -> None:
    model = a_graph(CONVOLUTION.replace("ATTRIBUTES", "strides = [1]"))
    before = contents(model)
    with_nodes(model, an_adapter({"c": CONVOLUTION_PAIR}))
    assert before.items() < contents(model).items()
    assert [node.name for node in model.graph] == [
        "n", "/c/lora_A/Conv", "/c/lora_B/Conv", "/c/lora_B/Add", "/c/lora_magnitude_vector/Mul",
        "/c/lora_magnitude_vector/Reshape", "/c/lora_magnitude_vector/Add",
    ]  # fmt: skip
    assert np.array_equal(stored(model, "c.lora_A.weight"), CONVOLUTION_PAIR.a)
    assert np.array_equal(stored(model, "c.lora_B.weight"), 0.5 * CONVOLUTION_PAIR.b)
    assert stored(model, "c.lora_magnitude_vector.weight").shape == (3, 1)
    (output,) = model.graph.outputs
    assert (output.name, str(output.shape)) == ("y", "[N,3,M]")


TWO_DTYPES = """
g (float[N,3] x, float16[N,3] h) => (float[N,2] y, float16[N,2] z)
<float[3,2] m.weight = {1,4,2,5,3,6}>
{ half = Cast <to = 10> (m.weight)
  [first] z = MatMul(h, half)
  [second] y = MatMul(x, m.weight) }
"""


@pytest.mark.parametrize("mode", ["nodes", "inputs", "rows"])
def test_readers_in_two_dtypes_have_branches_in_both(mode: str) -> None:
    model = a_graph(TWO_DTYPES, modules={"first": "m", "second": "m"})
    found, pair = find_sites(model), LoraPair(a=PAIR.a, b=PAIR.b, scale=2.0, magnitude=[2, -3])
    assert {site.dtype for site in found.by_name["m.weight"]} == {"float16", "float32"}
    steps, fed = plan.make([an_adapter({"m": pair})], found.specs), dict[str, Any]()
    if mode == "nodes":
        insert_nodes(model, found, steps)
    elif mode == "rows":
        insert_rows(model, found, steps, batch="N")
        fed = {"adapter_ids": np.array([1, 1])}
    else:
        contract = insert_inputs(model, found, ["m.weight"], dora=["m.weight"])
        fed = onnx_adapter.input_values(
            contract, steps, "default", contract_dora_factors(model, contract, steps, "default")
        )
        assert {array.dtype for array in fed.values()} == {np.dtype(np.float32)}
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    total = np.float64([[1, 2, 3], [4, 5, 6]]) + pair.delta()
    expected = X @ (total * (pair.magnitude / np.linalg.norm(total, axis=1))[:, None]).T
    output = run(model, x=X, h=X.astype(np.float16), **fed)
    assert output["z"].dtype == np.float16
    np.testing.assert_allclose(output["y"], expected, rtol=1e-6)
    np.testing.assert_allclose(output["z"], expected, rtol=2e-3)


@pytest.mark.parametrize("mode", ["nodes", "inputs", "rows"])
def test_bfloat16_block_is_padded_in_float32(mode: str) -> None:
    # onnxruntime's CPU provider has no bfloat16, and no provider has a Pad in it: the reference evaluator runs it.
    model = a_graph("""
        g (float[N,3] x) => (float[N,4] y) <float[3,4] W = {1,4,2,5,3,6,1,2,3,4,5,6}>
        { [n] y = MatMul(x, W) }""")
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.dtype = ir.DataType.BFLOAT16
    value = model.graph.initializers["W"]
    value.const_value = ir.Tensor(value.const_value.numpy().astype(ml_dtypes.bfloat16), name="W")
    (site,) = find_readers(value)
    blocks = {
        name: (dataclasses.replace(site, name=name, block=block),)
        for name, block in {"q.weight": range(1), "k.weight": range(1, 4)}.items()
    }
    found = Sites(blocks, (), ())
    pair = LoraPair(a=PAIR.a, b=[[1], [2], [-1]], scale=2.0)
    steps, fed = plan.make([an_adapter({"k": pair})], found.specs), dict[str, Any]()
    if mode == "nodes":
        insert_nodes(model, found, steps)
    elif mode == "rows":
        insert_rows(model, found, steps, batch="N")
        fed = {"adapter_ids": np.array([1, 1])}
    else:
        fed = onnx_adapter.input_values(insert_inputs(model, found, ["k.weight"]), steps, "default")
    assert {node.op_type: str(node.inputs[0].dtype) for node in model.graph}["Pad"] == "FLOAT"
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    output = evaluated(model, x=X.astype(ml_dtypes.bfloat16), **fed)
    weight = np.float32([[1, 3, 3], [4, 6, 4], [2, 1, 5], [5, 2, 6]])
    weight[1:] += pair.delta()
    assert np.array_equal(output.astype(np.float32), X @ weight.T)
