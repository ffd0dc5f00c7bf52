"""Names by content: a base's tensors in a graph, as they are, turned, rounded, side by side; and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from lora_export import cli, plan
from lora_export.errors import InputRefused
from lora_export.graph.exporter_metadata import FOLDED_FROM
from lora_export.graph.find_sites import Sites, find_sites
from lora_export.graph.merge.fold import fold
from lora_export.graph.names import content_match
from lora_export.graph.onnx_file import writing
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.graph.site import NameSource, Site
from lora_export.lora import LoraPair
from lora_export.plan import Layout
from lora_export.weights.checkpoint import Checkpoint, open_checkpoint
from support.graphs import a_graph, an_adapter, run, stored
from support.handmade import base_file

WEIGHT = np.float32([[1, 2, 3], [4, 5, 6]])  # (out, in)
OTHER = np.float32([[7, 8, 9], [1, 0, 1]])
MATMUL = "[n] y = MatMul(x, W)"
GEMM = "[n] y = Gemm <transB = 1> (x, W)"


def base(folder: Path, tensors: Mapping[str, Any], dtype: Any = np.float32) -> Checkpoint:
    return open_checkpoint(base_file(folder / "base.safetensors", tensors, dtype))


def graph(weight: NDArray[Any], node: str = MATMUL, *, name: str = "W", module: str = "") -> ir.Model:
    """One product by a weight that lies as it is given."""
    rows, columns = weight.shape
    model = a_graph(
        f"""
        g (float[N,M] x) => (float[N,O] y)
        <float[{rows},{columns}] W = {{{",".join("0" * weight.size)}}}>
        {{ {node} }}""",
        modules={"n": module} if module else None,
    )
    value = model.graph.initializers["W"]
    value.const_value, value.name = ir.Tensor(weight, name=name), name
    return model


def only(found: Sites) -> Site:
    (site,) = (*found.linear, *found.unnamed)
    return site


# --- one weight ---


@pytest.mark.parametrize(
    ("stored_as", "node", "shape", "layout"),
    [(WEIGHT.T, MATMUL, (2, 3), Layout.OUT_IN), (WEIGHT, GEMM, (2, 3), Layout.OUT_IN)],
    ids=["transposed", "as it is"],
)
def test_a_linear_layers_weight_is_found_with_the_parameters_shape(
    tmp_path: Path, stored_as: Any, node: str, shape: tuple[int, ...], layout: Layout
) -> None:
    found = find_sites(graph(stored_as, node), base(tmp_path, {"a.weight": WEIGHT, "b.weight": OTHER}))
    assert [(spec.name, spec.shape, spec.layout) for spec in found.specs] == [("a.weight", shape, layout)]
    assert only(found).named_by is NameSource.CONTENT


def test_a_conv1ds_weight_lies_in_the_graph_as_in_the_base(tmp_path: Path) -> None:
    found = find_sites(graph(WEIGHT), base(tmp_path, {"a.weight": WEIGHT}))
    assert [(spec.shape, spec.layout, spec.matrix) for spec in found.specs] == [((2, 3), Layout.IN_OUT, (3, 2))]


def test_a_square_matrix_is_told_from_its_transpose(tmp_path: Path) -> None:
    square = np.float32([[1, 2], [3, 4]])
    checkpoint = base(tmp_path, {"a.weight": square})
    for stored_as, layout in [(square.T, Layout.OUT_IN), (square, Layout.IN_OUT)]:
        assert [spec.layout for spec in find_sites(graph(stored_as), checkpoint).specs] == [layout]


@pytest.mark.parametrize("there", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("here", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_a_weight_is_found_in_the_dtype_to_which_the_graph_rounded_it(tmp_path: Path, there: Any, here: Any) -> None:
    exact = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32).astype(there)
    found = find_sites(graph(exact.astype(here).T), base(tmp_path, {"a.weight": exact}, there))
    assert list(found.by_name) == ["a.weight"]


@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16])
def test_a_weight_is_found_that_was_rounded_to_half_precision_on_its_way(tmp_path: Path, half: Any) -> None:
    exact = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
    found = find_sites(graph(exact.astype(half).astype(np.float32).T), base(tmp_path, {"a.weight": exact}))
    assert list(found.by_name) == ["a.weight"]


@pytest.mark.parametrize("tile", [4096, content_match.TILE_BYTES])
def test_one_entry_that_differs_makes_it_another_weight(
    tmp_path: Path, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside the sample, too: what agrees there is compared whole."""
    monkeypatch.setattr(content_match, "TILE_BYTES", tile)
    weight = np.random.default_rng(0).normal(size=(300, 200)).astype(np.float32)
    checkpoint = base(tmp_path, {"a.weight": weight})
    assert list(find_sites(graph(weight.T), checkpoint).by_name) == ["a.weight"]
    for place in [(0, 0), (299, 199), (150, 77)]:
        changed = weight.copy()
        changed[place] = np.nextafter(changed[place], 2)
        found = find_sites(graph(changed.T), checkpoint)
        assert not found.by_name
        assert len(found.unnamed) == 1


def test_weights_beside_the_graph_are_read_in_place_and_in_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content_match, "TILE_BYTES", 4096)
    monkeypatch.setattr(writing, "MAX_INLINE_BYTES", 0)
    rng = np.random.default_rng(0)
    tensors = {f"{name}.weight": rng.normal(size=(70, 50)) for name in "abc"}
    model = graph(np.concatenate([tensors[f"{name}.weight"] for name in "ca"]).astype(np.float32).T)
    save_graph(model, tmp_path, "model.onnx")
    loaded = load_graph(tmp_path / "model.onnx")
    assert isinstance(loaded.graph.initializers["W"].const_value, ir.ExternalTensor)
    found = find_sites(loaded, base(tmp_path, tensors))
    assert [(site.name, site.block) for site in found.linear] == [
        ("c.weight", range(70)), ("a.weight", range(70, 140)),
    ]  # fmt: skip


def test_a_base_that_is_cut_short_meanwhile_is_refused(tmp_path: Path) -> None:
    checkpoint = base(tmp_path, {"a.weight": WEIGHT})
    with checkpoint.path.open("r+b") as file:
        file.truncate(checkpoint.path.stat().st_size - 4)
    with pytest.raises(InputRefused, match=r"base.safetensors became shorter while it was being read"):
        find_sites(graph(WEIGHT.T), checkpoint)


def test_biases_and_kernels_are_found_as_they_are(tmp_path: Path) -> None:
    kernel, bias = np.arange(12).reshape(2, 3, 2), [5, 7]
    model = a_graph(f"""
        g (float[N,3,L] x) => (float[N,2,M] y)
        <float[2,3,2] K = {{{",".join(map(str, range(12)))}}}, float[2] B = {{5,7}}>
        {{ [n] y = Conv(x, K, B) }}""")
    found = find_sites(model, base(tmp_path, {"c.weight": kernel, "c.bias": bias, "flat": kernel.reshape(2, 6)}))
    assert {spec.name: (spec.shape, spec.layout) for spec in found.specs} == {
        "c.weight": ((2, 3, 2), Layout.OUT_IN), "c.bias": ((2,), Layout.OTHER),
    }  # fmt: skip


# --- more than one ---


def test_equal_tensors_name_nothing_and_are_both_told(tmp_path: Path) -> None:
    found = find_sites(graph(WEIGHT.T), base(tmp_path, {"a.weight": WEIGHT, "b.weight": WEIGHT}))
    assert not found.by_name
    assert "its content, which equals a.weight and b.weight" in str(found)


@pytest.mark.parametrize("module", ["b", "model.b"])
def test_of_equal_tensors_the_one_whose_module_read_it_is_meant(tmp_path: Path, module: str) -> None:
    weight = graph(WEIGHT.T, module=module)
    found = find_sites(weight, base(tmp_path, {"a.weight": WEIGHT, "b.weight": WEIGHT}))
    assert list(found.by_name) == ["b.weight"]


@pytest.mark.parametrize(
    ("origins", "named"), [(["b.weight", "val_3"], ["b.weight"]), (["a.weight", "b.weight"], []), (["val_3"], [])]
)
def test_of_equal_tensors_the_one_that_it_was_folded_from_is_meant(
    tmp_path: Path, origins: list[str], named: list[str]
) -> None:
    model = graph(WEIGHT.T)
    model.graph.initializers["W"].metadata_props[FOLDED_FROM] = repr(origins)
    found = find_sites(model, base(tmp_path, {"a.weight": WEIGHT, "b.weight": WEIGHT}))
    assert list(found.by_name) == named


@pytest.mark.parametrize("width", [2, 4])
def test_a_constant_names_nothing(tmp_path: Path, width: int) -> None:
    checkpoint = base(tmp_path, {"a.weight": np.ones((2, 3)), "b.weight": OTHER})
    found = find_sites(graph(np.ones((3, width), np.float32)), checkpoint)
    assert not found.by_name
    assert len(found.unnamed) == 1
    assert list(find_sites(graph(np.ones((3, 2), np.float32), module="a"), checkpoint).by_name) == ["a.weight"]


def test_a_tied_head_does_not_take_the_embeddings_name(tmp_path: Path) -> None:
    """An adapter of the embedding changes what is looked up, and not the head."""
    table = np.float32([[1, 2], [3, 4], [5, 6]])
    body = """
        g (int64[N] ids) => (float[N,3] y)
        <float[3,2] E = {1,2,3,4,5,6}, float[2,3] W = {1,3,5,2,4,6}>
        { [e] x = Gather(E, ids)
          [n] y = MatMul(x, W) }"""
    checkpoint = base(tmp_path, {"embed.weight": table})
    found = find_sites(a_graph(body), checkpoint)
    assert {name: [site.node.name for site in there] for name, there in found.by_name.items()} == {
        "embed.weight": ["e"]
    }
    assert "its content, which equals embed.weight" in str(found)
    named = find_sites(a_graph(body, modules={"n": "head"}), checkpoint)
    assert {name: [site.node.name for site in there] for name, there in named.by_name.items()} == {
        "head.weight": ["n"], "embed.weight": ["e"],
    }  # fmt: skip


# --- names that the other layers gave ---


def test_a_name_that_the_base_gives_to_other_content_is_an_error_that_names_both(tmp_path: Path) -> None:
    checkpoint = base(tmp_path, {"a.weight": WEIGHT, "b.weight": OTHER})
    with pytest.raises(InputRefused, match=r"MatMul `n`: a.weight by name_scope, b.weight by content"):
        find_sites(graph(OTHER.T, module="a"), checkpoint)


def test_a_weight_that_was_changed_since_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"a.weight by initializer, no tensor by content"):
        find_sites(graph(WEIGHT + 1, GEMM, name="a.weight"), base(tmp_path, {"a.weight": WEIGHT}))


def test_a_name_of_another_shape_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"a.weight by initializer, no tensor by content"):
        find_sites(graph(WEIGHT, GEMM, name="a.weight"), base(tmp_path, {"a.weight": np.ones((4, 4))}))


@pytest.mark.parametrize(("here", "there"), [("model.a.weight", "a.weight"), ("a.weight", "model.a.weight")])
def test_a_name_with_another_prefix_is_spelled_as_the_base_does(tmp_path: Path, here: str, there: str) -> None:
    found = find_sites(graph(WEIGHT, GEMM, name=here), base(tmp_path, {there: WEIGHT, "b.weight": OTHER}))
    assert {name: site.named_by for name, (site,) in found.by_name.items()} == {there: NameSource.INITIALIZER}


def test_a_name_that_the_base_lacks_changes_its_prefix_as_the_others_do(tmp_path: Path) -> None:
    """A tied head stands in no checkpoint, and an adapter of it is called as those of the other layers are."""
    model = a_graph(
        """
        g (float[N,3] x) => (float[N,2] y)
        <float[2,3] wrapped.a.weight = {1,2,3,4,5,6}, float[2,2] wrapped.head.weight = {1,3,5,7}>
        { h = Gemm <transB = 1> (x, wrapped.a.weight)
          y = Gemm <transB = 1> (h, wrapped.head.weight) }"""
    )
    assert list(find_sites(model, base(tmp_path, {"a.weight": WEIGHT})).by_name) == ["a.weight", "head.weight"]
    assert list(find_sites(model, base(tmp_path, {"model.wrapped.a.weight": WEIGHT})).by_name) == [
        "model.wrapped.a.weight", "model.wrapped.head.weight",
    ]  # fmt: skip


def test_content_answers_where_the_base_does_not_know_the_name(tmp_path: Path) -> None:
    found = find_sites(graph(WEIGHT, GEMM, name="layers.0.fc.weight"), base(tmp_path, {"h.0.mlp.weight": WEIGHT}))
    assert {name: site.named_by for name, (site,) in found.by_name.items()} == {"h.0.mlp.weight": NameSource.CONTENT}


def test_a_weight_that_the_base_lacks_keeps_its_name_with_a_note(tmp_path: Path) -> None:
    found = find_sites(graph(OTHER, GEMM, name="head.weight"), base(tmp_path, {"a.weight": WEIGHT}))
    assert list(found.by_name) == ["head.weight"]
    assert any("head.weight: base.safetensors has neither this name nor this content" in note for note in found.notes)


# --- several weights side by side ---

Q, K, V = np.float32([[1, 2], [3, 4]]), np.float32([[5, 6]]), np.float32([[7, 8]])
PACKED = np.concatenate([Q, K, V])  # (out, in)
QKV = {"q.weight": Q, "k.weight": K, "v.weight": V}


@pytest.mark.parametrize(("stored_as", "node"), [(PACKED.T, MATMUL), (PACKED, GEMM)], ids=["columns", "rows"])
def test_weights_that_lie_side_by_side_are_told_apart(tmp_path: Path, stored_as: Any, node: str) -> None:
    found = find_sites(graph(stored_as, node), base(tmp_path, QKV))
    assert [(site.name, site.block) for site in found.linear] == [
        ("q.weight", range(2)), ("k.weight", range(2, 3)), ("v.weight", range(3, 4)),
    ]  # fmt: skip
    assert {spec.name: spec.shape for spec in found.specs} == {
        "q.weight": (2, 2),
        "k.weight": (1, 2),
        "v.weight": (1, 2),
    }
    for site in found.linear:
        assert np.array_equal(site.matrix, QKV[site.name])


def test_what_follows_an_unknown_block_is_listed_as_unnamed(tmp_path: Path) -> None:
    found = find_sites(graph(PACKED.T), base(tmp_path, {"q.weight": Q, "v.weight": V}))
    assert [(site.name, site.block) for site in found.linear] == [("q.weight", range(2))]
    assert [site.block for site in found.unnamed] == [range(2, 4)]
    assert "MatMul `n` [2:4]: no certain name" in str(found)


def test_a_block_that_fits_at_two_lengths_is_nobodys(tmp_path: Path) -> None:
    found = find_sites(graph(PACKED.T), base(tmp_path, {**QKV, "qk.weight": np.concatenate([Q, K])}))
    assert not found.by_name
    assert len(found.unnamed) == 1


def test_a_block_that_equals_two_tensors_is_nobodys_and_the_others_are_named(tmp_path: Path) -> None:
    found = find_sites(graph(PACKED.T), base(tmp_path, {**QKV, "other.weight": K}))
    assert [site.name for site in found.linear] == ["q.weight", "v.weight"]
    assert [(site.block, site.equal_tensors) for site in found.unnamed] == [(range(2, 3), ("k.weight", "other.weight"))]


@pytest.mark.parametrize(("stored_as", "node"), [(PACKED.T, MATMUL), (PACKED, GEMM)], ids=["columns", "rows"])
def test_folding_into_a_block_leaves_its_neighbours_bytes(tmp_path: Path, stored_as: Any, node: str) -> None:
    model = graph(stored_as, node)
    found = find_sites(model, base(tmp_path, QKV))
    pairs = {name: LoraPair(a=[[1, -1]], b=b, scale=2.0) for name, b in {"q": [[1], [0]], "v": [[3]]}.items()}
    fold(model, found, plan.make([an_adapter(pairs)], found.specs))
    after = stored(model, "W").T if node is MATMUL else stored(model, "W")
    assert np.array_equal(after, [[1 + 2, 2 - 2], [3, 4], [5, 6], [7 + 6, 8 - 6]])
    assert np.array_equal(run(model, x=np.float32([[1, 0]]))["y"], [[3, 3, 5, 13]])


def test_a_whole_block_is_replaced_as_the_parameter_lies(tmp_path: Path) -> None:
    model = graph(PACKED.T)
    found = find_sites(model, base(tmp_path, QKV))
    whole = np.float32([[9, 8], [7, 6]])
    fold(model, found, plan.make([an_adapter({}, replaced={"q.weight": whole})], found.specs))
    assert np.array_equal(stored(model, "W").T, [[9, 8], [7, 6], [5, 6], [7, 8]])


# --- what is shown ---


def test_inspect_shows_each_place_and_what_was_tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_graph(graph(PACKED.T), tmp_path, "model.onnx")
    base(tmp_path, {**QKV, "other.weight": K})
    assert cli.run(["inspect", str(tmp_path / "model.onnx")]) == 0
    assert "MatMul `n`: no certain name (tried its initializer `W`" in capsys.readouterr().out
    assert cli.run(["inspect", str(tmp_path / "model.onnx"), "--base", str(tmp_path / "base.safetensors")]) == 0
    shown = capsys.readouterr().out
    assert "q.weight  2 x 2 float32\n    MatMul `n` [0:2], lies in_out, named by content, [0:2] of W" in shown
    assert "MatMul `n` [2:3]: no certain name" in shown
    assert "which equals k.weight and other.weight" in shown


def test_inspect_tells_the_same_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_graph(graph(PACKED.T), tmp_path, "model.onnx")
    base(tmp_path, {**QKV, "other.weight": K})
    line = ["inspect", str(tmp_path / "model.onnx"), "--base", str(tmp_path / "base.safetensors"), "--json"]
    assert cli.run(line) == 0
    told = json.loads(capsys.readouterr().out)
    assert [tensor["name"] for tensor in told["tensors"]] == ["q.weight", "v.weight"]
    assert told["sites"][0] == {
        "name": "q.weight", "how": "content", "operator": "MatMul", "node": "n", "input": 1, "initializer": "W",
        "layout": "in_out", "shape": [2, 2], "dtype": "float32", "stored_as": "float", "block": [0, 2],
        "quantised": None, "obstacle": "",
    }  # fmt: skip
    assert [site["equals"] for site in told["unnamed"]] == [["k.weight", "other.weight"]]


@pytest.mark.parametrize(
    ("tensors", "arguments", "code", "told"),
    [
        ({"a.weight": OTHER}, [], 3, "a.weight by initializer, no tensor by content"),
        ({"a.weight": WEIGHT}, ["base.safetensors"], 2, "--base names the weights of an .onnx file"),
    ],
)
def test_inspect_refuses_a_base_that_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tensors: Any, arguments: list[str], code: int, told: str
) -> None:
    save_graph(graph(WEIGHT, GEMM, name="a.weight"), tmp_path, "model.onnx")
    checkpoint = base(tmp_path, tensors)
    path = tmp_path / (arguments[0] if arguments else "model.onnx")
    assert cli.run(["inspect", str(path), "--base", str(checkpoint.path)]) == code
    out, err = capsys.readouterr()
    assert told in err and not out
