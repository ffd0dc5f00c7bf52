"""BEFT: a trained vector is added to the bias of a layer."""

from __future__ import annotations

from lora_export.formats.peft_kinds.kind import Kind, ModuleChange, Stored


def _change(stored: Stored) -> ModuleChange:
    return ModuleChange(bias=stored.parts["beft_bias"].reshape(-1))


KIND = Kind(
    peft_type="BEFT",
    title="BEFT",
    change=_change,
    parts=("beft_bias",),
    needed=("beft_bias",),
    fields=("init_weights",),
)
