"""Weights of GPTQ: integers of 2, 3, 4 or 8 bits, packed along the inputs.

    qweight  (words, outputs)  the numbers of an output below each other
    scales   (groups, outputs)
    qzeros   (groups, words)   zero points, packed along the outputs; in version 1 less 1
    g_idx    (inputs,)         the group of each input (`desc_act` orders them by their activations)

A float checkpoint has the transpose, (outputs, inputs). W = scale * (number - zero point), made in fp32 and rounded
once to the dtype of the scales. Version 1 stores a zero point of 0 as the largest number, as gptqmodel reads it.

Source: the publication's own packing, and gptqmodel 7.7 and auto-gptq 0.7.1, whose results are in the tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.options.spelling import named
from lora_export.storage.block_copy import Bytes
from lora_export.storage.safetensors_file import Entry
from lora_export.weights.quantised.codes import Grid, Numbers, StoredCodes
from lora_export.weights.quantised.new_grid import NewGrid, NewPart, ScaleRule, finer_grid, finer_scales
from lora_export.weights.quantised.packed_numbers import FINE_BITS, WORD, WORD_BYTES, pack, unpack, words_of
from lora_export.weights.quantised.stored_parts import (
    FLOAT_SCALES,
    Decode,
    Pieces,
    QuantisedTensor,
    StoredParts,
    scaled,
)

GPTQ_BITS = (2, 3, 4, 8)
FIRST, SECOND = "gptq", "gptq_v2"  # `checkpoint_format`
GPTQ_OUTPUTS_AT_ONCE = 128  # one piece is read of each row of words


def gptq_weights(parts: StoredParts, quantization: Mapping[str, Any], _: str) -> dict[str, QuantisedTensor]:
    """The weights of GPTQ, by name. Raises InputRefused for a layout that is not known."""
    layout = str(quantization.get("checkpoint_format") or quantization.get("format") or FIRST).lower()
    if layout not in (FIRST, SECOND):
        raise InputRefused(
            f"{named('dequantize', True)} reads GPTQ of the checkpoint_format {FIRST} and {SECOND}, and this base has "
            f"{layout}. Merge into the original float model, or save this one as one of these with gptqmodel"
        )
    return {
        f"{module}.weight": _GptqModule(parts, module, quantization, layout == FIRST).tensor()
        for module in parts.modules_with("qweight")
    }


@dataclass(frozen=True)
class _ColumnsOfWords:
    """Rows of inputs: the numbers of an output are below each other, in a column of words."""

    bits: int
    outputs: int

    @property
    def rows_together(self) -> int:
        return WORD // math.gcd(WORD, self.bits)

    def extent(self, rows: slice) -> tuple[int, int]:
        row_bytes = self.outputs * WORD_BYTES
        return rows.start * self.bits // WORD * row_bytes, words_of(rows.stop, self.bits) * row_bytes

    def unpack(self, rows: slice, packed: Bytes) -> Numbers:
        words = packed.view(np.uint32).reshape(-1, self.outputs)
        return unpack(np.ascontiguousarray(words.T), self.bits, rows.stop - rows.start).T

    def pack(self, codes: Numbers, packed: Bytes) -> None:
        words = packed.view(np.uint32).reshape(-1, self.outputs)
        by_output = np.ascontiguousarray(words.T)
        pack(np.ascontiguousarray(codes.T), self.bits, by_output.view(np.uint8))
        words[:] = by_output.T


@dataclass(frozen=True, eq=False)
class _GptqModule:
    parts: StoredParts
    module: str
    quantization: Mapping[str, Any]
    is_first_version: bool

    def tensor(self) -> QuantisedTensor:
        """The weight. Raises InputRefused where its parts do not fit, as far as their headers show it."""
        name = f"{self.module}.weight"
        numbers, scales, zeros = (
            self._matrix(kind, dtypes)
            for kind, dtypes in (("qweight", ("int32",)), ("scales", FLOAT_SCALES), ("qzeros", ("int32",)))
        )
        groups, outputs = scales.shape
        stated = self.parts.present(f"{self.module}.g_idx")
        bits, inputs = self._bits_and_inputs(numbers, scales, zeros, stated)
        if stated:
            self.parts.expect(*stated, name, "int32", "int64", count=inputs)
        elif groups > 1 and not self._group_size(inputs):
            raise InputRefused(f"{self.module}.g_idx is missing, and the config states no group_size")

        def pieces(rows: slice) -> Sequence[Pieces]:
            size = (rows.stop - rows.start) * WORD_BYTES
            return [Pieces(rows.start * WORD_BYTES, size, numbers.shape[0], outputs * WORD_BYTES)]

        return QuantisedTensor(
            name=name,
            shape=(outputs, inputs),
            dtype=scales.dtype,
            packed=numbers.name,
            parts=(scales.name, zeros.name, *stated),
            scheme=f"gptq {bits}-bit",
            load=lambda: self._decoder(bits, inputs, scales, zeros, stated),
            pieces=pieces,
            rows_at_once=GPTQ_OUTPUTS_AT_ONCE,
            codes=StoredCodes(
                shape=(inputs, outputs),
                is_turned=True,
                values=np.arange(1 << bits, dtype=np.float32),
                layout=_ColumnsOfWords(bits, outputs),
                load=lambda: self._grid(bits, inputs, scales, zeros, stated),
            ),
            finer=lambda: self._finer(bits, inputs, scales, zeros, stated),
            scaling=ScaleRule(
                scales.name,
                lambda: self.parts.read_scales(scales.name),
                lambda values: self._spread(values.reshape(groups, outputs), inputs, stated),
            ),
        )

    def _spread(self, values: NDArray[Any], inputs: int, stated: Sequence[str]) -> Callable[[slice], NDArray[Any]]:
        """Of each group -> of each input of some rows."""
        group_of_input = self._group_of_input(inputs, len(values), stated)
        return lambda rows: values[group_of_input[rows]]

    def _finer(self, bits: int, inputs: int, scales: Entry, zeros: Entry, stated: Sequence[str]) -> NewGrid | None:
        groups, outputs = scales.shape
        fine = finer_scales(self.parts.read_scales(scales.name), bits) if bits < FINE_BITS else None
        if fine is None:
            return None

        def load() -> Grid:
            return self._grid(bits, inputs, scales, zeros, stated)

        def packed_points() -> NDArray[np.int32]:
            points = self._scales_and_points(bits, scales, zeros)[1] << np.uint8(FINE_BITS - bits)
            packed = np.zeros((groups, words_of(outputs, FINE_BITS) * WORD_BYTES), np.uint8)
            packed[:, :outputs] = points - np.uint8(self.is_first_version)
            return packed.view(np.int32)

        every = np.arange(1 << FINE_BITS, dtype=np.float32)
        parts = {
            scales.name: NewPart(scales.shape, lambda: fine),
            zeros.name: NewPart((groups, words_of(outputs, FINE_BITS)), packed_points),
        }
        codes = StoredCodes((inputs, outputs), True, every, _ColumnsOfWords(FINE_BITS, outputs), finer_grid(load, bits))
        return NewGrid(f"gptq {FINE_BITS}-bit", codes, (words_of(inputs, FINE_BITS), outputs), parts)

    def _matrix(self, kind: str, dtypes: Sequence[str]) -> Entry:
        entry = self.parts.expect(f"{self.module}.{kind}", f"{self.module}.weight", *dtypes)
        if len(entry.shape) != 2 or not entry.nbytes:
            raise InputRefused(f"{entry.name}: the shape {list(entry.shape)} is not that of a matrix")
        return entry

    def _bits_and_inputs(self, numbers: Entry, scales: Entry, zeros: Entry, stated: Sequence[str]) -> tuple[int, int]:
        """The bits of a number, and the inputs. The config states the bits of most weights; some may have others."""
        outputs = scales.shape[1]
        first = self.quantization.get("bits")
        for bits in ([first] if first in GPTQ_BITS else []) + list(GPTQ_BITS):
            inputs = numbers.shape[0] * WORD // bits
            if stated and (group_of_input := self.parts.find(stated[0])) is not None:
                inputs = math.prod(group_of_input.shape)
            sizes = (words_of(inputs, bits), outputs), (scales.shape[0], words_of(outputs, bits))
            if (numbers.shape, zeros.shape) == sizes:
                return bits, inputs
        raise InputRefused(
            f"{self.module}.weight: qweight {list(numbers.shape)}, qzeros {list(zeros.shape)} and scales "
            f"{list(scales.shape)} are no weight of {', '.join(map(str, GPTQ_BITS[:-1]))} or {GPTQ_BITS[-1]} bits"
        )

    def _group_size(self, inputs: int) -> int:
        """How many inputs share a scale, where no file has the group of each; 0 where the config does not state it."""
        size = self.quantization.get("group_size")
        return min(size, inputs) if type(size) is int and size > 0 else 0

    def _group_of_input(self, inputs: int, groups: int, stated: Sequence[str]) -> NDArray[np.intp]:
        if stated:
            found = self.parts.read(stated[0]).reshape(-1).astype(np.intp)
        else:
            found = np.arange(inputs) // self._group_size(inputs) if groups > 1 else np.zeros(inputs, np.intp)
        if found.min() < 0 or found.max() >= groups:
            raise InputRefused(f"{self.module}.g_idx: an input is in none of the {groups} groups")
        return found

    def _scales_and_points(self, bits: int, scales: Entry, zeros: Entry) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        """Both (groups, outputs)."""
        points = unpack(np.ascontiguousarray(self.parts.read(zeros.name)).view(np.uint32), bits, scales.shape[1])
        if self.is_first_version:
            points = (points + np.uint8(1)) & np.uint8((1 << bits) - 1)
        return self.parts.read_scales(scales.name), points

    def _grid(self, bits: int, inputs: int, scales: Entry, zeros: Entry, stated: Sequence[str]) -> Grid:
        values, points = self._scales_and_points(bits, scales, zeros)
        factors, zero_points = (self._spread(each, inputs, stated) for each in (values, points))
        return lambda rows: (factors(rows).astype(np.float32), zero_points(rows))

    def _decoder(self, bits: int, inputs: int, scales: Entry, zeros: Entry, stated: Sequence[str]) -> Decode:
        groups = scales.shape[0]
        values, zero_points = (each.T for each in self._scales_and_points(bits, scales, zeros))  # (outputs, groups)
        group_of_input = self._group_of_input(inputs, groups, stated)
        equal_groups = np.arange(inputs) // max(1, inputs // groups)
        are_in_order = inputs % groups == 0 and np.array_equal(group_of_input, equal_groups)

        def decode(rows: slice, packed: Bytes) -> NDArray[Any]:
            """Some outputs, from the columns of the packed words."""
            words = packed.view(np.uint32).reshape(-1, rows.stop - rows.start)
            floats = unpack(np.ascontiguousarray(words.T), bits, inputs).astype(np.float32)
            if are_in_order:  # twice as fast as a look-up for each input
                return scaled(floats, values[rows], values.dtype, zero_points[rows])
            return scaled(floats, values[rows][:, group_of_input], values.dtype, zero_points[rows][:, group_of_input])

        return decode
