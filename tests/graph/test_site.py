"""Sites: the entries that they read, in the orientation of the stored tensor and as (out, in)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lora_export.graph.find_sites import find_sites
from lora_export.graph.site import Site, common_dtype
from support.content_graphs import GEMM, MATMUL, PACKED, only_site, product_graph
from support.graphs import quantised

ORIENTATIONS = pytest.mark.parametrize(
    ("stored_as", "node"), [(PACKED.T, MATMUL), (PACKED, GEMM)], ids=["in_out", "out_in"]
)


def site_of(stored_as: np.ndarray, node: str, block: range | None = None) -> Site:
    return replace(only_site(find_sites(product_graph(stored_as, node))), block=block)


@ORIENTATIONS
def test_matrix_of_whole_weight_is_out_in(stored_as: np.ndarray, node: str) -> None:
    site = site_of(stored_as, node)
    assert np.array_equal(site.matrix, PACKED)
    assert np.array_equal(site.array, stored_as)
    assert (site.shape, site.stored_shape, site.node_outputs) == (stored_as.shape, stored_as.shape, 4)


@ORIENTATIONS
def test_block_is_part_of_outputs(stored_as: np.ndarray, node: str) -> None:
    site = site_of(stored_as, node, range(1, 3))
    assert np.array_equal(site.matrix, PACKED[1:3])
    assert np.array_equal(site.stored_array, stored_as)
    assert site.shape == site.array.shape
    assert (site.node_outputs, site.location) == (4, f"{node[8:14].split('(')[0].split()[0]} `n` [1:3]")


def test_nearest_keeps_representable_values_of_block() -> None:
    weight = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)  # (in, out)
    site = replace(only_site(find_sites(quantised(product_graph(weight)))), block=range(2, 5))
    stored = site.matrix.astype(np.float64)
    step = np.abs(stored).max() / 100
    assert np.allclose(site.nearest(stored + step), stored, atol=1e-6)
    assert not np.allclose(site.nearest(stored + 40 * step), stored, atol=step)


def test_common_dtype_holds_all_readers() -> None:
    site = site_of(PACKED, GEMM)
    half, bfloat, double = (replace(site, dtype=dtype) for dtype in ("float16", "bfloat16", "float64"))
    assert common_dtype([half, half]) == "float16"
    assert common_dtype([half, bfloat]) == "float32"
    assert common_dtype([half, double]) == "float64"
