"""Kinds of PEFT's adapters that no weights can express: why, and what runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_export.errors import InputRefused

PROMPT = "it puts trained vectors before the model's inputs"
KEYS = "it puts trained keys and values before those of each attention"
ROUTED = "it mixes several changes anew for each input, by a router"
# peft_type -> why no weights can do the same. PEFT runs all of them.
NOT_WEIGHTS = {
    **dict.fromkeys(("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "CPT"), PROMPT),
    **dict.fromkeys(("PREFIX_TUNING", "CARTRIDGE"), KEYS),
    **dict.fromkeys(("XLORA", "LILY"), ROUTED),
    "POLY": "it mixes several changes anew for the task of each input",
    "ADAPTION_PROMPT": "it adds trained prompts to the attention, behind a gate",
    "SHADOW": "it runs a second, small model beside the base",
}
# peft_type -> what a merge needs, which the file does not have. PEFT makes it anew from the base.
NOT_SAVED = {
    "PSOFT": "its A and B are singular vectors of the base, whose signs differ from one library to another",
    "ADAMSS": "which outputs a part of it changes is found by k-means on singular vectors of the base",
}


def refuse_not_weights(peft_type: Any, path: Path) -> None:
    """Raise InputRefused for a kind that is no change of weights, or whose file lacks a part. `path` is its config."""
    if isinstance(peft_type, str) and peft_type in NOT_SAVED:
        raise InputRefused(
            f"{path}: peft_type is {peft_type!r}, which is not supported: {NOT_SAVED[peft_type]}, and the file does "
            "not hold them. Merge it with PEFT (merge_and_unload), and use the merged model"
        )
    if isinstance(peft_type, str) and peft_type in NOT_WEIGHTS:
        why = NOT_WEIGHTS[peft_type]
        raise InputRefused(
            f"{path}: peft_type is {peft_type!r}, which cannot be merged into weights: {why}. Run it with PEFT "
            "(PeftModel.from_pretrained)"
        )
