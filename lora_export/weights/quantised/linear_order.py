"""Weights of a Conv1D (GPT-2), which some libraries quantise in the order of nn.Linear, (outputs, inputs).

The float checkpoint of such a model has (inputs, outputs): the weight is transposed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lora_export.errors import InputRefused
from lora_export.weights.quantised.stored_parts import Decode, Pieces, QuantisedTensor


def as_conv1d(
    tensor: QuantisedTensor, packed_bytes: int, is_conv1d: bool | None, is_stored_as_linear: bool
) -> QuantisedTensor:
    """The weight as the float checkpoint of its model has it. `is_conv1d` is None where that is unknown.

    `packed_bytes` is the size of its numbers. The weight of a Conv1D is decoded whole for any of its rows: such models
    are small.
    """
    if is_conv1d is False:
        return tensor
    if is_conv1d is None or not is_stored_as_linear:
        raise InputRefused(
            f"{tensor.name}: this module may be a Conv1D, and how {tensor.scheme} stores its weight is not known. "
            "Merge into the original float model"
        )
    outputs, inputs = tensor.row_shape
    every = slice(0, outputs)

    def load() -> Decode:
        decode = tensor.load()
        return lambda rows, packed: decode(every, packed).T[rows].copy()

    def pieces(_: slice) -> Sequence[Pieces]:
        return [Pieces(0, packed_bytes)] if tensor.pieces is None else tensor.pieces(every)

    return replace(tensor, shape=(inputs, outputs), load=load, pieces=pieces, rows_at_once=inputs)
