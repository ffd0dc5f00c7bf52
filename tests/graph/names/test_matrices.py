"""Matrices in files, in memory, quantised and transposed: the same numbers by tile and by position."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lora_export.errors import InputRefused
from lora_export.graph.find_sites import find_sites
from lora_export.graph.names.matrices import (
    DequantisedMatrix,
    FileMatrix,
    Matrix,
    MemoryMatrix,
    TransposedMatrix,
    as_rows,
)
from support.content_graphs import only_site, product_graph
from support.graphs import quantised

ARRAY = np.random.default_rng(0).normal(size=(12, 32)).astype(np.float32)
POSITIONS = np.array([0, 11, 5]), np.array([31, 0, 7])


def in_file(folder: Path) -> Matrix:
    (folder / "data").write_bytes(bytes(5) + ARRAY.tobytes())
    return FileMatrix(folder / "data", 5, ARRAY.dtype, (12, 32))


def in_memory(_: Path) -> Matrix:
    return MemoryMatrix(ARRAY)


def transposed(folder: Path) -> Matrix:
    (folder / "data").write_bytes(ARRAY.T.tobytes())
    return TransposedMatrix(FileMatrix(folder / "data", 0, ARRAY.dtype, (32, 12)))


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
    matrix = DequantisedMatrix(site.quantised)
    assert np.array_equal(matrix.tile(range(2, 9), range(3, 10)), site.matrix[2:9, 3:10])
    assert np.array_equal(matrix.at(POSITIONS), site.matrix[POSITIONS])


def test_double_transpose_is_simplified() -> None:
    inner = MemoryMatrix(ARRAY)
    assert TransposedMatrix(TransposedMatrix(inner)).simplified() is inner


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(ARRAY.tobytes()[:-1])
    with pytest.raises(InputRefused, match="became shorter"):
        FileMatrix(tmp_path / "data", 0, ARRAY.dtype, (12, 32)).tile(range(12), range(32))


def test_rows_of_any_tensor_are_its_first_dimension() -> None:
    assert [as_rows(shape) for shape in [(2, 3, 4), (5,), ()]] == [(2, 12), (5, 1), (1, 1)]
