"""Which entries share a scale, and how integers are packed, by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from lora_export.graph.quantised.scheme_of_weight import Groups, IntegerCodes, PackedTensor

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


def test_scales_are_those_of_the_entries_group() -> None:
    rows, scales = slice(0, 4), np.arange(1, 13)
    assert TENSOR.broadcast(scales[:1], rows).tolist() == [[1]]
    assert ROWS.broadcast(scales[:4, None], rows).tolist() == [[1], [2], [3], [4]]
    assert COLUMNS.broadcast(scales[None, :6], rows).tolist() == [[1, 2, 3, 4, 5, 6]]
    in_rows = BLOCKS_IN_ROWS.broadcast(scales[:8].reshape(4, 2), rows)
    assert in_rows.tolist() == [[first, first, first, first, first + 1, first + 1] for first in (1, 3, 5, 7)]
    first, second = [1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]
    assert BLOCKS_OF_ROWS.broadcast(scales.reshape(2, 6), rows).tolist() == [first, first, second, second]


def test_rows_of_second_band_get_its_scales() -> None:
    scales = np.array([[10, 20, 30, 40, 50, 60]])
    rows = slice(2, 4)
    assert BLOCKS_OF_ROWS.bands(rows) == slice(1, 2)
    assert np.array_equal(BLOCKS_OF_ROWS.broadcast(scales, rows), scales)


def test_rows_from_middle_of_band_have_their_own_bands_scales() -> None:
    scales = np.array([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]])
    assert np.array_equal(BLOCKS_OF_ROWS.broadcast(scales, slice(1, 4)), scales[[0, 1, 1]])


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
    codes, data = IntegerCodes(packed_tensor(np.uint8([0xF1, 0xF2]), "uint8", 4, 1, 8)), np.uint8([0xF1, 0xF2])
    assert codes.unpack(slice(0, 2), data).tolist() == [[1], [2]]
    codes.pack(np.uint8([[5], [6]]), data)
    assert data.tolist() == [0xF5, 0xF6]


@pytest.mark.parametrize(
    ("dtype", "bits", "width"),
    [("uint8", 2, 8), ("int8", 2, 3), ("int8", 4, 7), ("uint8", 4, 8), ("int8", 8, 5), ("int16", 16, 5)],
)
def test_packed_numbers_are_read_again(dtype: str, bits: int, width: int, tmp_path: Path) -> None:
    lowest = -(1 << (bits - 1)) if dtype.startswith("i") else 0
    numbers = np.random.default_rng(0).integers(lowest, lowest + (1 << bits), (8, width))
    size = numbers.size * bits // 8
    empty = packed_tensor(np.zeros(size, np.uint8), dtype, bits, width, width * bits)
    data, codes = np.zeros(size, np.uint8), (numbers - lowest).astype(np.uint16 if bits > 8 else np.uint8)
    IntegerCodes(empty).pack(codes, data)
    assert np.array_equal(IntegerCodes(empty).unpack(slice(0, 8), data), codes)  # 0 is the lowest
    (tmp_path / "data").write_bytes(bytes(3) + data.tobytes())
    external = ir.ExternalTensor(
        "data", 3, size, ir.DataType.UINT8, shape=ir.Shape([size]), name="w", base_dir=tmp_path
    )
    for tensor in (ir.Tensor(data), external):
        stored = PackedTensor(tensor, np.dtype(dtype), bits, width, width * bits)
        assert np.array_equal(stored.read(slice(0, 8)), numbers)
        assert np.array_equal(stored.read(slice(2, 5)), numbers[2:5])
