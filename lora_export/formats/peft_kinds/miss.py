"""MiSS: B alone, and an A that sums every r-th input (Kang and Yin 2024).

Its mode "bat", that of Bone, multiplies the weight: in square blocks W_ij, W' = W + W_ij B_i + B_i.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lora_export.errors import InputRefused
from lora_export.formats.peft_kinds.kind import Kind, Stored
from lora_export.lora import LoraPair
from lora_export.pairs.open_shape import MatrixShape, OpenPair
from lora_export.pairs.stages import RowBlocks, Stage
from lora_export.pairs.transforms import WeightTransform

_TITLE = "MiSS"


def _change(stored: Stored) -> LoraPair:
    mode, rank, (name,) = stored.config.get("init_weights"), stored.config["r"], stored.parts
    if mode == "bat":
        blocks = stored.part(name, 3)
        if blocks.shape[1:] != (rank, rank):
            raise InputRefused(f"{name} is {blocks.shape}, the config's rank is {rank}")
        return WeightTransform(_TITLE, {"miss_block": blocks}, _lower, (len(blocks) * rank, 0), rank=rank)
    block = stored.part(name, 2)
    if len(block) != rank or (mode == "mini" and block.shape[1] != stored.config.get("mini_r")):
        raise InputRefused(f"{name} is {block.shape}, which disagrees with r {rank} or mini_r of the config")

    def pair(shape: MatrixShape, _: Sequence[MatrixShape]) -> LoraPair:
        out, columns = shape
        repeats, rest = divmod(out, block.shape[1])
        if rest or rank > columns or (repeats > 1 and mode != "mini"):
            raise InputRefused(f"the weight is {shape}, which does not fit {name} {block.shape}")
        a = (np.arange(columns) % rank == np.arange(rank)[:, None]).astype(np.float32)
        return LoraPair(a=a, b=np.tile(block.T, (repeats, 1)), scale=1.0)

    return OpenPair(pair, [block], None if mode == "mini" else block.shape[1])


def _lower(transform: WeightTransform, shape: tuple[int, int]) -> tuple[Stage, ...]:
    blocks = transform.stored["miss_block"]
    if shape[1] % blocks.shape[1] and shape[1] > 1:
        raise InputRefused(f"the weight is {shape}: its inputs are no blocks of {blocks.shape[1]}")
    return (RowBlocks(matrices=blocks),)


KIND = Kind(
    peft_type="MISS",
    title=_TITLE,
    change=_change,
    parts=("miss_block",),
    needed=("miss_block",),
    fields=("mini_r", "miss_dropout", "init_weights"),
    numbers=("r",),
)
