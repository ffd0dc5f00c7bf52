"""Tuning of normalisation layers: the adapter has these layers as wholes (Zhao et al. 2023)."""

from __future__ import annotations

from lora_export.formats.peft_kinds.kind import Kind, ModuleChange, Stored

LAYER = "ln_tuning_layers."


def _change(stored: Stored) -> ModuleChange:
    return ModuleChange(replaced={part.removeprefix(LAYER): tensor for part, tensor in stored.parts.items()})


KIND = Kind(
    peft_type="LN_TUNING",
    title="LN tuning",
    change=_change,
    parts=(f"{LAYER}weight", f"{LAYER}bias"),
)
