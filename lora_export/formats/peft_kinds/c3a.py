"""C3A: blocks of circulant matrices (Chen et al. 2024). PEFT divides the change by the number of inputs."""

from __future__ import annotations

from lora_export.errors import InputRefused
from lora_export.formats.peft_kinds.kind import Kind, Stored
from lora_export.lora import LoraPair
from lora_export.pairs.computed import CirculantPair


def _change(stored: Stored) -> LoraPair:
    kernels, size = stored.part("c3a_kernel", 3), stored.config["block_size"]
    if kernels.shape[2] != size:
        raise InputRefused(f"c3a_kernel is {kernels.shape}, the config's block_size is {size}")
    return CirculantPair({"w": kernels}, 1 / (kernels.shape[1] * kernels.shape[2]))


KIND = Kind(
    peft_type="C3A",
    title="C3A",
    change=_change,
    parts=("c3a_kernel",),
    needed=("c3a_kernel",),
    fields=("init_weights",),
    numbers=("block_size",),
    patterns={"block_size_pattern": "block_size"},
)
