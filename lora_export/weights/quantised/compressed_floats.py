"""compressed-tensors' floats of 4, 6 and 8 bits in groups: nvfp4, mxfp4, mxfp6 and mxfp8.

    nvfp4  4-bit floats, two in a byte; groups of 16 columns with scales in e4m3, all divided by `weight_global_scale`
    mxfp4  the same floats; groups of 32 with powers of two
    mxfp6  6-bit floats (E2M3), four in three bytes; groups of 32 with powers of two
    mxfp8  e4m3; groups of 32 with powers of two

The library makes bfloat16 of all four.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.storage.block_copy import Bytes
from lora_export.storage.safetensors_file import Entry
from lora_export.weights.quantised.codes import FLOAT8, FLOAT8_VALUES, Grid, PackedRows, StoredCodes
from lora_export.weights.quantised.packed_numbers import FLOAT4_VALUES, unpack_floats
from lora_export.weights.quantised.scaling import ScaleRule, to_exponents, to_floats8
from lora_export.weights.quantised.stored_parts import (
    Decode,
    QuantisedTensor,
    StoredParts,
    powers_of_two,
    refuse_damaged_scales,
    scaled,
)

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def _e2m3() -> NDArray[np.float32]:
    eighths = np.arange(8, dtype=np.float32) / 8
    positive = np.concatenate([eighths, *((1 + eighths) * 2**exponent for exponent in range(3))])
    return np.concatenate([positive, -positive])


SIX_BIT_VALUES = _e2m3()


def _six_bit_floats(packed: Bytes) -> NDArray[np.float32]:
    """Four numbers of 6 bits in each three bytes, from the lowest bit on."""
    octets = packed.reshape(-1, 3).astype(np.uint32)
    words = octets[:, 0] | octets[:, 1] << 8 | octets[:, 2] << 16
    codes = (words[:, None] >> np.arange(0, 24, 6, dtype=np.uint32)) & 0x3F
    values: NDArray[np.float32] = SIX_BIT_VALUES.take(codes.reshape(-1))
    return values


# (dtype of the numbers, dtype of the scales, bytes of a group) -> name, columns of a group, the floats in some bytes
GROUP_FORMATS: dict[tuple[str, str, int], tuple[str, int, Callable[[Bytes], NDArray[np.float32]]]] = {
    ("uint8", "float8_e4m3fn", 8): ("nvfp4", 16, unpack_floats),
    ("uint8", "uint8", 16): ("mxfp4", 32, unpack_floats),
    ("uint8", "uint8", 24): ("mxfp6", 32, _six_bit_floats),
    ("float8_e4m3fn", "uint8", 32): ("mxfp8", 32, lambda packed: packed.view(FLOAT8).astype(np.float32)),
}


VALUES = {"nvfp4": FLOAT4_VALUES, "mxfp4": FLOAT4_VALUES, "mxfp6": SIX_BIT_VALUES, "mxfp8": FLOAT8_VALUES}  # by code
REACH = {"nvfp4": 6.0, "mxfp4": 4.0, "mxfp6": 4.0, "mxfp8": 256.0}  # of powers of two, the largest one among the values


def floats_in_groups(parts: StoredParts, name: str, packed: str, others: tuple[str, ...]) -> QuantisedTensor:
    """A weight of floats in groups. The dtypes and the shapes of its numbers and scales decide its format."""
    numbers, scales = parts.expect(packed, name), parts.expect(f"{name}_scale", name, "uint8", "float8_e4m3fn")
    kind, columns, floats_of = _kind(name, numbers, scales)
    if parts.present(f"{name}_zero_point"):
        raise InputRefused(f"{name}_zero_point: {kind} has no zero points, and the library does not use them")
    every = (f"{name}_scale", *others)
    if kind == "nvfp4":
        parts.expect(f"{name}_global_scale", name, "float32", count=1)
        every = (f"{name}_global_scale", *every)

    def scales_of_rows() -> Callable[[slice], NDArray[np.float32]]:
        stored, divisor = parts.read(f"{name}_scale"), np.ones(1, np.float32)
        if kind == "nvfp4":
            refuse_damaged_scales(f"{name}_scale", stored)
            divisor = parts.read(f"{name}_global_scale").reshape(-1)
            if not (np.isfinite(divisor).all() and divisor.all()):
                raise InputRefused(f"{name}_global_scale: {divisor[0]} is no divisor. The file is damaged")

        def of_rows(rows: slice) -> NDArray[np.float32]:
            own = stored[rows]
            return own.astype(np.float32) / divisor if kind == "nvfp4" else powers_of_two(f"{name}_scale", own)

        return of_rows

    def grid() -> Grid:
        scales_of = scales_of_rows()
        return lambda rows: (np.repeat(scales_of(rows), columns // scales.shape[1], axis=1), None)

    def spread(values: NDArray[np.float32]) -> Callable[[slice], NDArray[np.float32]]:
        of_scales = values.reshape(scales.shape)
        return lambda rows: np.repeat(of_scales[rows], columns // scales.shape[1], axis=1)

    def divisor() -> Any:
        return parts.read(f"{name}_global_scale").reshape(-1)

    def read() -> NDArray[Any]:
        return parts.read(f"{name}_scale")

    if kind == "nvfp4":
        scaling = ScaleRule(
            *(f"{name}_scale", read, spread, REACH[kind]),
            decode=lambda stored: stored.astype(np.float32) / divisor(),
            encode=lambda factors: to_floats8(factors * divisor()),
        )
    else:
        decode = functools.partial(powers_of_two, f"{name}_scale")
        scaling = ScaleRule(f"{name}_scale", read, spread, REACH[kind], decode, to_exponents)

    def load() -> Decode:
        scales_of = scales_of_rows()

        def decode(rows: slice, packed: Bytes) -> NDArray[Any]:
            scales = scales_of(rows)
            return scaled(floats_of(packed).reshape(len(scales), -1), scales, BFLOAT16)

        return decode

    values, shape = VALUES[kind], (numbers.shape[0], columns)
    layout = PackedRows(len(values).bit_length() - 1, columns, numbers.row_bytes)
    codes = StoredCodes(shape, False, values, layout, grid)
    return QuantisedTensor(name, shape, BFLOAT16, packed, every, kind, load, codes=codes, scaling=scaling)


def _kind(name: str, numbers: Entry, scales: Entry) -> tuple[str, int, Callable[[Bytes], NDArray[np.float32]]]:
    """The name of the format, the columns of the weight, and what unpacks its numbers."""
    if len(numbers.shape) == len(scales.shape) == 2 and scales.shape[0] == numbers.shape[0] and scales.nbytes:
        groups = scales.shape[1]
        found = GROUP_FORMATS.get((str(numbers.dtype), str(scales.dtype), numbers.shape[1] // groups))
        if found is not None and numbers.shape[1] % groups == 0:
            return found[0], found[1] * groups, found[2]
    raise InputRefused(
        f"{name}: numbers of {numbers.dtype} {list(numbers.shape)} with scales of {scales.dtype} {list(scales.shape)} "
        f"are none of {', '.join(kind for kind, *_ in GROUP_FORMATS.values())}"
    )
