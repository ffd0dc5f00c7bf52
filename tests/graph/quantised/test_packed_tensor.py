"""Numbers of a few bits, packed in bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from lora_export.graph.quantised.packed_tensor import PackedTensor


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
