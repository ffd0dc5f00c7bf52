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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.options.spelling import named
from lora_export.storage.block_copy import Bytes
from lora_export.weights.quantised.packed_numbers import WORD_BYTES, unpack
from lora_export.weights.quantised.stored_parts import (
    FLOAT_SCALES,
    Decode,
    Pieces,
    QuantisedTensor,
    StoredParts,
    refuse_damaged_scales,
)

AWQ_NUMBERS, AWQ_ZEROS, AWQ_SCALES = "qweight", "qzeros", "scales"
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
    found = {}
    for name in parts.names():
        module, _, kind = name.rpartition(".")
        if kind == AWQ_NUMBERS:
            found[f"{module}.weight"] = _tensor(parts, module)
    return found


def _tensor(parts: StoredParts, module: str) -> QuantisedTensor:
    name, packed = f"{module}.weight", f"{module}.{AWQ_NUMBERS}"
    every = (f"{module}.{AWQ_SCALES}", f"{module}.{AWQ_ZEROS}")
    numbers, scales = parts.expect(packed, name, "int32"), parts.expect(every[0], name, *FLOAT_SCALES)
    zeros = parts.expect(every[1], name, "int32")
    shapes = [entry.shape for entry in (numbers, scales, zeros)]
    if not all(len(shape) == 2 and all(shape) for shape in shapes) or not (
        scales.shape == (zeros.shape[0], PER_WORD * zeros.shape[1])
        and numbers.shape[1] == zeros.shape[1]
        and numbers.shape[0] % scales.shape[0] == 0
    ):
        raise InputRefused(
            f"{name}: {AWQ_NUMBERS} {list(shapes[0])}, {AWQ_SCALES} {list(shapes[1])} and {AWQ_ZEROS} "
            f"{list(shapes[2])} are no weight of {AWQ_BITS} bits"
        )
    inputs, words = numbers.shape

    def pieces(rows: slice) -> Sequence[Pieces]:
        own = _words(rows)
        return [Pieces(own.start * WORD_BYTES, (own.stop - own.start) * WORD_BYTES, inputs, words * WORD_BYTES)]

    def load() -> Decode:
        values, points = parts.read(every[0]), parts.read(every[1])
        refuse_damaged_scales(every[0], values)
        return _AwqRows(inputs, values.T, _in_order(points).T).decode

    shape = (PER_WORD * words, inputs)
    scheme = f"awq {AWQ_BITS}-bit"
    return QuantisedTensor(name, shape, scales.dtype, packed, every, scheme, load, pieces, AWQ_OUTPUTS_AT_ONCE)


def _words(rows: slice) -> slice:
    """The words that have these outputs."""
    return slice(rows.start // PER_WORD, -(-rows.stop // PER_WORD))


def _in_order(words: NDArray[Any]) -> NDArray[np.uint8]:
    """The numbers of each row of words, (rows, 8 * words), in the order of the outputs."""
    rows, count = words.shape
    numbers = unpack(np.ascontiguousarray(words).view(np.uint32), AWQ_BITS, PER_WORD * count)
    return numbers.reshape(rows, count, PER_WORD)[:, :, PLACE_OF_OUTPUT].reshape(rows, -1)


@dataclass(frozen=True, eq=False)
class _AwqRows:
    """Outputs as rows: a scale and a zero point for each group of inputs."""

    inputs: int
    scales: NDArray[Any]  # (outputs, groups)
    zero_points: NDArray[np.uint8]  # (outputs, groups)

    def decode(self, rows: slice, packed: Bytes) -> NDArray[Any]:
        """Some rows of the weight, from the columns of the packed words."""
        own = _words(rows)
        numbers = _in_order(packed.view(np.int32).reshape(self.inputs, own.stop - own.start))
        first = rows.start - own.start * PER_WORD
        values = numbers[:, first : first + rows.stop - rows.start].T.astype(np.float32, order="C")
        grouped = values.reshape(len(values), self.scales.shape[1], -1)
        grouped -= self.zero_points[rows].astype(np.float32)[:, :, None]
        grouped *= self.scales[rows].astype(np.float32)[:, :, None]
        return values.astype(self.scales.dtype)
