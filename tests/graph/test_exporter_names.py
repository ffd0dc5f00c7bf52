"""Names of weights from what exporters record: the order of the records, and readers of one tensor."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from lora_export.graph.exporter_names import FOLDED_FROM, INPUT_KIND
from lora_export.graph.find_sites import find_sites
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.graph.site import NameSource
from lora_export.models import export
from lora_export.plan import Layout
from support.exported_models import EVERY_MODEL, Mlp, exported, inputs
from support.found_sites import layouts, named_by
from support.graphs import a_graph, run
from support.one_weight_graphs import graph_reading
from support.small_graphs import LINEAR, a_matmul


def test_name_of_initializer_is_tried_first() -> None:
    found = find_sites(a_matmul("a.weight", "/d/MatMul", module="c", W="b.weight"))
    assert named_by(found) == {"a.weight": NameSource.INITIALIZER}


def test_name_without_dot_counts_if_exporter_marks_parameter() -> None:
    model = a_matmul("projection")
    assert not find_sites(model).specs
    model.graph.initializers["projection"].metadata_props[INPUT_KIND] = "PARAMETER"
    assert named_by(find_sites(model)) == {"projection": NameSource.INITIALIZER}


def test_folded_name_is_tried_before_module() -> None:
    assert named_by(find_sites(a_matmul("val_1", "/d/MatMul", module="c", W="b.weight"))) == {
        "b.weight": NameSource.FOLDED_FROM
    }


def test_module_scope_is_tried_before_node_name() -> None:
    assert named_by(find_sites(a_matmul("val_1", "/d/MatMul", module="c"))) == {"c.weight": NameSource.NAME_SCOPE}


def test_node_name_is_tried_last() -> None:
    found = find_sites(a_matmul("onnx::MatMul_812", "/encoder/layer.0/attention/self/query/MatMul"))
    assert named_by(found) == {"encoder.layer.0.attention.self.query.weight": NameSource.NODE_NAME}
    assert layouts(found) == {"encoder.layer.0.attention.self.query.weight": ((3, 2), Layout.OUT_IN)}


@pytest.mark.parametrize(
    "origins", ["['a.weight', 'val_3']", "['val_3']", "[]", "a.weight", "[" * 10_000, "[1]", "__import__('os')"]
)
def test_ambiguous_or_invalid_origins_name_nothing(origins: str) -> None:
    model = a_matmul("val_1", W="a")
    model.graph.initializers["val_1"].metadata_props[FOLDED_FROM] = origins
    found = find_sites(model)
    assert not found.specs
    assert [site.node.name for site in found.unnamed] == ["n"]


SHARED = """
g (float[N,2] x) => (float[N,2] y)
<float[2,2] layers.0.fc.weight = {1,2,3,4}>
{ [first] h = MatMul(x, layers.0.fc.weight)
  [second] y = MatMul(h, layers.0.fc.weight) }
"""


def test_module_called_twice_is_one_parameter_with_two_sites() -> None:
    found = find_sites(a_graph(SHARED, modules={"first": "layers.0.fc", "second": "layers.0.fc@1"}))
    assert [site.node.name for site in found.by_name["layers.0.fc.weight"]] == ["first", "second"]
    assert len(found.specs) == 1


def test_merged_equal_tensors_are_named_by_their_modules() -> None:
    found = find_sites(a_graph(SHARED, modules={"first": "layers.0.fc", "second": "layers.1.fc"}))
    assert named_by(found) == {
        "layers.0.fc.weight": NameSource.INITIALIZER,
        "layers.1.fc.weight": NameSource.NAME_SCOPE,
    }
    assert {name: sites[0].node.name for name, sites in found.by_name.items()} == {
        "layers.0.fc.weight": "first", "layers.1.fc.weight": "second",
    }  # fmt: skip


def test_reader_in_another_module_keeps_rest_of_name() -> None:
    """nn.MultiheadAttention itself reads the weight of its out_proj."""
    body = SHARED.replace("layers.0.fc.weight", "a.out_proj.weight")
    found = find_sites(a_graph(body, modules={"first": "a", "second": "b"}))
    assert list(found.by_name) == ["a.out_proj.weight", "b.out_proj.weight"]


def test_root_module_reads_weight_of_its_owner() -> None:
    found = find_sites(a_graph(SHARED, modules={"first": "layers.0.fc", "second": ""}))
    assert [site.node.name for site in found.by_name["layers.0.fc.weight"]] == ["first", "second"]


@pytest.mark.parametrize("modules", [{}, {"first": "layers.0.fc"}, {"first": "layers.1.fc", "second": "layers.2.fc"}])
def test_readers_without_owner_stay_unnamed(modules: dict[str, str]) -> None:
    found = find_sites(a_graph(SHARED, modules=modules))
    assert not found.specs
    assert [site.node.name for site in found.unnamed] == ["first", "second"]


def test_tensor_read_as_weight_and_bias_is_unnamed() -> None:
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


def test_equal_copies_of_parameter_share_its_name() -> None:
    found = find_sites(a_graph(TWO_COPIES % "1,2,3,4", modules={"first": "fc", "second": "fc"}))
    assert [site.value.name for site in found.by_name["fc.weight"]] == ["val_1", "val_2"]


def test_different_tensors_with_one_name_lose_it() -> None:
    found = find_sites(a_graph(TWO_COPIES % "1,2,3,5", modules={"first": "fc", "second": "fc"}))
    assert not found.specs
    assert len(found.unnamed) == 2


def test_matrix_read_in_two_layouts_is_unnamed() -> None:
    model = a_graph(
        """
        g (float[N,2] x) => (float[N,2] y)
        <float[2,2] fc.weight = {1,2,3,4}>
        { [first] h = Gemm(x, fc.weight)
          [second] y = Gemm <transB = 1> (h, fc.weight) }""",
        modules={"first": "fc", "second": "fc"},
    )
    assert not find_sites(model).specs


def test_names_of_genai_builder_are_no_parameters() -> None:
    """onnxruntime-genai calls the attention of every model `attn`."""
    model = graph_reading("y = MatMul(x, W)", Layout.IN_OUT)
    model.graph.initializers["m.weight"].name = "model.layers.0.attn.o_proj.MatMul.weight"
    model.graph[0].name = "/model/layers.0/attn/o_proj/MatMul"
    found = find_sites(model)
    assert not found.by_name
    assert len(found.unnamed) == 1


# --- Notes of exporters, which a saved graph does not contain, and names, which it does. ---


@EVERY_MODEL
def test_saved_export_contains_names_and_no_machine_paths(tmp_path: Path, name: str) -> None:
    made = exported(name)
    before = find_sites(made.graph).specs
    feeds = {key: value.numpy() for key, value in inputs(name, 3, 5).items()}
    expected = run(made.graph, **feeds)
    (path,) = save_graph(made.graph, tmp_path, "model.onnx")
    content = path.read_bytes()
    for trace in (
        b"site-packages",
        b"graphs.py",
        b'File "',
        str(Path.cwd()).encode(),
        str(Path.home()).encode() + b"/",
    ):
        assert trace not in content
    again = load_graph(path)
    assert find_sites(again).specs == before
    assert all(np.array_equal(value, expected[key]) for key, value in run(again, **feeds).items())


@pytest.mark.exports
def test_a_file_of_an_export_has_no_stack_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "WITHOUT_STACK_TRACES", contextlib.nullcontext())  # as with PyTorch 2.11
    graph = export.to_onnx(Mlp().eval(), inputs("mlp"), axes={})
    before = ir.to_proto(graph).SerializeToString()
    (path,) = save_graph(graph, tmp_path, "model.onnx")
    for trace in (b'File "', b"exported_models.py", b"torch/nn"):
        assert trace in before and trace not in path.read_bytes()


def test_other_notes_stay_except_stack_traces(tmp_path: Path) -> None:
    model = a_graph(LINEAR)
    node = model.graph[0]
    node.metadata_props["author"] = "somebody"
    node.metadata_props["trace"] = 'File "/home/somebody/model.py", line 3, in forward'
    node.doc_string = 'File "/home/somebody/model.py", line 3'
    model.graph[1].doc_string = "adds the bias"
    (path,) = save_graph(model, tmp_path, "model.onnx")
    again = load_graph(path).graph
    assert dict(again[0].metadata_props) == {"author": "somebody"}
    assert [node.doc_string for node in again] == [None, "adds the bias", None]
