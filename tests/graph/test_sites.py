"""Names of weights in graphs: which layer of names answers, and what stays nobody's."""

from __future__ import annotations

import onnx_ir as ir
import onnxscript.optimizer
import pytest
from torch import nn

from lora_export import plan
from lora_export.errors import MatchError
from lora_export.graph.exporter_metadata import FOLDED_FROM, INPUT_KIND
from lora_export.graph.find_sites import Sites, find_sites
from lora_export.graph.site import NameSource
from lora_export.lora import LoraPair
from lora_export.plan import Layout, TensorSpec
from support.exported_models import EVERY_MODEL, exported
from support.graphs import a_graph, an_adapter


def specs(found: Sites) -> dict[str, TensorSpec]:
    return {spec.name: spec for spec in found.specs}


def hows(found: Sites) -> dict[str, NameSource]:
    return {site.name: site.named_by for site in found.linear}


def layouts(found: Sites) -> dict[str, tuple[tuple[int, ...], Layout]]:
    return {name: (spec.shape, spec.layout) for name, spec in specs(found).items()}


MATMUL = """
g (float[N,2] x) => (float[N,3] y)
<float[2,3] {name} = {{1,2,3,4,5,6}}>
{{ [{node}] y = MatMul(x, {name}) }}
"""


def a_matmul(name: str, node: str = "n", *, module: str = "", **origins: str) -> ir.Model:
    model = a_graph(MATMUL.format(name="W", node="n"), modules={"n": module} if module else None, **origins)
    model.graph.initializers["W"].name = name
    model.graph[0].name = node
    return model


# --- how matrices lie ---


def test_a_matmul_under_its_own_name_keeps_the_stored_shape_as_in_conv1d() -> None:
    found = find_sites(a_matmul("h.0.attn.c_attn.weight"))
    assert layouts(found) == {"h.0.attn.c_attn.weight": ((2, 3), Layout.IN_OUT)}
    assert specs(found)["h.0.attn.c_attn.weight"].matrix == (3, 2)


def test_a_folded_weight_has_the_parameters_shape() -> None:
    found = find_sites(a_matmul("val_49", W="encoder.query.weight"))
    assert layouts(found) == {"encoder.query.weight": ((3, 2), Layout.OUT_IN)}
    assert hows(found) == {"encoder.query.weight": NameSource.FOLDED_FROM}
    assert found.linear[0].layout is Layout.IN_OUT


def test_a_weight_behind_a_transpose_lies_as_the_parameter_does() -> None:
    model = a_graph("""
        g (float[N,2] x) => (float[N,3] y)
        <float[3,2] m.weight = {1,2,3,4,5,6}>
        { [t] w = Transpose <perm = [1, 0]> (m.weight)
          [n] y = MatMul(x, w) }""")
    found = find_sites(model)
    assert layouts(found) == {"m.weight": ((3, 2), Layout.OUT_IN)}
    assert [(site.node.name, site.behind_transpose) for site in found.linear] == [("n", True)]


@pytest.mark.parametrize(("attributes", "layout"), [("", Layout.IN_OUT), ("<transB = 1>", Layout.OUT_IN)])
def test_a_gemms_weight_lies_as_its_attribute_says(attributes: str, layout: Layout) -> None:
    model = a_graph(f"""
        g (float[N,2] x) => (float[N,2] y)
        <float[2,2] m.weight = {{1,2,3,4}}, float[2] m.bias = {{5,6}}>
        {{ [n] y = Gemm {attributes} (x, m.weight, m.bias) }}""")
    assert layouts(find_sites(model)) == {"m.weight": ((2, 2), layout), "m.bias": ((2,), Layout.OTHER)}


@pytest.mark.parametrize("use", ["Mul(x, m.weight)", "Gemm(m.weight, x)", "Gemm(x, x, m.weight)"])
def test_a_matrix_that_no_linear_layer_reads_is_nobodys_target(use: str) -> None:
    model = a_graph(f"""
        g (float[2,2] x) => (float[2,2] y)
        <float[2,2] m.weight = {{1,2,3,4}}>
        {{ [n] y = {use} }}""")
    assert layouts(find_sites(model)) == {"m.weight": ((2, 2), Layout.OTHER)}


def test_whole_numbers_are_no_weights() -> None:
    model = a_graph("""
        g (int64[2,2] x) => (int64[2,2] y)
        <int64[2,2] m.weight = {1,2,3,4}>
        { [n] y = MatMul(x, m.weight) }""")
    assert not find_sites(model).specs


# --- layers of names, in their order ---


def test_the_initializers_own_name_answers_before_the_others() -> None:
    found = find_sites(a_matmul("a.weight", "/d/MatMul", module="c", W="b.weight"))
    assert hows(found) == {"a.weight": NameSource.INITIALIZER}


def test_a_name_without_a_dot_is_a_parameters_where_the_exporter_says_so() -> None:
    model = a_matmul("projection")
    assert not find_sites(model).specs
    model.graph.initializers["projection"].metadata_props[INPUT_KIND] = "PARAMETER"
    assert hows(find_sites(model)) == {"projection": NameSource.INITIALIZER}


def test_a_lost_name_is_found_in_what_was_folded_before_the_module() -> None:
    assert hows(find_sites(a_matmul("val_1", "/d/MatMul", module="c", W="b.weight"))) == {
        "b.weight": NameSource.FOLDED_FROM
    }


def test_the_module_of_a_node_answers_before_the_nodes_name() -> None:
    assert hows(find_sites(a_matmul("val_1", "/d/MatMul", module="c"))) == {"c.weight": NameSource.NAME_SCOPE}


def test_the_nodes_name_answers_last() -> None:
    found = find_sites(a_matmul("onnx::MatMul_812", "/encoder/layer.0/attention/self/query/MatMul"))
    assert hows(found) == {"encoder.layer.0.attention.self.query.weight": NameSource.NODE_NAME}
    assert layouts(found) == {"encoder.layer.0.attention.self.query.weight": ((3, 2), Layout.OUT_IN)}


@pytest.mark.parametrize(
    "origins", ["['a.weight', 'val_3']", "['val_3']", "[]", "a.weight", "[" * 10_000, "[1]", "__import__('os')"]
)
def test_origins_that_name_no_single_parameter_name_nothing(origins: str) -> None:
    model = a_matmul("val_1", W="a")
    model.graph.initializers["val_1"].metadata_props[FOLDED_FROM] = origins
    found = find_sites(model)
    assert not found.specs
    assert [site.node.name for site in found.unnamed] == ["n"]


def test_a_layer_without_a_name_is_listed_with_what_was_tried() -> None:
    text = str(find_sites(a_matmul("val_1")))
    assert "1 linear layers: none with a name" in text
    assert (
        "MatMul `n`: no certain name (tried its initializer `val_1`, folded from nothing, its module unknown)" in text
    )


def test_an_adapter_for_a_layer_without_a_name_misfits() -> None:
    pair = LoraPair(a=[[1, 2]], b=[[1], [2], [3]], scale=1.0)
    with pytest.raises(MatchError, match=r"no weight for encoder.query"):
        plan.make([an_adapter({"encoder.query": pair})], find_sites(a_matmul("val_1")).specs)


# --- one tensor, several readers ---

SHARED = """
g (float[N,2] x) => (float[N,2] y)
<float[2,2] layers.0.fc.weight = {1,2,3,4}>
{ [first] h = MatMul(x, layers.0.fc.weight)
  [second] y = MatMul(h, layers.0.fc.weight) }
"""


def test_a_module_that_is_called_twice_is_one_parameter_at_two_places() -> None:
    found = find_sites(a_graph(SHARED, modules={"first": "layers.0.fc", "second": "layers.0.fc@1"}))
    assert [site.node.name for site in found.by_name["layers.0.fc.weight"]] == ["first", "second"]
    assert len(found.specs) == 1


def test_equal_tensors_that_became_one_are_told_apart_by_their_modules() -> None:
    found = find_sites(a_graph(SHARED, modules={"first": "layers.0.fc", "second": "layers.1.fc"}))
    assert hows(found) == {"layers.0.fc.weight": NameSource.INITIALIZER, "layers.1.fc.weight": NameSource.NAME_SCOPE}
    assert {name: there[0].node.name for name, there in found.by_name.items()} == {
        "layers.0.fc.weight": "first", "layers.1.fc.weight": "second",
    }  # fmt: skip


def test_a_parameter_that_another_modules_code_reads_keeps_what_stands_behind_the_owner() -> None:
    """nn.MultiheadAttention itself reads its out_proj's weight."""
    body = SHARED.replace("layers.0.fc.weight", "a.out_proj.weight")
    found = find_sites(a_graph(body, modules={"first": "a", "second": "b"}))
    assert list(found.by_name) == ["a.out_proj.weight", "b.out_proj.weight"]


def test_code_of_the_root_that_reads_a_modules_weight_reads_that_modules_weight() -> None:
    found = find_sites(a_graph(SHARED, modules={"first": "layers.0.fc", "second": ""}))
    assert [site.node.name for site in found.by_name["layers.0.fc.weight"]] == ["first", "second"]


@pytest.mark.parametrize("modules", [{}, {"first": "layers.0.fc"}, {"first": "layers.1.fc", "second": "layers.2.fc"}])
def test_readers_that_nobody_can_tell_apart_stay_unnamed(modules: dict[str, str]) -> None:
    found = find_sites(a_graph(SHARED, modules=modules))
    assert not found.specs
    assert [site.node.name for site in found.unnamed] == ["first", "second"]


def test_a_tensor_that_is_weight_and_bias_at_once_is_neither() -> None:
    model = a_graph(
        """
        g (float[N,2] x) => (float[N,2] y)
        <float[2] norm.weight = {1,1}>
        { [n] y = LayerNormalization(x, norm.weight, norm.weight) }""",
        modules={"n": "norm"},
    )
    assert not find_sites(model).specs


TWO_COPIES = """
g (float[N,2] x) => (float[N,2] y)
<float[2,2] val_1 = {1,2,3,4}, float[2,2] val_2 = {%s}>
{ [first] h = MatMul(x, val_1)
  [second] y = MatMul(h, val_2) }
"""


def test_two_copies_of_one_parameter_are_one_parameter() -> None:
    found = find_sites(a_graph(TWO_COPIES % "1,2,3,4", modules={"first": "fc", "second": "fc"}))
    assert [site.value.name for site in found.by_name["fc.weight"]] == ["val_1", "val_2"]


def test_two_tensors_that_claim_one_name_both_lose_it() -> None:
    found = find_sites(a_graph(TWO_COPIES % "1,2,3,5", modules={"first": "fc", "second": "fc"}))
    assert not found.specs
    assert len(found.unnamed) == 2


def test_a_matrix_that_is_read_both_ways_by_one_module_has_no_name() -> None:
    model = a_graph(
        """
        g (float[N,2] x) => (float[N,2] y)
        <float[2,2] fc.weight = {1,2,3,4}>
        { [first] h = Gemm(x, fc.weight)
          [second] y = Gemm <transB = 1> (h, fc.weight) }""",
        modules={"first": "fc", "second": "fc"},
    )
    assert not find_sites(model).specs


# --- what is not looked at is said ---


@pytest.mark.parametrize(("outer", "inner"), [("{}", ""), ("", "{}")], ids=["captured", "its own"])
def test_a_layer_inside_a_subgraph_is_found(outer: str, inner: str) -> None:
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


@pytest.mark.parametrize(
    ("body", "note"),
    [
        ("y = m.MatMulNBits <K = 2, N = 2> (x, W, x)", "1 MatMulNBits nodes hold quantised weights"),
        ("y = m.FusedThing (x, W)", "1 matrices are read by FusedThing"),
        ("y = Gemm (W, x)", "1 matrices are read by Gemm as its first operand"),
        ("q = Cast <to = 3> (W) z = Cast <to = 1> (q) y = MatMul (x, z)", "1 matrices are read by Cast"),
    ],
)
def test_what_is_not_looked_at_is_said(body: str, note: str) -> None:
    model = ir.from_onnx_text(f"""
        <ir_version: 10, opset_import: ["" : 20, "m" : 1]>
        g (float[2,2] x) => (float[2,2] y) <float[2,2] W = {{1,2,3,4}}> {{ {body} }}""")
    assert any(note in line for line in find_sites(model).notes)


# --- real exports ---


@EVERY_MODEL
def test_every_parameter_of_an_exported_module_is_found_with_its_shape(name: str) -> None:
    made = exported(name)
    found = specs(find_sites(made.graph))
    for parameter, tensor in made.module.named_parameters(remove_duplicate=False):
        assert found[parameter].shape == tuple(tensor.shape)
        assert found[parameter].dtype == "float32"
        if tensor.ndim > 1:
            looked_up = isinstance(made.module.get_submodule(parameter.rpartition(".")[0]), nn.Embedding)
            assert found[parameter].layout is (Layout.EMBEDDING if looked_up else Layout.OUT_IN)


@EVERY_MODEL
def test_an_optimised_graph_that_merged_equal_tensors_gives_each_layer_its_name_back(name: str) -> None:
    made = exported(name)
    before = {spec.name: spec for spec in find_sites(made.graph).specs if spec.layout is not Layout.OTHER}
    count = len(made.graph.graph.initializers)
    onnxscript.optimizer.optimize_ir(made.graph)
    assert len(made.graph.graph.initializers) < count
    after = {spec.name: spec for spec in find_sites(made.graph).specs if spec.layout is not Layout.OTHER}
    assert after == before


@EVERY_MODEL
def test_an_exported_graph_without_any_metadata_still_has_its_names(name: str) -> None:
    made = exported(name)
    linear = {site.name for site in find_sites(made.graph).linear}
    for node in made.graph.graph:
        node.metadata_props.clear()
    for value in made.graph.graph.initializers.values():
        value.metadata_props.clear()
    assert {site.name for site in find_sites(made.graph).linear} == linear - {"lm_head.weight"}
