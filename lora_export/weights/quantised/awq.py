"""Weights of AWQ (version gemm): integers of 4 bits, packed along the outputs.

    qweight  (inputs, words)   8 outputs in a word
    scales   (groups, outputs) a group is the inputs that follow each other
    qzeros   (groups, words)   zero points, packed as the numbers

A word has its outputs in the order 0, 2, 4, 6, 1, 3, 5, 7, from the lowest bits on. A float checkpoint has the
transpose, (outputs, inputs). W = (number - zero point) * scale, made in fp32 and rounded once to the dtype of the
scales. The layers before such a weight were scaled too: the weights fit only the model that they were stored with.

Source: autoawq 0.2.9, whose results are in the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.options.spelling import named
from lora_export.storage.block_copy import Bytes
from lora_export.weights.quantised.codes import Grid, Numbers, StoredCodes
from lora_export.weights.quantised.new_grid import ScaleRule
from lora_export.weights.quantised.packed_numbers import WORD_BYTES, pack, unpack
from lora_export.weights.quantised.stored_parts import (
    FLOAT_SCALES,
    Decode,
    Pieces,
    QuantisedTensor,
    StoredParts,
    scaled,
)

AWQ_GEMM = "gemm"
AWQ_BITS, PER_WORD = 4, 8
PLACE_OF_OUTPUT = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # in its word
AWQ_OUTPUTS_AT_ONCE = 256  # one piece is read of each input


def awq_weights(parts: StoredParts, quantization: Mapping[str, Any], _: str) -> dict[str, QuantisedTensor]:
    """The weights of AWQ, by name. Raises InputRefused for a version or a number of bits that is not known."""
    stated = (quantization.get(key) for key in ("version", "checkpoint_format", "format"))
    version = str(next(filter(None, stated), AWQ_GEMM)).lower()
    bits = quantization.get("bits", quantization.get("w_bit", AWQ_BITS))
    if version != AWQ_GEMM or bits != AWQ_BITS:
        raise InputRefused(
            f"{named('dequantize', True)} reads AWQ of the version {AWQ_GEMM} in {AWQ_BITS} bits, and this base has "
            f"{version} in {bits} bits. Dequantise this one with its own library"
        )
    return {f"{module}.weight": _tensor(parts, module) for module in parts.modules_with("qweight")}


def _tensor(parts: StoredParts, module: str) -> QuantisedTensor:
    name = f"{module}.weight"
    numbers, zeros = (parts.expect(f"{module}.{kind}", name, "int32") for kind in ("qweight", "qzeros"))
    scales = parts.expect(f"{module}.scales", name, *FLOAT_SCALES)
    shapes = [entry.shape for entry in (numbers, scales, zeros)]
    if not all(len(shape) == 2 and all(shape) for shape in shapes) or not (
        scales.shape == (zeros.shape[0], PER_WORD * zeros.shape[1])
        and numbers.shape[1] == zeros.shape[1]
        and numbers.shape[0] % scales.shape[0] == 0
    ):
        raise InputRefused(
            f"{name}: qweight {list(shapes[0])}, scales {list(shapes[1])} and qzeros {list(shapes[2])} are no weight "
            f"of {AWQ_BITS} bits"
        )
    inputs, words = numbers.shape

    def pieces(rows: slice) -> Sequence[Pieces]:
        own = _words(rows)
        return [Pieces(own.start * WORD_BYTES, (own.stop - own.start) * WORD_BYTES, inputs, words * WORD_BYTES)]

    def load() -> Decode:
        values, points = parts.read_scales(scales.name).T, _in_order(parts.read(zeros.name)).T  # (outputs, groups)

        def decode(rows: slice, packed: Bytes) -> NDArray[Any]:
            """Some outputs, from the columns of the packed words."""
            own = _words(rows)
            ordered = _in_order(packed.view(np.int32).reshape(inputs, own.stop - own.start))
            first = rows.start - own.start * PER_WORD
            floats = ordered[:, first : first + rows.stop - rows.start].T.astype(np.float32, order="C")
            return scaled(floats, values[rows], values.dtype, points[rows])

        return decode

    def spread(values: NDArray[Any]) -> Callable[[slice], NDArray[Any]]:
        of_groups = values.reshape(scales.shape)
        size = inputs // len(of_groups)
        return lambda rows: of_groups[np.arange(rows.start, rows.stop) // size]

    def grid() -> Grid:
        factors, points = spread(parts.read_scales(scales.name)), spread(_in_order(parts.read(zeros.name)))
        return lambda rows: (factors(rows).astype(np.float32), points(rows))

    every, scheme = (scales.name, zeros.name), f"awq {AWQ_BITS}-bit"
    shape, levels = (PER_WORD * words, inputs), np.arange(1 << AWQ_BITS, dtype=np.float32)
    codes = StoredCodes(shape[::-1], True, levels, _RowsOfWords(words), grid)
    return QuantisedTensor(
        *(name, shape, scales.dtype, numbers.name, every, scheme, load, pieces, AWQ_OUTPUTS_AT_ONCE),
        codes=codes,
        scaling=ScaleRule(scales.name, lambda: parts.read_scales(scales.name), spread),
    )


@dataclass(frozen=True)
class _RowsOfWords:
    """Rows of inputs, whose outputs have an order of their own in each word."""

    words: int  # of a row
    rows_together: int = 1

    def extent(self, rows: slice) -> tuple[int, int]:
        row_bytes = self.words * WORD_BYTES
        return rows.start * row_bytes, rows.stop * row_bytes

    def unpack(self, _: slice, packed: Bytes) -> Numbers:
        return _in_order(packed.view(np.int32).reshape(-1, self.words))

    def pack(self, codes: Numbers, packed: Bytes) -> None:
        ordered = codes.reshape(len(codes), self.words, PER_WORD)[:, :, np.argsort(PLACE_OF_OUTPUT)]
        pack(ordered.reshape(len(codes), -1), AWQ_BITS, packed.reshape(len(codes), -1))


def _words(rows: slice) -> slice:
    """The words that have these outputs."""
    return slice(rows.start // PER_WORD, -(-rows.stop // PER_WORD))


def _in_order(words: NDArray[Any]) -> NDArray[np.uint8]:
    """The numbers of each row of words, (rows, 8 * words), in the order of the outputs."""
    rows, count = words.shape
    numbers = unpack(np.ascontiguousarray(words).view(np.uint32), AWQ_BITS, PER_WORD * count)
    return numbers.reshape(rows, count, PER_WORD)[:, :, PLACE_OF_OUTPUT].reshape(rows, -1)
