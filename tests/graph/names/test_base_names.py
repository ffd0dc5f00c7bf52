"""Names from a base checkpoint: preferences, contradictions, prefixes and tied heads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lora_export.errors import InputRefused
from lora_export.graph.find_sites import find_sites
from lora_export.graph.names.exporter_names import FOLDED_FROM
from lora_export.graph.site import NameSource
from support.content_graphs import GEMM, OTHER, WEIGHT, base_checkpoint, product_graph
from support.graphs import a_graph


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
