"""Weights of files for ComfyUI in nvfp4 and mxfp8: floats in groups of columns, with a scale each.

    nvfp4  weight u8 with two 4-bit floats in a byte, the first in the high half; weight_scale e4m3 for 16 columns;
           weight_scale_2 fp32, by which all scales are multiplied
    mxfp8  weight e4m3; weight_scale u8 for 32 columns, powers of two (E8M0)

`weight_scale` is in the order in which cuBLAS reads it: tiles of 128 rows and 4 groups, and in a tile the rows r,
r + 32, r + 64 and r + 96 beside each other. Rows and groups are padded to whole tiles.

Source: comfy-kitchen (tensor/nvfp4.py, tensor/mxfp8.py, float_utils.py) and comfy/ops.py of ComfyUI in 2026.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.storage.safetensors_file import Entry
from lora_export.weights.quantised.codes import FLOAT8_VALUES, PackedRows, StoredCodes
from lora_export.weights.quantised.modelopt import SECOND_SCALE
from lora_export.weights.quantised.new_grid import ScaleRule, to_floats8, to_larger_exponents
from lora_export.weights.quantised.packed_numbers import FLOAT4_VALUES
from lora_export.weights.quantised.stored_parts import QuantisedTensor, StoredParts, powers_of_two

TILE_ROWS, TILE_GROUPS, ROWS_BESIDE = 128, 4, 4


class GroupFormat(NamedTuple):
    """How a format stores its numbers and scales."""

    dtype: str  # of the numbers
    bits: int
    columns: int  # that share a scale
    scales: str  # the dtype of these
    values: NDArray[np.float32]  # of each code


FORMATS_IN_GROUPS = {
    "nvfp4": GroupFormat("uint8", 4, 16, "float8_e4m3fn", FLOAT4_VALUES),
    "mxfp8": GroupFormat("float8_e4m3fn", 8, 32, "uint8", FLOAT8_VALUES),
}


def weight_in_groups(
    parts: StoredParts, entry: Entry, module: str, kind: str, scheme: str, dtype: np.dtype[Any], others: Sequence[str]
) -> QuantisedTensor:
    """A weight of a format of FORMATS_IN_GROUPS. Raises InputRefused for parts that do not fit."""
    own, first, second = FORMATS_IN_GROUPS[kind], f"{module}.weight_scale", f"{module}.{SECOND_SCALE}"
    has_second = kind == "nvfp4"
    rows, columns = _shape(entry, own)
    groups = columns // own.columns
    padded = -(-rows // TILE_ROWS) * TILE_ROWS, -(-groups // TILE_GROUPS) * TILE_GROUPS
    parts.expect(first, entry.name, own.scales, count=padded[0] * padded[1])
    if has_second:
        parts.expect(second, entry.name, "float32", count=1)

    def read() -> NDArray[Any]:
        return parts.read_scales(first) if has_second else parts.read(first)

    def whole() -> NDArray[np.float32]:
        return parts.read_scales(second).reshape(-1) if has_second else np.ones(1, np.float32)

    def decoded(stored: NDArray[Any]) -> NDArray[np.float32]:
        return stored.astype(np.float32) * whole() if has_second else powers_of_two(first, stored)

    def spread(values: NDArray[np.float32]) -> Callable[[slice], NDArray[np.float32]]:
        flat = values.reshape(-1)
        return lambda part: np.repeat(flat[tiled_places(part, groups)], own.columns, axis=1)

    scaling = ScaleRule(
        *(first, read, spread, float(np.nanmax(own.values))),
        decode=decoded,
        encode=(lambda factors: to_floats8(factors / whole())) if has_second else to_larger_exponents,
    )
    every = (first, *([second] if has_second else ()), *others)
    shape = (rows, columns)
    layout = PackedRows(own.bits, columns, entry.row_bytes, is_high_first=own.bits == 4)
    codes = StoredCodes(shape, False, own.values, layout, scaling.grid)
    load = functools.partial(codes.decoder, dtype)
    return QuantisedTensor(entry.name, shape, dtype, entry.name, every, scheme, load, codes=codes, scaling=scaling)


def _shape(entry: Entry, own: GroupFormat) -> tuple[int, int]:
    if len(entry.shape) == 2 and entry.nbytes and entry.shape[1] * 8 // own.bits % own.columns == 0:
        return entry.shape[0], entry.shape[1] * 8 // own.bits
    raise InputRefused(f"{entry.name}: the shape {list(entry.shape)} has no whole groups of {own.columns} columns")


def tiled_places(rows: slice, groups: int) -> NDArray[np.intp]:
    """Where the scales of some rows are in the stored order, (rows, groups)."""
    row, group = np.arange(rows.start, rows.stop)[:, None], np.arange(groups)
    tile = row // TILE_ROWS * -(-groups // TILE_GROUPS) + group // TILE_GROUPS
    beside, down = np.divmod(row % TILE_ROWS, TILE_ROWS // ROWS_BESIDE)
    inside = (down * ROWS_BESIDE + beside) * TILE_GROUPS + group % TILE_GROUPS
    places: NDArray[np.intp] = tile * (TILE_ROWS * TILE_GROUPS) + inside
    return places
