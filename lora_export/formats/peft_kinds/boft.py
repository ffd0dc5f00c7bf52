"""BOFT in PEFT: inputs are rotated in blocks, in several orders of the inputs, and outputs scaled (Liu et al. 2024).

W' = s ∘ (W M₀ᵀ M₁ᵀ ...), each M the blocks in an order of a butterfly. The bias is not scaled.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.formats.peft_kinds.kind import Kind, Stored
from lora_export.formats.peft_kinds.oft import change_of_rotation
from lora_export.lora import LoraPair
from lora_export.pairs.stages import Blocks, EntryWise, Stage
from lora_export.pairs.transforms import WeightTransform

_TITLE = "BOFT"


def _change(stored: Stored) -> WeightTransform:
    blocks, scales = stored.part("boft_R", 4), stored.part("boft_s", 2)
    if blocks.shape[2] != blocks.shape[3]:
        raise InputRefused(f"boft_R is {blocks.shape}; (factors, blocks, size, size) is needed")
    factors, count, size, _ = blocks.shape
    if factors > 1 and (size % 2 or count % 2 ** (factors - 1)):
        raise InputRefused(f"boft_R is {blocks.shape}: so many blocks have no butterfly of {factors} factors")
    if 1 not in scales.shape:  # (out, 1) of a linear layer, (1, out) of a convolution
        raise InputRefused(f"boft_s is {scales.shape}; it has a scale for each output")
    tensors = {"boft_R": blocks, "boft_s": scales.reshape(-1)}
    return WeightTransform(_TITLE, tensors, _lower, (scales.size, count * size), rank=size)


def _lower(transform: WeightTransform, shape: tuple[int, int]) -> tuple[Stage, ...]:
    blocks, scales = transform.stored["boft_R"].astype(np.float64), transform.stored["boft_s"]
    if any(size != transform.whole[2] for size in transform.whole[3:]):
        raise InputRefused("PEFT's BOFT has rotations for square kernels alone")
    half_skew = (blocks - blocks.swapaxes(2, 3)) / 2
    rotations = [
        Blocks(
            turned=True,
            less_identity=change_of_rotation(each, 0).astype(np.float32),
            order=_order(number, *each.shape[:2]),
        )
        for number, each in enumerate(half_skew)
    ]
    ones = np.ones((1, shape[1]), np.float32)
    return (*rotations, EntryWise(factor=LoraPair(a=ones, b=(scales - np.float32(1))[:, None], scale=1.0)))


def _order(factor: int, count: int, size: int) -> NDArray[np.int64] | None:
    """The inputs in the order in which they form the blocks of a factor: in each group, the even half blocks first."""
    if not factor:
        return None
    halves = np.arange(count * size).reshape(-1, 2**factor, 2, size // 2)  # (group, pair, parity, half a block)
    place = halves.swapaxes(1, 2).reshape(-1)  # where the butterfly puts each input
    return np.argsort(place)


KIND = Kind(
    peft_type="BOFT",
    title=_TITLE,
    change=_change,
    parts=("boft_R", "boft_s"),
    needed=("boft_R", "boft_s"),
    fields=(
        *("boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout"),
        *("fan_in_fan_out", "init_weights"),
    ),
)
