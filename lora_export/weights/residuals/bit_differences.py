"""How far bit patterns are from predicted ones, as bytes that are few where the prediction is good.

The patterns of two neighbouring values of a float type differ by one, so a rounding that went the other way is a small
integer. Where most differences are zero, the positions and values of the others are stored; else all of them, one plane
of bytes after the other, which compresses well.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused

HEADER = struct.Struct("<BBBxI")  # kind, bytes of a gap, bytes of a value, number of values
SPARSE, DENSE = 0, 1
SPARSE_BELOW = 8  # sparse where fewer than one of so many differences is not zero
UNSIGNED: dict[int, np.dtype[Any]] = {size: np.dtype(f"<u{size}") for size in (1, 2, 4, 8)}
ReadBytes = Callable[[int], bytes]  # reads exactly so many bytes


def packed_differences(actual: NDArray[Any], predicted: NDArray[Any]) -> bytes:
    """The differences of the bit patterns of two arrays of one dtype and size, as bytes."""
    unsigned = UNSIGNED[actual.dtype.itemsize]
    steps = _folded(_patterns(actual, unsigned) - _patterns(predicted, unsigned))
    positions = np.flatnonzero(steps)
    if len(positions) * SPARSE_BELOW >= steps.size:
        width = _least_width(steps)
        planes = steps.view(np.uint8).reshape(-1, unsigned.itemsize)[:, :width]
        return HEADER.pack(DENSE, 0, width, steps.size) + np.ascontiguousarray(planes.T).tobytes()
    gaps, values = np.diff(positions, prepend=-1) - 1, steps[positions]
    gap_width, width = _least_width(gaps), _least_width(values)
    head = HEADER.pack(SPARSE, gap_width, width, len(positions))
    return head + gaps.astype(UNSIGNED[gap_width]).tobytes() + values.astype(UNSIGNED[width]).tobytes()


def unpacked_differences(read: ReadBytes, size: int, itemsize: int) -> NDArray[Any]:
    """The differences of `size` patterns, from what `packed_differences` wrote.

    Reads no more than such an array can need. Raises InputRefused for what it cannot have written.
    """
    kind, gap_width, width, count = HEADER.unpack(read(HEADER.size))
    unsigned = UNSIGNED[itemsize]
    is_known = kind in (SPARSE, DENSE) and 1 <= width <= itemsize and count <= size
    if not is_known or (kind == SPARSE and (gap_width not in UNSIGNED or width not in UNSIGNED)):
        raise _damaged()
    steps = np.zeros(size, unsigned)
    if kind == DENSE:
        if count != size:
            raise _damaged()
        planes = np.frombuffer(read(width * size), np.uint8).reshape(width, size)
        steps.view(np.uint8).reshape(size, itemsize)[:, :width] = planes.T
        return _unfolded(steps)
    gaps = np.frombuffer(read(gap_width * count), UNSIGNED[gap_width])
    if gaps.size and (int(gaps.max()) >= size):
        raise _damaged()
    positions = np.cumsum(gaps.astype(np.int64) + 1) - 1
    if count and positions[-1] >= size:
        raise _damaged()
    steps[positions] = np.frombuffer(read(width * count), UNSIGNED[width])
    return _unfolded(steps)


def add_differences(predicted: NDArray[Any], differences: NDArray[Any]) -> NDArray[Any]:
    """The array whose bit patterns are those of `predicted` plus the differences; of the same dtype, flat."""
    unsigned = UNSIGNED[predicted.dtype.itemsize]
    actual: NDArray[Any] = (_patterns(predicted, unsigned) + differences).view(predicted.dtype)
    return actual


def _patterns(array: NDArray[Any], unsigned: np.dtype[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(array).reshape(-1).view(unsigned)


def _folded(differences: NDArray[Any]) -> NDArray[Any]:
    """0, -1, 1, -2, ... as 0, 1, 2, 3, ...: small differences of both signs become small numbers."""
    signed = differences.view(f"<i{differences.itemsize}")
    folded: NDArray[Any] = ((signed << 1) ^ (signed >> (8 * signed.itemsize - 1))).view(differences.dtype)
    return folded


def _unfolded(steps: NDArray[Any]) -> NDArray[Any]:
    unfolded: NDArray[Any] = (steps >> 1) ^ (-(steps & 1).view(f"<i{steps.itemsize}")).view(steps.dtype)
    return unfolded


def _least_width(values: NDArray[Any]) -> int:
    """The bytes that the largest value needs: 1, 2, 4 or 8."""
    largest = int(values.max()) if values.size else 0
    return next(size for size in UNSIGNED if largest < 1 << 8 * size)


def _damaged() -> InputRefused:
    return InputRefused("the residual is damaged: it holds differences that no merge writes")
