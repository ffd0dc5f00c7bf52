"""Experts in mxfp4, as OpenAI publishes gpt-oss: 4-bit floats in blocks of 32 with a power of two for each.

The file has `NAME_blocks` (experts, outputs, blocks, 16 bytes) and `NAME_scales` (experts, outputs, blocks). A float
checkpoint has NAME, (experts, inputs, outputs): the transpose. The product of a number and its scale is made in fp32,
and rounded once to the dtype of the model.

Source: transformers' own functions on a CPU, which the tests compare with bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.storage.block_copy import Bytes
from lora_export.weights.quantised.codes import PackedRows, StoredCodes
from lora_export.weights.quantised.new_grid import ScaleRule, to_exponents
from lora_export.weights.quantised.packed_numbers import FLOAT4_VALUES, unpack_floats
from lora_export.weights.quantised.stored_parts import Pieces, QuantisedTensor, StoredParts, powers_of_two

BLOCKS_SUFFIX, SCALES_SUFFIX = "_blocks", "_scales"
BLOCK_NUMBERS, BLOCK_BYTES = 32, 16  # numbers that share a scale, and their bytes
ROWS_IN_CACHE = 64
REACH_OF_MXFP4 = 4.0  # the largest power of two among the values
INPUTS_AT_ONCE = 16 * BLOCK_NUMBERS  # each output's bytes are read for so many inputs at once


def mxfp4_weights(parts: StoredParts, _: Mapping[str, Any], dtype: str) -> dict[str, QuantisedTensor]:
    """The experts in mxfp4, by name. Raises InputRefused for blocks without scales, and for other shapes."""
    names = [name.removesuffix(BLOCKS_SUFFIX) for name in parts.names() if name.endswith(BLOCKS_SUFFIX)]
    return {name: _quantised(parts, name, dtype) for name in names}


def _quantised(parts: StoredParts, name: str, dtype: str) -> QuantisedTensor:
    blocks = parts.expect(f"{name}{BLOCKS_SUFFIX}", name, "uint8")
    if len(blocks.shape) != 4 or blocks.shape[-1] != BLOCK_BYTES or not math.prod(blocks.shape):
        raise InputRefused(
            f"{blocks.name}: the shape is {list(blocks.shape)}, and mxfp4 needs (experts, outputs, blocks, "
            f"{BLOCK_BYTES})"
        )
    *grid, _ = blocks.shape
    scales = parts.expect(f"{name}{SCALES_SUFFIX}", name, "uint8", count=math.prod(grid))
    if scales.shape != tuple(grid):
        raise InputRefused(f"{scales.name}: the shape is {list(scales.shape)}, and the blocks need {grid}")
    experts, outputs, count = grid
    layout = _Experts(parts, scales.name, outputs, count, np.dtype(dtype))
    return QuantisedTensor(
        name=name,
        shape=(experts, count * BLOCK_NUMBERS, outputs),
        dtype=layout.dtype,
        packed=blocks.name,
        parts=(scales.name,),
        scheme="mxfp4",
        load=lambda: layout.decode,
        pieces=layout.pieces,
        rows_at_once=min(INPUTS_AT_ONCE, count * BLOCK_NUMBERS),
        codes=StoredCodes(
            shape=(experts * outputs, count * BLOCK_NUMBERS),
            is_turned=True,
            values=FLOAT4_VALUES,
            layout=PackedRows(4, count * BLOCK_NUMBERS, count * BLOCK_BYTES),
            load=lambda: layout.grid,
        ),
        scaling=ScaleRule(
            *(scales.name, lambda: parts.read(scales.name), layout.spread, REACH_OF_MXFP4),
            decode=lambda stored: powers_of_two(scales.name, stored),
            encode=to_exponents,
        ),
    )


class _RowsOfExpert(NamedTuple):
    """Consecutive rows, which are inputs of one expert, and the blocks that have them."""

    expert: int
    inputs: slice
    blocks: slice


@dataclass(frozen=True, eq=False)
class _Experts:
    """Experts of (blocks * 32 inputs, outputs), of which the file has the transposes."""

    parts: StoredParts
    scales: str  # the name of the tensor that has them
    outputs: int
    blocks: int
    dtype: np.dtype[Any]

    def pieces(self, rows: slice) -> Sequence[Pieces]:
        """Where the blocks of some inputs are: of each expert, the same range of each output's bytes."""
        row_bytes = self.blocks * BLOCK_BYTES
        return [
            Pieces(
                run.expert * self.outputs * row_bytes + run.blocks.start * BLOCK_BYTES,
                (run.blocks.stop - run.blocks.start) * BLOCK_BYTES,
                self.outputs,
                row_bytes,
            )
            for run in self._runs(rows)
        ]

    def decode(self, rows: slice, packed: Bytes) -> NDArray[Any]:
        out = np.empty((rows.stop - rows.start, self.outputs), self.dtype)
        filled, used = 0, 0
        for run in self._runs(rows):
            width, count = run.blocks.stop - run.blocks.start, run.inputs.stop - run.inputs.start
            size = self.outputs * width * BLOCK_BYTES
            values = unpack_floats(packed[used : used + size]).reshape(self.outputs, width, BLOCK_NUMBERS)
            stored = self.parts.read_rows(self.scales, slice(run.expert, run.expert + 1))[0]
            values *= powers_of_two(self.scales, stored[:, run.blocks])[:, :, None]
            first = run.inputs.start - run.blocks.start * BLOCK_NUMBERS
            own = values.reshape(self.outputs, -1)[:, first : first + count].astype(self.dtype)
            for start in range(0, self.outputs, ROWS_IN_CACHE):  # all rows at once take 2.5 times as long
                part = slice(start, start + ROWS_IN_CACHE)
                out[filled : filled + count, part] = own[part].T
            filled, used = filled + count, used + size
        return out

    def grid(self, rows: slice) -> tuple[NDArray[np.float32], None]:
        """The scale of each number of some rows in the order of the file, which are outputs of experts."""
        experts = slice(rows.start // self.outputs, -(-rows.stop // self.outputs))
        stored = self.parts.read_rows(self.scales, experts).reshape(-1, self.blocks)
        first = rows.start - experts.start * self.outputs
        own = powers_of_two(self.scales, stored[first : first + rows.stop - rows.start])
        return np.repeat(own, BLOCK_NUMBERS, axis=1), None

    def spread(self, values: NDArray[np.float32]) -> Callable[[slice], NDArray[np.float32]]:
        of_scales = values.reshape(-1, self.blocks)
        return lambda rows: np.repeat(of_scales[rows], BLOCK_NUMBERS, axis=1)

    def _runs(self, rows: slice) -> Iterator[_RowsOfExpert]:
        """The rows, expert by expert."""
        inputs, start = self.blocks * BLOCK_NUMBERS, rows.start
        while start < rows.stop:
            expert = start // inputs
            own = slice(start - expert * inputs, min(rows.stop - expert * inputs, inputs))
            yield _RowsOfExpert(expert, own, slice(own.start // BLOCK_NUMBERS, -(-own.stop // BLOCK_NUMBERS)))
            start = expert * inputs + own.stop
