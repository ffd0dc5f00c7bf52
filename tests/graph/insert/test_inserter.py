"""Readers of a weight beside which a branch can be inserted, and readers beside which it cannot."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest

from lora_export import plan
from lora_export.errors import InputRefused
from lora_export.graph.find_sites import Sites, find_sites
from lora_export.graph.insert.adapter_nodes import insert_nodes
from lora_export.lora import LoraPair
from lora_export.plan import Layout
from support.graphs import a_graph, an_adapter, run, stored
from support.insertion import CONVOLUTION, CONVOLUTION_PAIR, EMBEDDING, EMBEDDING_PAIR, with_nodes
from support.one_weight_graphs import WEIGHT, X, graph_reading
from support.small_graphs import DELTA, GEMM, PAIR, TIED_TABLE

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
    ("model", "message"),
    [(a_graph(TIED, modules={"e": "", "n": ""}), "Gemm"), (ir.from_onnx_text(INSIDE), "look")],
    ids=["tied", "in a function"],
)
def test_embedding_adapter_beside_other_reader_is_refused(model: ir.Model, message: str) -> None:
    found = find_sites(model)
    specs = [dataclasses.replace(spec, shape=(5, 2), layout=plan.Layout.EMBEDDING) for spec in found.specs]
    with pytest.raises(InputRefused, match=rf"words\.weight is read by {message}, beside which no branch"):
        insert_nodes(model, found, plan.make([an_adapter({"words": EMBEDDING_PAIR})], specs))


def test_embedding_adapter_beside_part_of_table_is_refused() -> None:
    model = a_graph(EMBEDDING)
    (site,) = find_sites(model).by_name["words.weight"]
    found = Sites({"small.weight": (dataclasses.replace(site, block=range(2)),)}, (), ())
    with pytest.raises(InputRefused, match=r"small\.weight is read by Gather, beside which no branch"):
        pair = LoraPair(a=[[1, 2]], b=[[1], [2]], scale=1.0, embedding=True)
        insert_nodes(model, found, plan.make([an_adapter({"small": pair})], found.specs))


def test_grouped_convolution_is_refused_by_name() -> None:
    model = a_graph(CONVOLUTION.replace("ATTRIBUTES", "group = 3").replace("[N,2,L]", "[N,6,L]"))
    with pytest.raises(InputRefused, match=r"c\.weight: a pair has no meaning beside a convolution of 3 groups"):
        with_nodes(model, an_adapter({"c": CONVOLUTION_PAIR}))


def test_convolution_fused_with_an_unknown_activation_is_refused_by_name() -> None:
    body = CONVOLUTION.replace("Conv <ATTRIBUTES>", 'com.microsoft.FusedConv <activation = "Swishy">')
    model = a_graph(body.replace("com.microsoft.FusedConv", "FusedConv"))
    model.graph[0].domain, model.opset_imports["com.microsoft"] = "com.microsoft", 1
    with pytest.raises(InputRefused, match=r"c\.weight is read by FusedConv, beside which no branch can be inserted"):
        with_nodes(model, an_adapter({"c": CONVOLUTION_PAIR}))


def test_pair_on_whole_tensor_of_adapter_is_inserted_beside_it() -> None:
    adapter = an_adapter({"m": PAIR}, replaced={"m.weight": np.ones((2, 3), np.float32)})
    model, replaced = a_graph(GEMM), an_adapter({}, replaced=adapter.replaced)
    with_nodes(model, adapter)
    base = a_graph(GEMM)
    with_nodes(base, replaced)
    assert np.array_equal(run(model, x=X)["y"] - run(base, x=X)["y"], X @ PAIR.delta().T)
    assert np.array_equal(stored(model, "m.weight"), np.ones((2, 3)))


def test_dora_pair_on_whole_tensor_of_adapter_is_refused() -> None:
    pair = dataclasses.replace(PAIR, magnitude=np.ones(2))
    adapter = an_adapter({"m": pair}, replaced={"m.weight": np.ones((2, 3), np.float32)})
    with pytest.raises(InputRefused, match=r"default: m\.weight: the adapter has a new table and a DoRA pair"):
        with_nodes(a_graph(GEMM), adapter)


def test_weight_that_is_also_an_embedding_is_refused() -> None:
    model = a_graph(TIED_TABLE, modules={"e": "", "n": ""})
    with pytest.raises(InputRefused, match=r"tied.weight is read by Gather"):
        with_nodes(model, an_adapter({"tied": LoraPair(a=[[1, 0]], b=[[0], [0], [1]], scale=1.0)}))


LINEAR_FUNCTION = """<domain: "own", opset_import: ["" : 20]>
    linear (x, w) => (y) { v = Transpose <perm = [1, 0]> (w) y = MatMul(x, v) }"""


def test_branch_beside_cast_weight_has_dtype_of_product() -> None:
    model = graph_reading("c = Cast <to = 1> (W) y = MatMul(x, c)", Layout.IN_OUT)
    model.graph.initializers["m.weight"].const_value = ir.Tensor(WEIGHT.T.astype(np.float16), name="m.weight")
    model.graph.initializers["m.weight"].dtype = ir.DataType.FLOAT16
    found = find_sites(model)
    insert_nodes(model, found, plan.make([an_adapter({"m": PAIR})], found.specs))
    np.testing.assert_allclose(run(model, x=X)["y"], X @ (WEIGHT + DELTA).T)


OBSTACLES = {
    "a function": ("y = own.linear(x, W)", Layout.OUT_IN, LINEAR_FUNCTION, "the function linear"),
    "first": ("t = Transpose(x) z = MatMul(W, t) y = Transpose(z)", Layout.OUT_IN, "", "MatMul as its first operand"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "layout", "functions", "message"), OBSTACLES.values(), ids=OBSTACLES.keys())
def test_branch_beside_other_than_product_is_refused(body: str, layout: Layout, functions: str, message: str) -> None:
    model = graph_reading(body, layout, functions=functions)
    found = find_sites(model)
    with pytest.raises(InputRefused, match=f"m.weight is read by {message}, beside which no branch can be inserted"):
        insert_nodes(model, found, plan.make([an_adapter({"m": PAIR})], found.specs))
