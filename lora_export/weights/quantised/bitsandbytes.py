"""Weights of bitsandbytes: nf4 and fp4 in blocks, with their scales quantised again or not; int8 in rows.

Two numbers are in a byte, the first in the high half. A number is an index into a table of 16 values. Each block of
them has a scale, the largest magnitude in it. With double quantisation the scales are indices of 8 bits into a table
of 256 values, in blocks of 256 that have scales of their own, and an offset. All arithmetic is in fp32, and the result
is rounded once to the dtype that is stored with the weight.

Source: the library's own functions on a CPU, which the tests compare with bit for bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.plan import FLOATS
from lora_export.storage import json_files
from lora_export.storage.block_copy import Bytes
from lora_export.storage.safetensors_file import Entry
from lora_export.weights.quantised.stored_parts import QuantisedTensor, StoredParts, refuse_other_size

STATE = "quant_state.bitsandbytes__"  # and nf4 or fp4
MOST_STATE_BYTES = 1 << 16
TABLE_OF_4_BITS, TABLE_OF_8_BITS = 16, 256
ROW_SCALES = "SCB"
OF_INT8 = np.float32(7.874015718698502e-3)  # 1 / 127, as the library rounds it


def bitsandbytes_weights(parts: StoredParts, _: Mapping[str, Any], dtype: str) -> dict[str, QuantisedTensor]:
    """The weights that bitsandbytes quantised, by name."""
    found = {}
    for name in parts.names():
        weight, marker, kind = name.partition(f".{STATE}")
        if marker:
            found[weight] = _in_blocks(parts, weight, kind)
        elif name.endswith(f".{ROW_SCALES}"):
            weight = f"{name.removesuffix(ROW_SCALES)}weight"
            found[weight] = _in_rows(parts, weight, name, dtype)
    return found


# --- nf4 and fp4 ---


@dataclass(frozen=True, eq=False)
class _Blocks:
    """The values of a weight in blocks of 4 bits: a table of values and a scale for each block."""

    shape: tuple[int, int]
    dtype: np.dtype[Any]
    block: int  # numbers that share a scale
    table: NDArray[np.float32]
    scales: NDArray[Any]  # fp32; or indices of 8 bits into `nested_table`
    nested_table: NDArray[np.float32] | None = None
    nested_scales: NDArray[np.float32] | None = None
    nested_block: int = 1
    offset: float = 0.0

    def decode(self, rows: slice, packed: Bytes) -> NDArray[Any]:
        """Some rows of the weight, from their packed bytes."""
        first, count = rows.start * self.shape[1], (rows.stop - rows.start) * self.shape[1]
        values = self._pairs.take(packed).view(np.float32)
        own = slice(first // self.block, -(-(first + count) // self.block))
        scales = self._scales(own)
        if first % self.block == 0 and count % self.block == 0:
            values.reshape(-1, self.block)[:] *= scales[:, None]
        else:
            lengths = np.full(own.stop - own.start, self.block)
            lengths[0] -= first - own.start * self.block
            lengths[-1] -= own.stop * self.block - (first + count)
            values *= np.repeat(scales, lengths)
        return values.astype(self.dtype).reshape(rows.stop - rows.start, self.shape[1])

    @functools.cached_property
    def _pairs(self) -> NDArray[np.complex64]:
        """The two values of each byte, as one element: one look-up for both."""
        both = np.arange(256)
        return np.stack([self.table[both >> 4], self.table[both & 0xF]], axis=1).view(np.complex64).reshape(-1)

    def _scales(self, own: slice) -> NDArray[np.float32]:
        if self.nested_table is None or self.nested_scales is None:
            return self.scales[own]
        outer = np.arange(own.start, own.stop) // self.nested_block
        scales: NDArray[np.float32] = self.nested_table[self.scales[own]] * self.nested_scales[outer]
        return scales + np.float32(self.offset)


def _in_blocks(parts: StoredParts, weight: str, kind: str) -> QuantisedTensor:
    state_name = f"{weight}.{STATE}{kind}"
    text = parts.read(state_name, weight, "uint8", most=MOST_STATE_BYTES).tobytes()
    state = json_files.parse_json(text, state_name)
    shape, dtype, block = _stated(state, state_name)
    count = math.prod(shape)
    packed = _packed(parts, weight, "uint8", "int8", nbytes=-(-count // 2))
    if shape[1] % 2:
        raise InputRefused(f"{weight}: rows of {shape[1]} numbers of 4 bits do not end with a byte: not supported")
    blocks = -(-count // block)
    names = ["absmax", "quant_map"]
    table = parts.read(f"{weight}.quant_map", weight, "float32", most=TABLE_OF_4_BITS)
    refuse_other_size(f"{weight}.quant_map", table.size, TABLE_OF_4_BITS, "the table of values")
    is_nested = "nested_offset" in state
    scales = parts.read(f"{weight}.absmax", weight, "uint8" if is_nested else "float32", most=blocks)
    refuse_other_size(f"{weight}.absmax", scales.size, blocks, "the scales")
    values = _Blocks(shape, dtype, block, table, scales)
    if is_nested:
        names += ["nested_absmax", "nested_quant_map"]
        values = _with_nested_scales(parts, weight, values, state, state_name)
    names = [f"{weight}.{name}" for name in names]
    return QuantisedTensor(weight, shape, dtype, packed.name, (*names, state_name), kind, values.decode)


def _stated(state: Mapping[str, Any], name: str) -> tuple[tuple[int, int], np.dtype[Any], int]:
    """The shape, the dtype and the size of the blocks that a quant_state records."""
    shape, dtype, block = state.get("shape"), str(state.get("dtype")), state.get("blocksize")
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)):
        raise InputRefused(f"{name}: the shape {shape!r} is not that of a matrix")
    if dtype not in FLOATS:
        raise InputRefused(f"{name}: the dtype {dtype!r} is no float")
    if type(block) is not int or block < 1:
        raise InputRefused(f"{name}: the block size {block!r} is no positive number")
    return (shape[0], shape[1]), np.dtype(dtype), block


def _packed(parts: StoredParts, weight: str, *dtypes: str, nbytes: int) -> Entry:
    """The entry of the packed numbers. Raises InputRefused where it is missing or has another size."""
    found = parts.find(weight)
    if found is None or str(found[1].dtype) not in dtypes:
        raise InputRefused(f"{weight}: its quantised numbers are missing")
    refuse_other_size(weight, found[1].nbytes, nbytes, "the packed weight")
    return found[1]


def _with_nested_scales(
    parts: StoredParts, weight: str, values: _Blocks, state: Mapping[str, Any], state_name: str
) -> _Blocks:
    block, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if type(block) is not int or block < 1 or not isinstance(offset, int | float) or not math.isfinite(offset):
        raise InputRefused(f"{state_name}: the nested scales are described by {block!r} and {offset!r}")
    table = parts.read(f"{weight}.nested_quant_map", weight, "float32", most=TABLE_OF_8_BITS)
    refuse_other_size(f"{weight}.nested_quant_map", table.size, TABLE_OF_8_BITS, "the table of scales")
    count = -(-values.scales.size // block)
    scales = parts.read(f"{weight}.nested_absmax", weight, "float32", most=count)
    refuse_other_size(f"{weight}.nested_absmax", scales.size, count, "the scales of scales")
    return _Blocks(
        values.shape, values.dtype, values.block, values.table, values.scales, table, scales, block, float(offset)
    )


# --- int8 ---


def _in_rows(parts: StoredParts, weight: str, scales_name: str, dtype: str) -> QuantisedTensor:
    found = parts.find(weight)
    if found is None or str(found[1].dtype) != "int8" or len(found[1].shape) != 2:
        raise InputRefused(f"{weight}: {scales_name} scales a matrix of int8, which is missing")
    shape = found[1].shape
    scales = parts.read(scales_name, weight, "float32", most=shape[0]).reshape(-1)
    refuse_other_size(scales_name, scales.size, shape[0], "the scales of the rows")
    marker = f"{weight}_format"
    names = (scales_name, *([marker] if parts.find(marker) else []))
    if names[1:] and parts.read(marker, weight, "uint8", most=1).any():
        raise InputRefused(f"{marker}: only the row-major format (0) is known")
    decode = functools.partial(_decode_rows, scales=scales, columns=shape[1], dtype=np.dtype(dtype))
    return QuantisedTensor(weight, (shape[0], shape[1]), np.dtype(dtype), weight, names, "int8", decode)


def _decode_rows(
    rows: slice, packed: Bytes, *, scales: NDArray[np.float32], columns: int, dtype: np.dtype[Any]
) -> NDArray[Any]:
    values = packed.view(np.int8).reshape(-1, columns).astype(np.float32)
    values *= scales[rows, None]
    values *= OF_INT8
    return values.astype(dtype)
