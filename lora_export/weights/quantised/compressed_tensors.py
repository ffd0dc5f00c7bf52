"""Weights of compressed-tensors: integers of 1 to 8 bits, packed into words or as int8, and floats of 4 to 8 bits.

A number is stored plus half its range where it is packed. Scales are for the tensor, for each row, for each group of
columns, or for each block; `weight_g_idx` has the group of each column. Zero points of packed numbers are packed along
the rows. The product of a number and its scale is made in fp32, and is rounded once to the dtype of the scales.

Floats in groups, of which the library makes bfloat16:

    nvfp4  4-bit floats, two in a byte; groups of 16 columns with scales in e4m3, all divided by `weight_global_scale`
    mxfp4  the same floats; groups of 32 with powers of two
    mxfp6  6-bit floats (E2M3), four in three bytes; groups of 32 with powers of two
    mxfp8  e4m3; groups of 32 with powers of two

Source: the library's own functions, which the tests compare with bit for bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.options.spelling import named
from lora_export.storage.safetensors_file import Entry
from lora_export.weights.quantised.codes import FLOAT8_VALUES, INT8_VALUES, Grid, PackedRows, StoredCodes
from lora_export.weights.quantised.new_grid import (
    NewGrid,
    NewPart,
    ScaleRule,
    finer_grid,
    finer_scales,
    to_exponents,
    to_floats8,
)
from lora_export.weights.quantised.packed_numbers import (
    FINE_BITS,
    FLOAT4_VALUES,
    MOST_BITS,
    WORD_BYTES,
    unpack,
    words_of,
)
from lora_export.weights.quantised.stored_parts import (
    FLOAT_SCALES,
    DecodeScales,
    QuantisedTensor,
    StoredParts,
    in_groups,
    powers_of_two,
)

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def _e2m3() -> NDArray[np.float32]:
    eighths = np.arange(8, dtype=np.float32) / 8
    positive = np.concatenate([eighths, *((1 + eighths) * 2**exponent for exponent in range(3))])
    return np.concatenate([positive, -positive])


SIX_BIT_VALUES = _e2m3()


# (dtype of the numbers, dtype of the scales, bytes of a group) -> name, columns of a group
GROUP_FORMATS: dict[tuple[str, str, int], tuple[str, int]] = {
    ("uint8", "float8_e4m3fn", 8): ("nvfp4", 16),
    ("uint8", "uint8", 16): ("mxfp4", 32),
    ("uint8", "uint8", 24): ("mxfp6", 32),
    ("float8_e4m3fn", "uint8", 32): ("mxfp8", 32),
}


VALUES = {"nvfp4": FLOAT4_VALUES, "mxfp4": FLOAT4_VALUES, "mxfp6": SIX_BIT_VALUES, "mxfp8": FLOAT8_VALUES}  # by code
REACH = {"nvfp4": 6.0, "mxfp4": 4.0, "mxfp6": 4.0, "mxfp8": 256.0}  # of powers of two, the largest one among the values


def floats_in_groups(parts: StoredParts, name: str, packed: str, others: tuple[str, ...]) -> QuantisedTensor:
    """A weight of floats in groups. The dtypes and the shapes of its numbers and scales decide its format."""
    numbers, scales = parts.expect(packed, name), parts.expect(f"{name}_scale", name, "uint8", "float8_e4m3fn")
    kind, columns = _kind(name, numbers, scales)
    if parts.present(f"{name}_zero_point"):
        raise InputRefused(f"{name}_zero_point: {kind} has no zero points, and the library does not use them")
    every = (f"{name}_scale", *others)
    if kind == "nvfp4":
        parts.expect(f"{name}_global_scale", name, "float32", count=1)
        every = (f"{name}_global_scale", *every)

    def divisor() -> NDArray[np.float32]:
        found: NDArray[np.float32] = parts.read(f"{name}_global_scale").reshape(-1)
        if not (np.isfinite(found).all() and found.all()):
            raise InputRefused(f"{name}_global_scale: {found[0]} is no divisor. The file is damaged")
        return found

    def load_scales() -> DecodeScales:
        if kind != "nvfp4":
            return functools.partial(powers_of_two, f"{name}_scale")
        whole = divisor()
        return lambda stored: stored.astype(np.float32) / whole

    return in_groups(
        *(parts, name, numbers, scales, columns, BFLOAT16, every, kind),
        values=VALUES[kind],
        reach=REACH[kind],
        load_scales=load_scales,
        encode=(lambda factors: to_floats8(factors * divisor())) if kind == "nvfp4" else to_exponents,
    )


def _kind(name: str, numbers: Entry, scales: Entry) -> tuple[str, int]:
    """The name of the format, and the columns of the weight."""
    if len(numbers.shape) == len(scales.shape) == 2 and scales.shape[0] == numbers.shape[0] and scales.nbytes:
        groups = scales.shape[1]
        found = GROUP_FORMATS.get((str(numbers.dtype), str(scales.dtype), numbers.shape[1] // groups))
        if found is not None and numbers.shape[1] % groups == 0:
            return found[0], found[1] * groups
    raise InputRefused(
        f"{name}: numbers of {numbers.dtype} {list(numbers.shape)} with scales of {scales.dtype} {list(scales.shape)} "
        f"are none of {', '.join(kind for kind, _ in GROUP_FORMATS.values())}"
    )


COMPRESSED_FORMATS = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized"),
)
NO_FORMATS = ("dense", "mixed-precision")
USUAL_BITS = (4, 8)  # where the config states none
MOST_COLUMNS = 1 << 24
_Arguments = Sequence[Mapping[str, Any]]  # what the groups of the config state of their weights
# What the library stores of a module's inputs and outputs. A float model has no use for it.
ACTIVATION_PARTS = tuple(
    f"{what}_{kind}" for what in ("input", "output") for kind in ("scale", "zero_point", "global_scale", "g_idx")
)


def compressed_weights(parts: StoredParts, quantization: Mapping[str, Any], _: str) -> dict[str, QuantisedTensor]:
    """The weights that compressed-tensors stores, by name. Raises InputRefused for a format that is not known."""
    groups = quantization.get("config_groups")
    groups = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    formats = {str(name) for name in (*(group.get("format") for group in groups), quantization.get("format")) if name}
    if unknown := formats - {*COMPRESSED_FORMATS, *NO_FORMATS}:
        raise InputRefused(
            f"{named('dequantize', True)} reads {', '.join(COMPRESSED_FORMATS)} of compressed-tensors, and this base "
            f"has {', '.join(sorted(unknown))}. Merge into the original float model"
        )
    transforms = quantization.get("transform_config")
    if isinstance(transforms, dict) and transforms.get("config_groups"):
        raise InputRefused(
            "the transform_config of this base rotates weights and the inputs of its layers, which a merge cannot "
            "follow. Merge into the original float model"
        )
    arguments = [group["weights"] for group in groups if isinstance(group.get("weights"), dict)]
    return {tensor.name: tensor for tensor in _found(parts, arguments)}


def _found(parts: StoredParts, arguments: _Arguments) -> Iterator[QuantisedTensor]:
    for name in parts.names():
        module, _, kind = name.rpartition(".")
        others = parts.present(*(f"{module}.{activation}" for activation in ACTIVATION_PARTS))
        weight, packed = f"{module}.weight", f"{module}.weight_packed"
        is_packed = kind == "weight_packed"
        if not is_packed and (kind != "weight_scale" or parts.present(packed)):
            continue
        found = parts.find(name)  # of floats in groups, both the numbers and the scales are bytes
        if found is not None and str(found.dtype) == "uint8":
            yield floats_in_groups(parts, weight, packed if is_packed else weight, others)
        else:
            yield (_packed_integers if is_packed else _plain_numbers)(parts, weight, arguments, others)


# --- Integers, and floats with scales of rows or blocks ---


def _packed_integers(parts: StoredParts, name: str, arguments: _Arguments, others: tuple[str, ...]) -> QuantisedTensor:
    """A weight of integers in words (pack-quantized). `arguments` are the config's of all weights."""
    parts.expect(f"{name}_shape", name, "int64", "int32", count=2)
    rows, columns = parts.read(f"{name}_shape").reshape(-1).tolist()
    shape = (rows, columns)
    words = parts.expect(f"{name}_packed", name, "int32")
    if len(words.shape) != 2 or not 0 < shape[1] < MOST_COLUMNS:
        raise InputRefused(f"{name}_packed: {list(words.shape)} of {words.dtype} is no packed matrix of {list(shape)}")
    bits = [bits for bits in _stated_bits(arguments) if words_of(shape[1], bits) == words.shape[1]]
    if shape[0] != words.shape[0] or len(bits) != 1:
        raise InputRefused(
            f"{name}_packed: {words.shape[0]} rows of {words.shape[1]} words are not {shape[0]} rows of {shape[1]} "
            f"numbers of {' or '.join(map(str, _stated_bits(arguments)))} bits"
        )
    stored = _StoredNumbers(parts, name, shape, words.dtype, bits[0], _block(arguments, shape))
    return stored.tensor(f"{name}_packed", (f"{name}_shape", *others))


def _plain_numbers(parts: StoredParts, name: str, arguments: _Arguments, others: tuple[str, ...]) -> QuantisedTensor:
    """A weight of int8 or 8-bit floats (int-quantized, float-quantized, naive-quantized)."""
    found = parts.find(name)
    if found is None or str(found.dtype) not in ("int8", "float8_e4m3fn") or len(found.shape) != 2:
        raise InputRefused(f"{name}: {name}_scale scales a matrix of int8 or 8-bit floats, which is missing")
    stored = _StoredNumbers(parts, name, (found.rows, found.shape[1]), found.dtype, 0, _block(arguments, found.shape))
    return stored.tensor(name, others)


def _stated_bits(arguments: _Arguments) -> Sequence[int]:
    stated = {each.get("num_bits") for each in arguments}
    return sorted(bits for bits in stated if type(bits) is int and 0 < bits <= MOST_BITS) or USUAL_BITS


def _block(arguments: _Arguments, shape: Sequence[int]) -> tuple[int, int] | None:
    """The rows and columns that share a scale, where the config states it for a weight of blocks."""
    stated = {tuple(each["block_structure"]) for each in arguments if isinstance(each.get("block_structure"), list)}
    if len(stated) != 1:
        return None
    block = next(iter(stated))
    if len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise InputRefused(f"the block_structure of the config is {list(block)}, and not two positive numbers")
    return min(block[0], shape[0]), min(block[1], shape[1])


@dataclass(frozen=True, eq=False)
class _StoredNumbers:
    """A weight whose numbers are found; its scales and zero points. `bits` is 0 for int8 and floats."""

    parts: StoredParts
    name: str
    shape: tuple[int, int]
    stored: np.dtype[Any]
    bits: int
    block: tuple[int, int] | None

    def tensor(self, packed: str, others: tuple[str, ...]) -> QuantisedTensor:
        """The quantised tensor. Raises InputRefused where its parts do not fit, as far as their headers show it."""
        name, (rows, columns) = self.name, self.shape
        scales = self.parts.expect(f"{name}_scale", name, *FLOAT_SCALES, most=rows * columns)
        grid = (scales.shape[0], scales.shape[1]) if len(scales.shape) == 2 else (math.prod(scales.shape), 1)
        is_block = grid == self._grid_of_blocks
        if not is_block and (grid[0] not in (1, rows) or not grid[1] or columns % grid[1]):
            raise InputRefused(
                f"{name}_scale: the shape {list(scales.shape)} does not fit a weight of {[rows, columns]}"
            )
        if groups := self.parts.present(f"{name}_g_idx"):
            self.parts.expect(*groups, name, "int32", "int64", count=columns)
        if zero_points := self.parts.present(f"{name}_zero_point"):
            dtype = "int32" if self.bits else "int8"
            count = words_of(grid[0], self.bits) if self.bits else grid[0]
            self.parts.expect(*zero_points, name, dtype, count=count * grid[1])
        scheme = f"{self.bits or 8}-bit {'floats' if str(self.stored).startswith('float') else 'integers'}"

        def spread(values: NDArray[Any]) -> Callable[[slice], NDArray[np.float32]]:
            of_scales = values.reshape(grid)
            of_column = self._stated_groups(grid[1]) if groups else self._groups(grid[1], is_block=is_block)
            share = self.block[0] if is_block and self.block else int(grid[0] > 1)  # rows with one scale; 0: all

            def of_rows(own: slice) -> NDArray[np.float32]:
                each = of_scales
                if share:
                    each = each[own] if share == 1 else each[np.arange(own.start, own.stop) // share]
                wide = each.astype(np.float32)
                return wide if of_column is None else wide.take(of_column, axis=1)  # an index would turn its memory

            return of_rows

        def load_grid() -> Grid:
            factors, points = spread(self._scales()), spread(self._zero_points(grid)) if zero_points else None
            return lambda own: (factors(own), None if points is None else points(own))

        every = (*others, f"{name}_scale", *groups, *zero_points)
        row_bytes = self.parts.expect(packed, name).row_bytes
        codes = StoredCodes(self.shape, False, self.values, PackedRows(self.bits or 8, columns, row_bytes), load_grid)

        def finer() -> NewGrid | None:
            fine = finer_scales(self._scales(), self.bits) if 0 < self.bits < FINE_BITS else None
            if fine is None:
                return None
            words, wide = words_of(columns, FINE_BITS), replace(self, bits=FINE_BITS)
            layout = PackedRows(FINE_BITS, columns, words * WORD_BYTES)
            parts = {f"{name}_scale": NewPart(scales.shape, lambda: fine)}
            if zero_points:
                shape = (words_of(grid[0], FINE_BITS), grid[1])
                parts[zero_points[0]] = NewPart(shape, lambda: wide.packed_points(self._zero_points(grid), self.bits))
            codes = StoredCodes(self.shape, False, wide.values, layout, finer_grid(load_grid, self.bits))
            return NewGrid(f"{FINE_BITS}-bit integers", codes, (rows, words), parts)

        return QuantisedTensor(
            *(name, (rows, columns), scales.dtype, packed, every, scheme),
            load=functools.partial(codes.decoder, scales.dtype),
            codes=codes,
            finer=finer,
            scaling=ScaleRule(f"{name}_scale", self._scales, spread, 0.0 if zero_points else self._reach),
        )

    @property
    def _reach(self) -> float:
        """Half the range of the values (`calculate_qparams`)."""
        return float(np.nanmax(self.values) - np.nanmin(self.values)) / 2

    def _scales(self) -> NDArray[Any]:
        return self.parts.read_scales(f"{self.name}_scale")

    def packed_points(self, points: NDArray[np.int8], bits: int) -> NDArray[np.int32]:
        """Zero points of `bits` as those of 8 bits, packed along the rows: (rows, groups) -> (words, groups)."""
        stored = (points.astype(np.int16) * (1 << (FINE_BITS - bits)) + (1 << (FINE_BITS - 1))).astype(np.uint8)
        packed = np.zeros((points.shape[1], words_of(len(points), FINE_BITS) * WORD_BYTES), np.uint8)
        packed[:, : len(points)] = stored.T
        return np.ascontiguousarray(packed.view(np.int32).T)

    @property
    def values(self) -> NDArray[np.float32]:
        """The value of each code."""
        if self.bits:
            return np.arange(1 << self.bits, dtype=np.float32) - np.float32(1 << (self.bits - 1))
        return INT8_VALUES if self.stored == np.int8 else FLOAT8_VALUES

    @property
    def _grid_of_blocks(self) -> tuple[int, int] | None:
        if self.block is None:
            return None
        return -(-self.shape[0] // self.block[0]), -(-self.shape[1] // self.block[1])

    def _groups(self, groups: int, *, is_block: bool) -> NDArray[np.intp] | None:
        if groups == 1:
            return None
        width = self.block[1] if is_block and self.block else self.shape[1] // groups
        return np.arange(self.shape[1]) // width

    def _stated_groups(self, groups: int) -> NDArray[np.intp]:
        stated = self.parts.read(f"{self.name}_g_idx").reshape(-1)
        if stated.min() < 0 or stated.max() >= groups:
            raise InputRefused(f"{self.name}_g_idx: a column is in none of the {groups} groups")
        return stated.astype(np.intp)

    def _zero_points(self, grid: tuple[int, int]) -> NDArray[np.int8]:
        stored = self.parts.read(f"{self.name}_zero_point")
        if not self.bits:
            return stored.reshape(grid)
        rows, groups = grid
        by_group = np.ascontiguousarray(stored.reshape(-1, groups).T).view(np.uint32)  # (groups, words)
        numbers = unpack(by_group, self.bits, rows).astype(np.int16) - (1 << (self.bits - 1))
        return numbers.T.astype(np.int8)
