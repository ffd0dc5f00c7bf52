"""Shared and packed tensors: only the weight that changes is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_export import plan
from lora_export.graph.find_sites import find_sites
from lora_export.graph.merge.fold import fold_graph
from lora_export.lora import LoraPair
from support.content_graphs import GEMM, MATMUL, PACKED, QKV, base_checkpoint, product_graph
from support.graphs import a_graph, an_adapter, run, stored
from support.small_graphs import SHARED, SQUARE, folded


@pytest.mark.parametrize(("stored_as", "node"), [(PACKED.T, MATMUL), (PACKED, GEMM)], ids=["columns", "rows"])
def test_folding_into_block_keeps_bytes_of_neighbours(tmp_path: Path, stored_as: Any, node: str) -> None:
    model = product_graph(stored_as, node)
    found = find_sites(model, base_checkpoint(tmp_path, QKV))
    pairs = {name: LoraPair(a=[[1, -1]], b=b, scale=2.0) for name, b in {"q": [[1], [0]], "v": [[3]]}.items()}
    fold_graph(model, found, plan.make([an_adapter(pairs)], found.specs))
    after = stored(model, "W").T if node is MATMUL else stored(model, "W")
    assert np.array_equal(after, [[1 + 2, 2 - 2], [3, 4], [5, 6], [7 + 6, 8 - 6]])
    assert np.array_equal(run(model, x=np.float32([[1, 0]]))["y"], [[3, 3, 5, 13]])


def test_block_is_replaced_in_layout_of_parameter(tmp_path: Path) -> None:
    model = product_graph(PACKED.T)
    found = find_sites(model, base_checkpoint(tmp_path, QKV))
    whole = np.float32([[9, 8], [7, 6]])
    fold_graph(model, found, plan.make([an_adapter({}, replaced={"q.weight": whole})], found.specs))
    assert np.array_equal(stored(model, "W").T, [[9, 8], [7, 6], [5, 6], [7, 8]])


def test_other_reader_of_shared_tensor_keeps_it() -> None:
    model = a_graph(SHARED, modules={"first": "a.fc", "second": "b.fc"})
    folded(model, an_adapter({"b.fc": SQUARE}))
    assert np.array_equal(stored(model, "a.fc.weight"), [[1, 2], [3, 4]])
    assert np.array_equal(stored(model, "b.fc.weight"), [[1 + 1, 2 + 2], [3, 4]])
    assert np.array_equal(run(model, x=np.float32([[1, 0]]))["y"], [[1 * 2 + 2 * 3, 1 * 4 + 2 * 4]])


def test_changed_weight_keeps_its_name() -> None:
    model = a_graph(SHARED, modules={"first": "a.fc", "second": "b.fc"})
    folded(model, an_adapter({"a.fc": SQUARE}))
    assert np.array_equal(stored(model, "a.fc.weight"), [[2, 4], [3, 4]])
    assert np.array_equal(stored(model, "b.fc.weight"), [[1, 2], [3, 4]])
    again = find_sites(model)
    assert {name: [site.node.name for site in sites] for name, sites in again.by_name.items()} == {
        "a.fc.weight": ["first"], "b.fc.weight": ["second"],
    }  # fmt: skip


def test_module_called_twice_changes_at_both_sites() -> None:
    model = a_graph(SHARED, modules={"first": "a.fc", "second": "a.fc"})
    folded(model, an_adapter({"a.fc": SQUARE}))
    assert list(model.graph.initializers) == ["a.fc.weight"]
    assert np.array_equal(stored(model, "a.fc.weight"), [[2, 4], [3, 4]])


def test_tied_head_is_untied_from_embedding() -> None:
    model = a_graph(
        """
        g (int64[N] ids) => (float[N,3] y)
        <float[3,2] embed.weight = {1,2,3,4,5,6}>
        { [e] x = Gather(embed.weight, ids)
          [t] w = Transpose(embed.weight)
          [n] y = MatMul(x, w) }""",
        modules={"e": "embed", "n": "head", "t": "head"},
    )
    pair = LoraPair(a=[[1, 0]], b=[[0], [0], [1]], scale=1.0)
    folded(model, an_adapter({"head": pair}))
    assert np.array_equal(stored(model, "embed.weight"), [[1, 2], [3, 4], [5, 6]])
    assert np.array_equal(stored(model, "head.weight"), [[1, 2], [3, 4], [5 + 1, 6]])
    assert [node.op_type for node in model.graph] == ["Gather", "Transpose", "MatMul"]
    assert np.array_equal(run(model, ids=np.array([0]))["y"], [[5, 11, 18]])
    again = {spec.name: spec for spec in find_sites(model).specs}
    assert again["head.weight"].shape == (3, 2)


def test_every_copy_of_parameter_changes() -> None:
    model = a_graph(
        """
        g (float[N,2] x) => (float[N,2] y)
        <float[2,2] fc.weight = {1,2,3,4}, float[2,2] val_1 = {1,3,2,4}>
        { [first] h = Gemm <transB = 1> (x, fc.weight)
          [second] y = MatMul(h, val_1) }""",
        modules={"first": "fc", "second": "fc"},
        val_1="fc.weight",
    )
    folded(model, an_adapter({"fc": SQUARE}))
    assert np.array_equal(stored(model, "fc.weight"), [[2, 2], [5, 4]])
    assert np.array_equal(stored(model, "val_1"), [[2, 5], [2, 4]])


def test_linear_reader_determines_layout_of_shared_matrix() -> None:
    model = a_graph(
        """
        g (float[2,2] x) => (float[2,2] y)
        <float[2,2] m.weight = {1,2,3,4}>
        { [r] z = Relu(m.weight)
          [n] h = MatMul(x, m.weight)
          [a] y = Add(h, z) }""",
        modules={"r": "m", "n": "m"},
    )
    folded(model, an_adapter({"m": SQUARE}))
    assert np.array_equal(stored(model, "m.weight"), [[1 + 1, 2 + 2], [3, 4]])
