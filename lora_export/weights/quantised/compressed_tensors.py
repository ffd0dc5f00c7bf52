"""Weights of compressed-tensors: integers of 4 or 8 bits packed into words, int8 and 8-bit floats.

A packed word of 32 bits begins with the lowest bits, and a number is stored plus half its range. Scales are for the
tensor, for each row, or for each group of columns; `weight_g_idx` has the group of each column. Zero points are packed
along the rows. The product of a number and its scale is exact in fp32, and is rounded once to the dtype of the scales.

Source: the library's own functions, which the tests compare with bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.storage.block_copy import Bytes
from lora_export.weights.quantised.stored_parts import QuantisedTensor, StoredParts, refuse_other_size

PACKED, UNPACKED = "pack-quantized", ("int-quantized", "float-quantized", "naive-quantized")
BITS = (4, 8)
FLOAT_SCALES = ("float32", "bfloat16", "float16")
MOST_COLUMNS = 1 << 24


def compressed_weights(parts: StoredParts, quantization: Mapping[str, Any], _: str) -> dict[str, QuantisedTensor]:
    """The weights that compressed-tensors stores, by name. Raises InputRefused for a format that is not known."""
    groups = quantization.get("config_groups")
    every = groups.values() if isinstance(groups, dict) else ()
    own = [group.get("format") for group in every if isinstance(group, dict)]
    formats = {str(name) for name in (*own, quantization.get("format")) if name}
    if unknown := formats - {PACKED, *UNPACKED, "dense", "mixed-precision"}:
        raise InputRefused(
            f"--dequantize reads {PACKED}, {' and '.join(UNPACKED[:2])} of compressed-tensors, and this base has "
            f"{', '.join(sorted(unknown))}. Merge into the original float model"
        )
    return {tensor.name: tensor for tensor in _found(parts)}


def _found(parts: StoredParts) -> Iterator[QuantisedTensor]:
    for name in parts.names():
        module, _, kind = name.rpartition(".")
        if kind == "weight_packed":
            yield _packed(parts, module)
        elif kind == "weight_scale" and parts.find(f"{module}.weight_packed") is None:
            yield _plain(parts, module)


@dataclass(frozen=True, eq=False)
class _Numbers:
    """Rows of numbers with their scales: (1 or rows, 1 or groups)."""

    columns: int
    bits: int  # 0: the stored numbers are int8 or floats
    stored: np.dtype[Any]
    scales: NDArray[Any]
    zero_points: NDArray[np.int8] | None
    group_of_column: NDArray[np.intp] | None  # None where a row has one scale

    def decode(self, rows: slice, packed: Bytes) -> NDArray[Any]:
        """Some rows of the weight, from their packed bytes."""
        count = rows.stop - rows.start
        values = self._numbers(packed.reshape(count, -1)).astype(np.float32)[:, : self.columns]
        if self.zero_points is not None:
            values -= self._of_columns(self.zero_points, rows).astype(np.float32)
        values *= self._of_columns(self.scales, rows).astype(np.float32)
        return values.astype(self.scales.dtype)

    def _numbers(self, packed: NDArray[np.uint8]) -> NDArray[Any]:
        if not self.bits:
            return packed.view(self.stored)
        if self.bits == 8:
            return packed.astype(np.int16) - 128
        numbers = np.empty((len(packed), 2 * packed.shape[1]), np.int16)
        numbers[:, 0::2], numbers[:, 1::2] = packed & 0xF, packed >> 4
        return numbers - 8

    def _of_columns(self, values: NDArray[Any], rows: slice) -> NDArray[Any]:
        own = values[rows] if len(values) > 1 else values
        return own if self.group_of_column is None else own[:, self.group_of_column]


def _packed(parts: StoredParts, module: str) -> QuantisedTensor:
    name = f"{module}.weight"
    shape = parts.read(f"{name}_shape", name, "int64", "int32", most=2).tolist()
    found = parts.find(f"{name}_packed")
    assert found is not None
    words = found[1]
    if str(words.dtype) != "int32" or len(shape) != 2 or len(words.shape) != 2 or not 0 < shape[1] < MOST_COLUMNS:
        raise InputRefused(f"{name}_packed: {list(words.shape)} of {words.dtype} is no packed matrix of {shape}")
    bits = [bits for bits in BITS if -(-shape[1] * bits // 32) == words.shape[1]]
    if shape[0] != words.shape[0] or len(bits) != 1:
        raise InputRefused(
            f"{name}_packed: rows of {words.shape[1]} words are not {shape[1]} numbers of {BITS[0]} or {BITS[1]} bits"
        )
    return _quantised(parts, name, f"{name}_packed", (shape[0], shape[1]), words.dtype, bits[0], [f"{name}_shape"])


def _plain(parts: StoredParts, module: str) -> QuantisedTensor:
    name = f"{module}.weight"
    found = parts.find(name)
    if found is None or str(found[1].dtype) not in ("int8", "float8_e4m3fn") or len(found[1].shape) != 2:
        raise InputRefused(f"{name}: {name}_scale scales a matrix of int8 or 8-bit floats, which is missing")
    shape = found[1].shape
    return _quantised(parts, name, name, (shape[0], shape[1]), found[1].dtype, 0, [])


def _quantised(
    parts: StoredParts,
    name: str,
    packed: str,
    shape: tuple[int, int],
    stored: np.dtype[Any],
    bits: int,
    others: list[str],
) -> QuantisedTensor:
    scales = parts.read(f"{name}_scale", name, *FLOAT_SCALES, most=math.prod(shape))
    scales = scales if scales.ndim == 2 else scales.reshape(-1, 1)
    groups = scales.shape[1]
    if len(scales) not in (1, shape[0]) or not groups or shape[1] % groups:
        raise InputRefused(f"{name}_scale: the shape {list(scales.shape)} does not fit a weight of {list(shape)}")
    others = [*others, f"{name}_scale"]
    group_of_column = None if groups == 1 else np.arange(shape[1]) // (shape[1] // groups)
    if parts.find(f"{name}_g_idx") is not None:
        group_of_column = _stated_groups(parts, name, shape[1], groups)
        others.append(f"{name}_g_idx")
    zero_points = None
    if parts.find(f"{name}_zero_point") is not None:
        zero_points = _zero_points(parts, name, (len(scales), groups), bits)
        others.append(f"{name}_zero_point")
    numbers = _Numbers(shape[1], bits, stored, scales, zero_points, group_of_column)
    scheme = f"{bits or 8}-bit {'floats' if str(stored).startswith('float') else 'integers'}"
    return QuantisedTensor(name, shape, scales.dtype, packed, tuple(others), scheme, numbers.decode)


def _stated_groups(parts: StoredParts, name: str, columns: int, groups: int) -> NDArray[np.intp]:
    stated = parts.read(f"{name}_g_idx", name, "int32", "int64", most=columns).reshape(-1)
    refuse_other_size(f"{name}_g_idx", stated.size, columns, "the groups of the columns")
    if stated.min() < 0 or stated.max() >= groups:
        raise InputRefused(f"{name}_g_idx: a column is in none of the {groups} groups")
    return stated.astype(np.intp)


def _zero_points(parts: StoredParts, name: str, shape: tuple[int, int], bits: int) -> NDArray[np.int8]:
    rows, groups = shape
    if not bits:
        stored = parts.read(f"{name}_zero_point", name, "int8", most=rows * groups)
        refuse_other_size(f"{name}_zero_point", stored.size, rows * groups, "the zero points")
        return stored.reshape(shape)
    words = parts.read(f"{name}_zero_point", name, "int32", most=rows * groups)
    count = -(-rows * bits // 32)
    refuse_other_size(f"{name}_zero_point", words.size, count * groups, "the packed zero points")
    by_group = np.ascontiguousarray(words.reshape(count, groups).T).view(np.uint8)  # (groups, bytes)
    if bits == 8:
        numbers = by_group.astype(np.int16) - 128
    else:
        numbers = np.stack([by_group & 0xF, by_group >> 4], axis=-1).reshape(groups, -1).astype(np.int16) - 8
    return numbers[:, :rows].T.astype(np.int8)
