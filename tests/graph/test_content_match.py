"""Weights that are found in a base by their content: stored as they are, transposed, rounded, or packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from lora_export.errors import InputRefused
from lora_export.graph import content_match
from lora_export.graph.content_match import Matrix, array_matrix, as_rows, dequantised_matrix, file_matrix
from lora_export.graph.find_sites import find_sites
from lora_export.graph.onnx_file import writing
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.graph.site import NameSource
from lora_export.plan import Layout
from support.content_graphs import (
    GEMM,
    MATMUL,
    OTHER,
    PACKED,
    QKV,
    WEIGHT,
    K,
    Q,
    V,
    base_checkpoint,
    only_site,
    product_graph,
)
from support.graphs import a_graph, quantised


@pytest.mark.parametrize(
    ("stored_as", "node", "shape", "layout"),
    [(WEIGHT.T, MATMUL, (2, 3), Layout.OUT_IN), (WEIGHT, GEMM, (2, 3), Layout.OUT_IN)],
    ids=["transposed", "as it is"],
)
def test_linear_weight_is_found_with_shape_of_parameter(
    tmp_path: Path, stored_as: Any, node: str, shape: tuple[int, ...], layout: Layout
) -> None:
    found = find_sites(
        product_graph(stored_as, node), base_checkpoint(tmp_path, {"a.weight": WEIGHT, "b.weight": OTHER})
    )
    assert [(spec.name, spec.shape, spec.layout) for spec in found.specs] == [("a.weight", shape, layout)]
    assert only_site(found).named_by is NameSource.CONTENT


def test_conv1d_weight_has_layout_of_base(tmp_path: Path) -> None:
    found = find_sites(product_graph(WEIGHT), base_checkpoint(tmp_path, {"a.weight": WEIGHT}))
    assert [(spec.shape, spec.layout, spec.matrix) for spec in found.specs] == [((2, 3), Layout.IN_OUT, (3, 2))]


def test_square_matrix_is_distinguished_from_its_transpose(tmp_path: Path) -> None:
    square = np.float32([[1, 2], [3, 4]])
    checkpoint = base_checkpoint(tmp_path, {"a.weight": square})
    for stored_as, layout in [(square.T, Layout.OUT_IN), (square, Layout.IN_OUT)]:
        assert [spec.layout for spec in find_sites(product_graph(stored_as), checkpoint).specs] == [layout]


@pytest.mark.parametrize("base_dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("graph_dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_weight_is_found_in_dtype_of_graph(tmp_path: Path, base_dtype: Any, graph_dtype: Any) -> None:
    exact = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32).astype(base_dtype)
    found = find_sites(
        product_graph(exact.astype(graph_dtype).T), base_checkpoint(tmp_path, {"a.weight": exact}, base_dtype)
    )
    assert list(found.by_name) == ["a.weight"]


@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16])
def test_weight_is_found_after_rounding_to_half_precision(tmp_path: Path, half: Any) -> None:
    exact = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
    found = find_sites(
        product_graph(exact.astype(half).astype(np.float32).T), base_checkpoint(tmp_path, {"a.weight": exact})
    )
    assert list(found.by_name) == ["a.weight"]


@pytest.mark.parametrize("tile", [4096, content_match.TILE_BYTES])
def test_one_different_entry_prevents_match(tmp_path: Path, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also outside of the sample: tensors whose samples agree are compared in full."""
    monkeypatch.setattr(content_match, "TILE_BYTES", tile)
    weight = np.random.default_rng(0).normal(size=(300, 200)).astype(np.float32)
    checkpoint = base_checkpoint(tmp_path, {"a.weight": weight})
    assert list(find_sites(product_graph(weight.T), checkpoint).by_name) == ["a.weight"]
    for position in [(0, 0), (299, 199), (150, 77)]:
        changed = weight.copy()
        changed[position] = np.nextafter(changed[position], 2)
        found = find_sites(product_graph(changed.T), checkpoint)
        assert not found.by_name
        assert len(found.unnamed) == 1


def test_external_weights_are_compared_in_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content_match, "TILE_BYTES", 4096)
    monkeypatch.setattr(writing, "MAX_INLINE_BYTES", 0)
    rng = np.random.default_rng(0)
    tensors = {f"{name}.weight": rng.normal(size=(70, 50)) for name in "abc"}
    model = product_graph(np.concatenate([tensors[f"{name}.weight"] for name in "ca"]).astype(np.float32).T)
    save_graph(model, tmp_path, "model.onnx")
    loaded = load_graph(tmp_path / "model.onnx")
    assert isinstance(loaded.graph.initializers["W"].const_value, ir.ExternalTensor)
    found = find_sites(loaded, base_checkpoint(tmp_path, tensors))
    assert [(site.name, site.block) for site in found.linear] == [
        ("c.weight", range(70)), ("a.weight", range(70, 140)),
    ]  # fmt: skip


def test_base_truncated_after_opening_is_refused(tmp_path: Path) -> None:
    checkpoint = base_checkpoint(tmp_path, {"a.weight": WEIGHT})
    with checkpoint.path.open("r+b") as file:
        file.truncate(checkpoint.path.stat().st_size - 4)
    with pytest.raises(InputRefused, match=r"base.safetensors became shorter while it was being read"):
        find_sites(product_graph(WEIGHT.T), checkpoint)


def test_biases_and_kernels_are_found(tmp_path: Path) -> None:
    kernel, bias = np.arange(12).reshape(2, 3, 2), [5, 7]
    model = a_graph(f"""
        g (float[N,3,L] x) => (float[N,2,M] y)
        <float[2,3,2] K = {{{",".join(map(str, range(12)))}}}, float[2] B = {{5,7}}>
        {{ [n] y = Conv(x, K, B) }}""")
    found = find_sites(
        model, base_checkpoint(tmp_path, {"c.weight": kernel, "c.bias": bias, "flat": kernel.reshape(2, 6)})
    )
    assert {spec.name: (spec.shape, spec.layout) for spec in found.specs} == {
        "c.weight": ((2, 3, 2), Layout.OUT_IN), "c.bias": ((2,), Layout.OTHER),
    }  # fmt: skip


def test_outputs_of_a_convolution_are_no_experts(tmp_path: Path) -> None:
    """Those of a Mamba's would be half a million."""
    base = base_checkpoint(tmp_path, {"conv.weight": np.ones((9, 1, 4), np.float32)})
    assert list(content_match.ContentIndex(base).matrices) == ["conv.weight"]
    assert len(content_match.ContentIndex(base, {(1, 4)}).matrices) == 10


@pytest.mark.parametrize("width", [2, 4])
def test_constant_weight_matches_nothing(tmp_path: Path, width: int) -> None:
    checkpoint = base_checkpoint(tmp_path, {"a.weight": np.ones((2, 3)), "b.weight": OTHER})
    found = find_sites(product_graph(np.ones((3, width), np.float32)), checkpoint)
    assert not found.by_name
    assert len(found.unnamed) == 1
    assert list(find_sites(product_graph(np.ones((3, 2), np.float32), module="a"), checkpoint).by_name) == ["a.weight"]


@pytest.mark.parametrize(("stored_as", "node"), [(PACKED.T, MATMUL), (PACKED, GEMM)], ids=["columns", "rows"])
def test_packed_weights_are_found_block_by_block(tmp_path: Path, stored_as: Any, node: str) -> None:
    found = find_sites(product_graph(stored_as, node), base_checkpoint(tmp_path, QKV))
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


def test_rest_after_unknown_block_is_unnamed(tmp_path: Path) -> None:
    found = find_sites(product_graph(PACKED.T), base_checkpoint(tmp_path, {"q.weight": Q, "v.weight": V}))
    assert [(site.name, site.block) for site in found.linear] == [("q.weight", range(2))]
    assert [site.block for site in found.unnamed] == [range(2, 4)]
    assert "MatMul `n` [2:4]: no certain name" in str(found)


def test_block_matching_two_sizes_is_unnamed(tmp_path: Path) -> None:
    found = find_sites(product_graph(PACKED.T), base_checkpoint(tmp_path, {**QKV, "qk.weight": np.concatenate([Q, K])}))
    assert not found.by_name
    assert len(found.unnamed) == 1


def test_block_equal_to_two_tensors_is_unnamed(tmp_path: Path) -> None:
    found = find_sites(product_graph(PACKED.T), base_checkpoint(tmp_path, {**QKV, "other.weight": K}))
    assert [site.name for site in found.linear] == ["q.weight", "v.weight"]
    assert [(site.block, site.equal_tensors) for site in found.unnamed] == [(range(2, 3), ("k.weight", "other.weight"))]


# --- Matrices in files, in memory, quantised and transposed: the same numbers by tile and by position. ---


ARRAY = np.random.default_rng(0).normal(size=(12, 32)).astype(np.float32)
POSITIONS = np.array([0, 11, 5]), np.array([31, 0, 7])


def in_file(folder: Path) -> Matrix:
    (folder / "data").write_bytes(bytes(5) + ARRAY.tobytes())
    return file_matrix(folder / "data", 5, ARRAY.dtype, (12, 32))


def in_memory(_: Path) -> Matrix:
    return array_matrix(ARRAY)


def transposed(folder: Path) -> Matrix:
    (folder / "data").write_bytes(ARRAY.T.tobytes())
    return file_matrix(folder / "data", 0, ARRAY.dtype, (32, 12)).transposed


@pytest.mark.parametrize("make", [in_file, in_memory, transposed])
def test_tiles_and_positions_are_those_of_array(make, tmp_path: Path) -> None:
    matrix = make(tmp_path)
    assert (matrix.shape, matrix.dtype) == ((12, 32), np.float32)
    assert np.array_equal(matrix.tile(range(2, 9), range(32)), ARRAY[2:9])
    assert np.array_equal(matrix.tile(range(2, 9), range(3, 10)), ARRAY[2:9, 3:10])
    assert np.array_equal(matrix.at(POSITIONS), ARRAY[POSITIONS])


def test_quantised_matrix_is_dequantised() -> None:
    site = only_site(find_sites(quantised(product_graph(np.ascontiguousarray(ARRAY.T)))))
    assert site.quantised is not None
    matrix = dequantised_matrix(site.quantised)
    assert np.array_equal(matrix.tile(range(2, 9), range(3, 10)), site.matrix[2:9, 3:10])
    assert np.array_equal(matrix.at(POSITIONS), site.matrix[POSITIONS])


def test_double_transpose_is_simplified() -> None:
    inner = array_matrix(ARRAY)
    assert inner.transposed.transposed is inner


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(ARRAY.tobytes()[:-1])
    with pytest.raises(InputRefused, match="became shorter"):
        file_matrix(tmp_path / "data", 0, ARRAY.dtype, (12, 32)).tile(range(12), range(32))


def test_rows_of_any_tensor_are_its_first_dimension() -> None:
    assert [as_rows(shape) for shape in [(2, 3, 4), (5,), ()]] == [(2, 12), (5, 1), (1, 1)]
