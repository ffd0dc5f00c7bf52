"""Finding the weights of a graph: shapes, layouts, subgraphs, and exported models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
import pytest
from torch import nn

from lora_export import plan
from lora_export.errors import InputRefused, MatchError
from lora_export.graph.exporter_names import FOLDED_FROM
from lora_export.graph.find_sites import find_sites
from lora_export.graph.site import NameSource
from lora_export.lora import LoraPair
from lora_export.plan import Layout
from support.content_graphs import GEMM, OTHER, WEIGHT, base_checkpoint, product_graph
from support.exported_models import EVERY_MODEL, exported
from support.found_sites import layouts, named_by, specs
from support.graphs import a_graph, an_adapter
from support.small_graphs import a_matmul


def test_matmul_under_its_own_name_keeps_stored_shape() -> None:
    found = find_sites(a_matmul("h.0.attn.c_attn.weight"))
    assert layouts(found) == {"h.0.attn.c_attn.weight": ((2, 3), Layout.IN_OUT)}
    assert specs(found)["h.0.attn.c_attn.weight"].matrix == (3, 2)


def test_folded_weight_has_shape_of_parameter() -> None:
    found = find_sites(a_matmul("val_49", W="encoder.query.weight"))
    assert layouts(found) == {"encoder.query.weight": ((3, 2), Layout.OUT_IN)}
    assert named_by(found) == {"encoder.query.weight": NameSource.FOLDED_FROM}
    assert found.linear[0].layout is Layout.IN_OUT


def test_weight_behind_transpose_has_layout_of_parameter() -> None:
    model = a_graph("""
        g (float[N,2] x) => (float[N,3] y)
        <float[3,2] m.weight = {1,2,3,4,5,6}>
        { [t] w = Transpose <perm = [1, 0]> (m.weight)
          [n] y = MatMul(x, w) }""")
    found = find_sites(model)
    assert layouts(found) == {"m.weight": ((3, 2), Layout.OUT_IN)}
    assert [(site.node.name, site.behind_transpose) for site in found.linear] == [("n", True)]


@pytest.mark.parametrize(("attributes", "layout"), [("", Layout.IN_OUT), ("<transB = 1>", Layout.OUT_IN)])
def test_transb_determines_layout_of_gemm_weight(attributes: str, layout: Layout) -> None:
    model = a_graph(f"""
        g (float[N,2] x) => (float[N,2] y)
        <float[2,2] m.weight = {{1,2,3,4}}, float[2] m.bias = {{5,6}}>
        {{ [n] y = Gemm {attributes} (x, m.weight, m.bias) }}""")
    assert layouts(find_sites(model)) == {"m.weight": ((2, 2), layout), "m.bias": ((2,), Layout.OTHER)}


@pytest.mark.parametrize("use", ["Mul(x, m.weight)", "Gemm(m.weight, x)", "Gemm(x, x, m.weight)"])
def test_matrix_of_other_operators_is_no_linear_weight(use: str) -> None:
    model = a_graph(f"""
        g (float[2,2] x) => (float[2,2] y)
        <float[2,2] m.weight = {{1,2,3,4}}>
        {{ [n] y = {use} }}""")
    assert layouts(find_sites(model)) == {"m.weight": ((2, 2), Layout.OTHER)}


def test_integer_tensors_are_no_weights() -> None:
    model = a_graph("""
        g (int64[2,2] x) => (int64[2,2] y)
        <int64[2,2] m.weight = {1,2,3,4}>
        { [n] y = MatMul(x, m.weight) }""")
    assert not find_sites(model).specs


def test_unnamed_layer_is_listed_with_naming_attempts() -> None:
    text = str(find_sites(a_matmul("val_1")))
    assert "1 linear layer: none with a name" in text
    assert (
        "MatMul `n`: no certain name (tried its initializer `val_1`, folded from nothing, its module unknown)" in text
    )


def test_adapter_of_unnamed_layer_is_a_misfit() -> None:
    pair = LoraPair(a=[[1, 2]], b=[[1], [2], [3]], scale=1.0)
    with pytest.raises(MatchError, match=r"no weight for encoder.query"):
        plan.make([an_adapter({"encoder.query": pair})], find_sites(a_matmul("val_1")).specs)


@pytest.mark.parametrize(("outer", "inner"), [("{}", ""), ("", "{}")], ids=["captured", "its own"])
def test_layer_in_subgraph_is_found(outer: str, inner: str) -> None:
    weight = "<float[2,2] fc.weight = {1,2,3,4}>"
    model = a_graph(f"""
        g (float[N,2] x, bool c) => (float[N,2] y)
        {outer.format(weight)}
        {{ y = If (c) <
            then_branch = t () => (float[N,2] a) {inner.format(weight)} {{ [inner] a = MatMul(x, fc.weight) }},
            else_branch = e () => (float[N,2] b) {{ [other] b = Identity(x) }}> }}""")
    found = find_sites(model)
    assert [site.node.name for site in found.by_name["fc.weight"]] == ["inner"]
    assert not found.notes


@EVERY_MODEL
def test_every_parameter_of_export_is_found_with_its_shape(name: str) -> None:
    made = exported(name)
    found = specs(find_sites(made.graph))
    for parameter, tensor in made.module.named_parameters(remove_duplicate=False):
        assert found[parameter].shape == tuple(tensor.shape)
        assert found[parameter].dtype == "float32"
        if tensor.ndim > 1:
            is_embedding = isinstance(made.module.get_submodule(parameter.rpartition(".")[0]), nn.Embedding)
            assert found[parameter].layout is (Layout.EMBEDDING if is_embedding else Layout.OUT_IN)


@EVERY_MODEL
def test_layers_keep_names_when_optimiser_merges_equal_tensors(name: str) -> None:
    made = exported(name)
    before = {spec.name: spec for spec in find_sites(made.graph).specs if spec.layout is not Layout.OTHER}
    count = len(made.graph.graph.initializers)
    onnxscript.optimizer.optimize_ir(made.graph)
    assert len(made.graph.graph.initializers) < count
    after = {spec.name: spec for spec in find_sites(made.graph).specs if spec.layout is not Layout.OTHER}
    assert after == before


@EVERY_MODEL
def test_export_without_metadata_keeps_names(name: str) -> None:
    made = exported(name)
    linear = {site.name for site in find_sites(made.graph).linear}
    for node in made.graph.graph:
        node.metadata_props.clear()
    for value in made.graph.graph.initializers.values():
        value.metadata_props.clear()
    assert {site.name for site in find_sites(made.graph).linear} == linear - {"lm_head.weight"}


# --- What is not read: matrices in other operators, and unsupported quantisation ---


@pytest.mark.parametrize(
    ("body", "note"),
    [
        ("y = m.MatMulNBits <K = 2, N = 2> (x, W, x)", "1 MatMulNBits node holds quantised weights"),
        ("y = m.FusedThing (x, W)", "1 matrix is read by FusedThing"),
        ("y = Gemm (W, x)", "1 matrix is read by Gemm as its first operand"),
        ("q = Cast <to = 3> (W) z = Cast <to = 1> (q) y = MatMul (x, z)", "1 matrix is read by Cast"),
    ],
)
def test_weights_that_are_not_read_are_noted(body: str, note: str) -> None:
    model = ir.from_onnx_text(f"""
        <ir_version: 10, opset_import: ["" : 20, "m" : 1]>
        g (float[2,2] x) => (float[2,2] y) <float[2,2] W = {{1,2,3,4}}> {{ {body} }}""")
    assert any(note in line for line in find_sites(model).notes)


# --- Names from a base checkpoint: preferences, contradictions, prefixes and tied heads. ---


def test_equal_tensors_name_nothing_and_are_listed(tmp_path: Path) -> None:
    found = find_sites(product_graph(WEIGHT.T), base_checkpoint(tmp_path, {"a.weight": WEIGHT, "b.weight": WEIGHT}))
    assert not found.by_name
    assert "its content, which equals a.weight and b.weight" in str(found)


@pytest.mark.parametrize("module", ["b", "model.b"])
def test_equal_tensors_are_decided_by_module(tmp_path: Path, module: str) -> None:
    weight = product_graph(WEIGHT.T, module=module)
    found = find_sites(weight, base_checkpoint(tmp_path, {"a.weight": WEIGHT, "b.weight": WEIGHT}))
    assert list(found.by_name) == ["b.weight"]


@pytest.mark.parametrize(
    ("origins", "named"), [(["b.weight", "val_3"], ["b.weight"]), (["a.weight", "b.weight"], []), (["val_3"], [])]
)
def test_equal_tensors_are_decided_by_folded_name(tmp_path: Path, origins: list[str], named: list[str]) -> None:
    model = product_graph(WEIGHT.T)
    model.graph.initializers["W"].metadata_props[FOLDED_FROM] = repr(origins)
    found = find_sites(model, base_checkpoint(tmp_path, {"a.weight": WEIGHT, "b.weight": WEIGHT}))
    assert list(found.by_name) == named


def test_tied_head_does_not_get_name_of_embedding(tmp_path: Path) -> None:
    """An adapter of the embedding changes the lookup and not the head."""
    table = np.float32([[1, 2], [3, 4], [5, 6]])
    body = """
        g (int64[N] ids) => (float[N,3] y)
        <float[3,2] E = {1,2,3,4,5,6}, float[2,3] W = {1,3,5,2,4,6}>
        { [e] x = Gather(E, ids)
          [n] y = MatMul(x, W) }"""
    checkpoint = base_checkpoint(tmp_path, {"embed.weight": table})
    found = find_sites(a_graph(body), checkpoint)
    assert {name: [site.node.name for site in sites] for name, sites in found.by_name.items()} == {
        "embed.weight": ["e"]
    }
    assert "its content, which equals embed.weight" in str(found)
    named = find_sites(a_graph(body, modules={"n": "head"}), checkpoint)
    assert {name: [site.node.name for site in sites] for name, sites in named.by_name.items()} == {
        "head.weight": ["n"], "embed.weight": ["e"],
    }  # fmt: skip


def test_name_of_other_content_is_refused_with_both_names(tmp_path: Path) -> None:
    checkpoint = base_checkpoint(tmp_path, {"a.weight": WEIGHT, "b.weight": OTHER})
    with pytest.raises(InputRefused, match=r"MatMul `n`: a.weight by name_scope, b.weight by content"):
        find_sites(product_graph(OTHER.T, module="a"), checkpoint)


def test_changed_weight_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"a.weight by initializer, no tensor by content"):
        find_sites(product_graph(WEIGHT + 1, GEMM, name="a.weight"), base_checkpoint(tmp_path, {"a.weight": WEIGHT}))


def test_name_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"a.weight by initializer, no tensor by content"):
        find_sites(
            product_graph(WEIGHT, GEMM, name="a.weight"), base_checkpoint(tmp_path, {"a.weight": np.ones((4, 4))})
        )


@pytest.mark.parametrize(("graph_name", "base_name"), [("model.a.weight", "a.weight"), ("a.weight", "model.a.weight")])
def test_name_gets_prefix_of_base(tmp_path: Path, graph_name: str, base_name: str) -> None:
    found = find_sites(
        product_graph(WEIGHT, GEMM, name=graph_name), base_checkpoint(tmp_path, {base_name: WEIGHT, "b.weight": OTHER})
    )
    assert {name: site.named_by for name, (site,) in found.by_name.items()} == {base_name: NameSource.INITIALIZER}


def test_missing_name_gets_prefix_of_others(tmp_path: Path) -> None:
    """A checkpoint lacks a tied head, whose adapter has the prefix of the other layers."""
    model = a_graph(
        """
        g (float[N,3] x) => (float[N,2] y)
        <float[2,3] wrapped.a.weight = {1,2,3,4,5,6}, float[2,2] wrapped.head.weight = {1,3,5,7}>
        { h = Gemm <transB = 1> (x, wrapped.a.weight)
          y = Gemm <transB = 1> (h, wrapped.head.weight) }"""
    )
    assert list(find_sites(model, base_checkpoint(tmp_path, {"a.weight": WEIGHT})).by_name) == [
        "a.weight",
        "head.weight",
    ]
    assert list(find_sites(model, base_checkpoint(tmp_path, {"model.wrapped.a.weight": WEIGHT})).by_name) == [
        "model.wrapped.a.weight", "model.wrapped.head.weight",
    ]  # fmt: skip


def test_content_names_weight_that_base_calls_otherwise(tmp_path: Path) -> None:
    found = find_sites(
        product_graph(WEIGHT, GEMM, name="layers.0.fc.weight"), base_checkpoint(tmp_path, {"h.0.mlp.weight": WEIGHT})
    )
    assert {name: site.named_by for name, (site,) in found.by_name.items()} == {"h.0.mlp.weight": NameSource.CONTENT}


def test_missing_weight_keeps_name_with_note(tmp_path: Path) -> None:
    found = find_sites(product_graph(OTHER, GEMM, name="head.weight"), base_checkpoint(tmp_path, {"a.weight": WEIGHT}))
    assert list(found.by_name) == ["head.weight"]
    assert any("head.weight: base.safetensors has neither this name nor this content" in note for note in found.notes)
