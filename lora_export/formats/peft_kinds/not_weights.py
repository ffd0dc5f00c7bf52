"""Kinds of PEFT's adapters that no weights can express: why, and what runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_export.errors import InputRefused

PROMPT = "it puts trained vectors before the inputs of the model or of its layers"
IN_PEFT = "PEFT runs it"
# peft_type -> why its change is none of weights, and what runs it.
NOT_WEIGHTS = {
    **dict.fromkeys(("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "CPT"), (PROMPT, IN_PEFT)),
    **dict.fromkeys(("PREFIX_TUNING", "CARTRIDGE"), ("it puts trained keys and values into the attention", IN_PEFT)),
    "ADAPTION_PROMPT": ("it adds trained prompts inside of the attention, behind a gate", IN_PEFT),
    "XLORA": ("it mixes several LoRA adapters anew for each token, by a trained classifier", IN_PEFT),
    "POLY": ("it mixes several LoRA modules for each task of the input", IN_PEFT),
    "LILY": ("it mixes shared matrices by a router of each input", IN_PEFT),
    "PEANUT": ("it adds a network of its own that is not linear in the weights", IN_PEFT),
    "SHADOW": ("it adds a second, small model beside the base", IN_PEFT),
}


def refuse_not_weights(peft_type: Any, path: Path) -> None:
    """Raise InputRefused for a kind that is no change of weights. `path` is its config."""
    if isinstance(peft_type, str) and peft_type in NOT_WEIGHTS:
        why, runs = NOT_WEIGHTS[peft_type]
        raise InputRefused(f"{path}: {peft_type} cannot be weights: {why}. {runs}")
