"""What LoHa and LoKr have in common in PEFT."""

from __future__ import annotations

from collections.abc import Callable

from lora_export.errors import InputRefused
from lora_export.formats.peft_config import adapter_scale
from lora_export.formats.peft_kinds.kind import Config

LYCORIS_FIELDS = ("rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights")
LYCORIS_PATTERNS = {"rank_pattern": "r", "alpha_pattern": "alpha"}


def own_scale(config: Config) -> Callable[[int], float]:
    """alpha / r of a module, given the rank of its tensors."""

    def scale(rank: int) -> float:
        if rank != config["r"]:
            raise InputRefused(f"its tensors have the rank {rank}, the config's is {config['r']}")
        return adapter_scale(config["r"], config["alpha"], {})

    return scale
