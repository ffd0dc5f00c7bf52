"""Bone, as PEFT 0.14 to 0.18 saved it: MiSS under its first name (PEFT's script converts one into the other)."""

from __future__ import annotations

from dataclasses import replace

from lora_export.formats.peft_kinds import miss

KIND = replace(
    miss.KIND, peft_type="BONE", title="Bone", parts=("bone_block",), needed=("bone_block",), fields=("init_weights",)
)
