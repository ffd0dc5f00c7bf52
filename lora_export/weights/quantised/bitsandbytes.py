"""Weights of bitsandbytes: nf4 and fp4 in blocks, with their scales quantised again or not; int8 in rows.

Two numbers are in a byte, the first in the high half. A number is an index into a table of 16 values. Each block of
them has a scale, the largest magnitude in it. With double quantisation the scales are indices of 8 bits into a table
of 256 values, in blocks of 256 that have scales of their own, and an offset. All arithmetic is in fp32, and the result
is rounded once to the dtype that is stored with the weight.

Source: the library's own functions on a CPU, which the tests compare with bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.plan import FLOATS
from lora_export.storage import json_files
from lora_export.storage.block_copy import Bytes
from lora_export.weights.quantised.codes import INT8_VALUES, Grid, PackedRows, StoredCodes, nearest_among
from lora_export.weights.quantised.new_grid import OldAndNew, ScaleRule, Spread
from lora_export.weights.quantised.packed_numbers import pairs_of_bytes
from lora_export.weights.quantised.stored_parts import Decode, QuantisedTensor, StoredParts

STATE = "quant_state.bitsandbytes__"  # and nf4 or fp4
MOST_STATE_BYTES = 1 << 16
TABLE_OF_4_BITS, TABLE_OF_8_BITS = 16, 256
STORAGE = ("uint8", "int8", "bfloat16", "float16", "float32")  # of packed bytes: `bnb_4bit_quant_storage`
ROW_SCALES = "SCB"
_ROUNDING = 2 * float(np.finfo(np.float32).eps)  # of a scale that is an outer scale's reach, relative to its terms
_ScalesOf = Callable[[slice], NDArray[np.float32]]
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


def _in_blocks(parts: StoredParts, weight: str, kind: str) -> QuantisedTensor:
    state_name = f"{weight}.{STATE}{kind}"
    parts.expect(state_name, weight, "uint8", most=MOST_STATE_BYTES)
    state = json_files.parse_json(parts.read(state_name).tobytes(), state_name)
    shape, dtype, block = _stated(state, state_name)
    packed = parts.expect(weight, weight, *STORAGE)
    if packed.nbytes != -(-math.prod(shape) // 2):
        raise InputRefused(f"{weight}: {packed.nbytes} bytes, and {list(shape)} numbers of 4 bits need another number")
    if shape[1] % 2:
        raise InputRefused(f"{weight}: rows of {shape[1]} numbers of 4 bits do not end with a byte: not supported")
    blocks, is_nested = -(-math.prod(shape) // block), "nested_offset" in state
    nested = _nested(state, state_name) if is_nested else None
    parts.expect(f"{weight}.quant_map", weight, "float32", count=TABLE_OF_4_BITS)
    parts.expect(f"{weight}.absmax", weight, "uint8" if is_nested else "float32", count=blocks)
    names = ["absmax", "quant_map"]
    if nested is not None:
        parts.expect(f"{weight}.nested_quant_map", weight, "float32", count=TABLE_OF_8_BITS)
        parts.expect(f"{weight}.nested_absmax", weight, "float32", count=-(-blocks // nested[0]))
        names += ["nested_absmax", "nested_quant_map"]

    def load() -> Decode:
        pairs = pairs_of_bytes(parts.read(f"{weight}.quant_map").reshape(-1), (4, 0))
        scales_of = _scales(parts, weight, nested)

        def decode(rows: slice, packed: Bytes) -> NDArray[Any]:
            first, count = rows.start * shape[1], (rows.stop - rows.start) * shape[1]
            values = pairs.take(packed).view(np.float32)
            own = slice(first // block, -(-(first + count) // block))
            if first % block == 0 and count % block == 0:
                values.reshape(-1, block)[:] *= scales_of(own)[:, None]
            else:
                values *= _of_numbers(scales_of, first, count, block)
            return values.astype(dtype).reshape(-1, shape[1])

        return decode

    def by_rows(scales_of: _ScalesOf) -> Callable[[slice], NDArray[np.float32]]:
        columns = shape[1]
        return lambda rows: _of_numbers(
            scales_of, rows.start * columns, (rows.stop - rows.start) * columns, block
        ).reshape(-1, columns)

    def grid() -> Grid:
        of_rows = by_rows(_scales(parts, weight, nested))
        return lambda rows: (of_rows(rows), None)

    codes = StoredCodes(
        shape,
        is_turned=False,
        values=parts.read(f"{weight}.quant_map").reshape(-1),
        layout=PackedRows(4, shape[1], shape[1] // 2, is_high_first=True),
        load=grid,
    )

    def spread(values: NDArray[np.float32]) -> Callable[[slice], NDArray[np.float32]]:
        return by_rows(values.reshape(-1).__getitem__)

    all_parts = (*(f"{weight}.{name}" for name in names), state_name)
    scaling = ScaleRule(f"{weight}.absmax", lambda: parts.read_scales(f"{weight}.absmax"), spread, 1.0)
    if nested is not None:
        scaling = _NestedRule.of(parts, weight, spread, nested)
    return QuantisedTensor(weight, shape, dtype, packed.name, all_parts, kind, load, codes=codes, scaling=scaling)


def _of_numbers(scales_of: _ScalesOf, first: int, count: int, block: int) -> NDArray[np.float32]:
    """The scale of each of some numbers, which begin and end anywhere in their blocks."""
    own = slice(first // block, -(-(first + count) // block))
    lengths = np.full(own.stop - own.start, block)
    lengths[0] -= first - own.start * block
    lengths[-1] -= own.stop * block - (first + count)
    return np.repeat(scales_of(own), lengths)


def _scales(parts: StoredParts, weight: str, nested: tuple[int, float] | None) -> _ScalesOf:
    """The scales of some blocks: as they are stored, or indices of 8 bits into a table, with scales of their own."""
    if nested is None:
        scales = parts.read_scales(f"{weight}.absmax").reshape(-1)
        return lambda own: scales[own]
    indices, table = (parts.read(f"{weight}.{name}").reshape(-1) for name in ("absmax", "nested_quant_map"))
    outer, (block, offset) = parts.read_scales(f"{weight}.nested_absmax").reshape(-1), nested

    def unnested(own: slice) -> NDArray[np.float32]:
        values: NDArray[np.float32] = table[indices[own]] * outer[np.arange(own.start, own.stop) // block]
        return values + np.float32(offset)

    return unnested


@dataclass(frozen=True, eq=False)
class _NestedRule(ScaleRule):
    """Scales that are quantised again. A scale here is its index in the table, and the outer scale of its block.

    An outer scale stays where all new scales of its block are in reach, beside rounding. Else it becomes the largest
    distance of one from the offset, as the library chooses it, and all scales of the block are rounded again. The
    offset stays.
    """

    table: NDArray[np.float32] = field(kw_only=True)
    block: int = field(kw_only=True)
    offset: np.float32 = field(kw_only=True)
    outer_name: str = field(kw_only=True)

    @classmethod
    def of(cls, parts: StoredParts, weight: str, spread: Spread, nested: tuple[int, float]) -> _NestedRule:
        index, outer, table = (f"{weight}.{name}" for name in ("absmax", "nested_absmax", "nested_quant_map"))
        block, offset, values = nested[0], np.float32(nested[1]), parts.read(table).reshape(-1)

        def read() -> NDArray[Any]:
            indices = parts.read(index).reshape(-1)
            return _with_outer(indices, parts.read_scales(outer).reshape(-1), block)

        def decode(scales: NDArray[Any]) -> NDArray[np.float32]:
            found: NDArray[np.float32] = values[scales["index"]] * scales["outer"] + offset
            return found

        own = index, read, spread, 1.0, decode
        return cls(*own, table=values, block=block, offset=offset, outer_name=outer)

    def tensors(self, scales: NDArray[Any]) -> dict[str, NDArray[Any]]:
        return {self.name: scales["index"].copy(), self.outer_name: scales["outer"][:: self.block].copy()}

    def renewed(self, factors: NDArray[np.float32], is_changed: NDArray[np.bool_], old: NDArray[Any]) -> NDArray[Any]:
        is_changed = is_changed & np.isfinite(factors)
        wanted = np.where(is_changed, factors, self.decode(old))
        before, needed = old["outer"][:: self.block], self._needed(wanted, is_changed)
        outer = np.where(needed > before + self._slack(wanted, _ROUNDING), needed, before)
        new = _with_outer(self._indices(wanted, np.repeat(outer, self.block)[: len(old)]), outer, self.block)
        return np.where(is_changed | (new["outer"] != old["outer"]), new, old)

    def between(
        self, factors: NDArray[np.float32], is_changed: NDArray[np.bool_], scales: OldAndNew, tolerance: float
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
        old, new = scales
        wanted = np.where(is_changed, factors, self.decode(old))
        before, after, needed = (
            old["outer"][:: self.block],
            new["outer"][:: self.block],
            self._needed(wanted, is_changed),
        )
        slack = self._slack(wanted, tolerance)
        is_raised = (needed >= before - slack) & (np.abs(after - needed) <= slack)
        is_right = np.where(after == before, needed <= before + slack, is_raised)
        ends = (self._indices(wanted * np.float32(1 + sign * tolerance), new["outer"]) for sign in (-1, 1))
        low, high = (self.decode(_with_outer(index, after, self.block)) for index in ends)
        is_wrong = ~np.repeat(is_right, self.block)[: len(old)]
        low[is_wrong] = high[is_wrong] = np.inf
        return low, high, is_changed | (new["outer"] != old["outer"])

    def _needed(self, factors: NDArray[np.float32], is_changed: NDArray[np.bool_]) -> NDArray[np.float32]:
        """The outer scales that reach the changed scales of their blocks; 0 without any."""
        rest = np.where(is_changed, np.abs(factors - self.offset) / np.abs(self.table).max(), np.float32(0))
        return self._largest(rest)

    def _slack(self, factors: NDArray[np.float32], tolerance: float) -> NDArray[np.float32]:
        return np.float32(tolerance) * np.maximum(self._largest(np.abs(factors)), np.abs(self.offset))

    def _largest(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """The largest of each block."""
        return np.maximum.reduceat(values, np.arange(0, len(values), self.block))

    def _indices(self, factors: NDArray[np.float32], outer: NDArray[np.float32]) -> NDArray[np.uint8]:
        """The nearest scales that are positive."""
        with np.errstate(all="ignore"):
            found = nearest_among(self.table)((factors - self.offset) / outer)
            order = np.argsort(self.table)
            is_small = ~(self.table[found] * outer + self.offset > 0)
            above = np.searchsorted(self.table[order], -self.offset / outer[is_small], side="right")
        found[is_small] = order[np.minimum(above, len(order) - 1)]
        return found


def _with_outer(indices: NDArray[np.uint8], outer: NDArray[np.float32], block: int) -> NDArray[Any]:
    found = np.empty(len(indices), [("index", np.uint8), ("outer", np.float32)])
    found["index"], found["outer"] = indices, np.repeat(outer, block)[: len(indices)]
    return found


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


def _nested(state: Mapping[str, Any], name: str) -> tuple[int, float]:
    """The size of the blocks of scales, and the offset of these."""
    block, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if type(block) is not int or block < 1 or not isinstance(offset, int | float) or not math.isfinite(offset):
        raise InputRefused(f"{name}: the nested scales are described by {block!r} and {offset!r}")
    return block, float(offset)


# --- int8 ---


def _in_rows(parts: StoredParts, weight: str, scales_name: str, dtype: str) -> QuantisedTensor:
    found = parts.find(weight)
    if found is None or str(found.dtype) != "int8" or len(found.shape) != 2:
        raise InputRefused(f"{weight}: {scales_name} scales a matrix of int8, which is missing")
    shape = (found.shape[0], found.shape[1])
    parts.expect(scales_name, weight, "float32", count=shape[0])
    markers = parts.present(f"{weight}_format")
    for marker in markers:
        parts.expect(marker, weight, "uint8", most=1)
        if parts.read(marker).any():
            raise InputRefused(f"{marker}: only the row-major format (0) is known")

    def load() -> Decode:
        scales = parts.read_scales(scales_name).reshape(-1)

        def decode(rows: slice, packed: Bytes) -> NDArray[Any]:
            values = packed.view(np.int8).reshape(-1, shape[1]).astype(np.float32)
            values *= scales[rows, None]
            values *= OF_INT8
            return values.astype(dtype)

        return decode

    def grid() -> Grid:
        scales = parts.read_scales(scales_name).reshape(-1, 1) * OF_INT8
        return lambda rows: (scales[rows], None)

    codes = StoredCodes(shape, False, INT8_VALUES, PackedRows(8, shape[1], shape[1]), grid)
    every = (scales_name, *markers)
    scaling = ScaleRule(
        *(scales_name, lambda: parts.read_scales(scales_name), lambda values: values.reshape(-1, 1).__getitem__),
        reach=float(1 / OF_INT8),  # the scale is the largest magnitude of a row
        decode=lambda stored: stored * OF_INT8,
        encode=lambda factors: factors / OF_INT8,
    )
    return QuantisedTensor(*(weight, shape, np.dtype(dtype), weight, every, "int8", load), codes=codes, scaling=scaling)
