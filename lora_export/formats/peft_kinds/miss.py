"""MiSS: B alone, and an A that sums every r-th input (Kang and Yin 2024). Its mode "bat" multiplies the weight."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lora_export.errors import InputRefused
from lora_export.formats.peft_kinds.kind import Kind, Stored
from lora_export.lora import LoraPair
from lora_export.open_pairs import OpenPair, Shape


def _change(stored: Stored) -> OpenPair:
    mode, rank = stored.config.get("init_weights"), stored.config["r"]
    block = stored.part("miss_block", 2)
    if len(block) != rank:
        raise InputRefused(f"miss_block is {block.shape}, the config's rank is {rank}")

    def pair(shape: Shape, _: Sequence[Shape]) -> LoraPair:
        out, columns = shape
        repeats, rest = divmod(out, block.shape[1])
        if rest or rank > columns or (repeats > 1 and mode != "mini"):
            raise InputRefused(f"the weight is {shape}, which does not fit miss_block {block.shape}")
        a = (np.arange(columns) % rank == np.arange(rank)[:, None]).astype(np.float32)
        return LoraPair(a=a, b=np.tile(block.T, (repeats, 1)), scale=1.0)

    return OpenPair(pair, [block], None if mode == "mini" else block.shape[1])


KIND = Kind(
    peft_type="MISS",
    title="MiSS",
    change=_change,
    parts=("miss_block",),
    needed=("miss_block",),
    fields=("mini_r", "miss_dropout", "init_weights"),
    numbers=("r",),
)
