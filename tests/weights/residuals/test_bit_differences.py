"""Bit patterns and their differences as bytes, and what damaged bytes do."""

from __future__ import annotations

import io
import struct

import ml_dtypes
import numpy as np
import pytest

from lora_export.errors import InputRefused
from lora_export.weights.residuals.prediction import add_differences, packed_differences, unpacked_differences

RNG = np.random.default_rng(9)
DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int8, np.uint8, np.int64, np.bool_]


def any_bits(dtype: type, size: int) -> np.ndarray:
    return np.frombuffer(RNG.bytes(size * np.dtype(dtype).itemsize), dtype)


def restored(packed: bytes, predicted: np.ndarray) -> np.ndarray:
    stream = io.BytesIO(packed)
    differences = unpacked_differences(stream.read, predicted.size, predicted.dtype.itemsize)
    assert stream.read() == b""
    return add_differences(predicted, differences)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_any_bits_come_back(dtype: type, share: float) -> None:
    predicted, other = any_bits(dtype, 3000), any_bits(dtype, 3000)
    actual = np.where(RNG.random(3000) < share, other, predicted)  # NaN and -0.0 among them
    packed = packed_differences(actual, predicted)
    assert restored(packed, predicted).tobytes() == actual.tobytes()


def test_a_good_prediction_costs_few_bytes() -> None:
    predicted = RNG.normal(size=100_000).astype(np.float32)
    actual = predicted.copy()
    actual[::1000] = np.nextafter(actual[::1000], np.float32(9))
    actual[1::1000] = np.nextafter(actual[1::1000], np.float32(-9))
    assert len(packed_differences(actual, predicted)) < 8 + 200 * 3 + 1
    assert len(packed_differences(predicted, predicted)) == 8
    noisy = (predicted.view(np.uint32) + RNG.integers(-50, 50, predicted.size).astype(np.uint32)).view(np.float32)
    assert len(packed_differences(noisy, predicted)) == 8 + predicted.size  # one byte each


@pytest.mark.parametrize(
    "packed",
    [
        struct.pack("<BBBxI", 2, 1, 1, 1) + b"\0\1",  # an unknown kind
        struct.pack("<BBBxI", 0, 3, 1, 1) + b"\0\0\0\1",  # no such width
        struct.pack("<BBBxI", 0, 1, 4, 1) + b"\0\1\0\0\0",  # wider than the pattern
        struct.pack("<BBBxI", 0, 1, 1, 1 << 31),  # more values than entries
        struct.pack("<BBBxI", 0, 1, 1, 1) + b"\x0a\1",  # a position behind the end
        struct.pack("<BBBxI", 0, 1, 1, 2) + b"\x05\x05\1\1",  # two gaps that lead there
        struct.pack("<BBBxI", 0, 8, 1, 2) + struct.pack("<QQ", 1, (1 << 64) - 2) + b"\1\1",  # one that overflows
        struct.pack("<BBBxI", 1, 0, 1, 9) + bytes(9),  # fewer values than entries
        struct.pack("<BBBxI", 1, 0, 0, 10),  # no width
    ],
)
def test_what_no_merge_writes_is_refused(packed: bytes) -> None:
    with pytest.raises(InputRefused, match="the residual is damaged"):
        unpacked_differences(io.BytesIO(packed).read, 10, 2)
