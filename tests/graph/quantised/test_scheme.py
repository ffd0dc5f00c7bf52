"""Scales, zero points and integers by the rules of a scheme, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from lora_export.graph.quantised.scheme import Groups, PackedTensor, Rule, Scheme, ValueRange
from lora_export.lora import EVERY_ROW
from lora_export.weights.tensor_blocks import Patch

FOUR_BITS = Scheme(
    lowest=0,
    highest=15,
    default_zero=8,
    rule=Rule.SYMMETRIC,
    scale_dtype=np.dtype(np.float32),
    zero_dtype=np.dtype(np.uint8),
    scale_of_zeros=0,
)


def value_range(low: float, high: float) -> ValueRange:
    return ValueRange(np.float32([[low]]), np.float32([[high]]))


@pytest.mark.parametrize(
    ("rule", "low", "high", "scale", "zero"),
    [
        (Rule.SYMMETRIC, -3, 6, 6 / 7.5, 8),  # the range is -6 to 6
        (Rule.SIGNED_SCALE, -3, 6, 6 / -8, 8),  # 6 becomes the lowest integer
        (Rule.SIGNED_SCALE, -6, 3, -6 / -8, 8),
        (Rule.ASYMMETRIC, -5, 10, 1, 5),  # the range is -5 to 10, and 5 is zero
    ],
)
def test_scale_and_zero_point_follow_from_range(rule: Rule, low: float, high: float, scale: float, zero: int) -> None:
    scales, zeros = replace(FOUR_BITS, rule=rule).parameters(value_range(low, high))
    np.testing.assert_allclose(scales, [[scale]], rtol=1e-6)
    assert np.all(zeros == zero)


def test_scale_is_rounded_to_its_stored_dtype() -> None:
    scheme = replace(FOUR_BITS, scale_dtype=np.dtype(np.float16))
    scales, _ = scheme.parameters(value_range(-1, 0.5))
    assert scales.tolist() == [[float(np.float16(1 / 7.5))]]


def test_group_of_zeros_has_its_own_scale() -> None:
    scales, _ = replace(FOUR_BITS, scale_of_zeros=1).parameters(value_range(0, 0))
    assert scales.tolist() == [[1]]


def test_levels_are_rounded_and_clipped() -> None:
    weight, scales, zeros = np.float32([-9, -0.9, 0, 1.1, 99]), np.float32(0.5), np.float32(8)
    assert FOUR_BITS.levels(weight, scales, zeros).tolist() == [0, 6, 8, 10, 15]


SHAPE = (4, 6)
TENSOR, ROWS, COLUMNS = Groups(SHAPE, None, 0), Groups(SHAPE, 0, 0), Groups(SHAPE, 1, 0)
BLOCKS_IN_ROWS, BLOCKS_OF_ROWS = Groups(SHAPE, 1, 4), Groups(SHAPE, 0, 2)
ALL = [TENSOR, ROWS, COLUMNS, BLOCKS_IN_ROWS, BLOCKS_OF_ROWS]


@pytest.mark.parametrize(
    ("groups", "band_rows", "band_groups"),
    [(TENSOR, 4, 1), (ROWS, 1, 1), (COLUMNS, 4, 6), (BLOCKS_IN_ROWS, 1, 2), (BLOCKS_OF_ROWS, 2, 6)],
)
def test_bands_have_these_rows_and_groups(groups: Groups, band_rows: int, band_groups: int) -> None:
    assert (groups.band_rows, groups.band_groups) == (band_rows, band_groups)


@pytest.mark.parametrize("groups", ALL)
def test_broadcast_scales_divide_entries_by_their_group(groups: Groups) -> None:
    entries = np.arange(1.0, 25.0).reshape(SHAPE)
    rows = slice(0, 4)
    maxima = groups.reduce(np.maximum, entries, rows)
    assert maxima.shape == (4 // groups.band_rows, groups.band_groups)
    spread = np.broadcast_to(groups.broadcast(maxima, rows), SHAPE)
    assert (entries <= spread).all()
    assert (entries == spread).sum() == maxima.size


def test_rows_of_second_band_get_its_scales() -> None:
    scales = np.array([[10, 20, 30, 40, 50, 60]])
    rows = slice(2, 4)
    assert BLOCKS_OF_ROWS.bands(rows) == slice(1, 2)
    assert np.array_equal(BLOCKS_OF_ROWS.broadcast(scales, rows), scales)


def test_rows_from_middle_of_band_are_grouped_with_their_own_band() -> None:
    entries = np.arange(24.0).reshape(SHAPE)
    rows = slice(1, 4)  # the second row of band 0, and all of band 1
    maxima = BLOCKS_OF_ROWS.reduce(np.maximum, entries[rows], rows)
    assert np.array_equal(maxima, entries[[1, 3]])
    assert np.array_equal(BLOCKS_OF_ROWS.broadcast(maxima, rows), entries[[1, 3, 3]])


@pytest.mark.parametrize(
    ("groups", "rows", "columns", "is_split"),
    [
        (TENSOR, slice(0, 2), EVERY_ROW, True),
        (ROWS, slice(1, 2), EVERY_ROW, False),
        (ROWS, slice(0, 4), slice(0, 3), True),
        (COLUMNS, slice(0, 4), slice(1, 3), False),
        (COLUMNS, slice(0, 2), slice(1, 3), True),
        (BLOCKS_IN_ROWS, slice(1, 3), EVERY_ROW, False),
        (BLOCKS_IN_ROWS, slice(0, 4), slice(0, 4), False),
        (BLOCKS_IN_ROWS, slice(0, 4), slice(4, 6), False),
        (BLOCKS_IN_ROWS, slice(0, 4), slice(2, 6), True),
        (BLOCKS_OF_ROWS, slice(2, 4), EVERY_ROW, False),
        (BLOCKS_OF_ROWS, slice(1, 3), EVERY_ROW, True),
        (TENSOR, slice(0, 4), slice(0, 3), True),
    ],
)
def test_patch_within_groups_does_not_split_them(groups: Groups, rows: slice, columns: slice, is_split: bool) -> None:
    step: Any = None
    assert groups.are_split_by(Patch(step, rows, columns)) is is_split


# --- Numbers of a few bits, packed in bytes. ---


def packed_tensor(data: np.ndarray, dtype: str, bits: int, width: int, row_bits: int) -> PackedTensor:
    return PackedTensor(ir.Tensor(data.reshape(-1)), np.dtype(dtype), bits, width, row_bits)


def test_lowest_bits_of_byte_come_first() -> None:
    tensor = packed_tensor(np.uint8([0x21, 0x43]), "uint8", 4, 2, 8)
    assert tensor.read(slice(0, 2)).tolist() == [[1, 2], [3, 4]]
    assert packed_tensor(np.uint8([0b11100100]), "uint8", 2, 4, 8).read(slice(0, 1)).tolist() == [[0, 1, 2, 3]]


def test_signed_numbers_are_sign_extended() -> None:
    assert packed_tensor(np.uint8([0x8F]), "int8", 4, 2, 8).read(slice(0, 1)).tolist() == [[-1, -8]]


def test_rows_may_begin_within_a_byte() -> None:
    tensor = packed_tensor(np.uint8([0x21, 0x43, 0x65]), "uint8", 4, 3, 12)
    assert tensor.aligned_rows == 2
    assert tensor.extent(slice(1, 2)) == (1, 3)
    assert tensor.read(slice(1, 2)).tolist() == [[4, 5, 6]]


def test_padding_of_rows_is_kept() -> None:
    tensor = packed_tensor(np.uint8([0xF1, 0xF2]), "uint8", 4, 1, 8)
    assert tensor.read(slice(0, 2)).tolist() == [[1], [2]]
    assert tensor.pack(np.array([[5], [6]]), tensor.inline_bytes).tolist() == [0xF5, 0xF6]


@pytest.mark.parametrize(("dtype", "bits"), [("uint8", 2), ("int8", 4), ("uint8", 4), ("int8", 8), ("int16", 16)])
def test_packed_numbers_are_read_again(dtype: str, bits: int, tmp_path: Path) -> None:
    lowest = -(1 << (bits - 1)) if dtype.startswith("i") else 0
    numbers = np.random.default_rng(0).integers(lowest, lowest + (1 << bits), (6, 8))
    size = numbers.size * bits // 8
    empty = packed_tensor(np.zeros(size, np.uint8), dtype, bits, 8, 8 * bits)
    data = empty.pack(numbers, np.zeros(size, np.uint8))
    (tmp_path / "data").write_bytes(bytes(3) + data.tobytes())
    external = ir.ExternalTensor(
        "data", 3, size, ir.DataType.UINT8, shape=ir.Shape([size]), name="w", base_dir=tmp_path
    )
    for tensor in (ir.Tensor(data), external):
        stored = PackedTensor(tensor, np.dtype(dtype), bits, 8, 8 * bits)
        assert np.array_equal(stored.read(slice(0, 6)), numbers)
        assert np.array_equal(stored.read(slice(2, 5)), numbers[2:5])
