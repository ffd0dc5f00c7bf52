"""LoKr in PEFT: the Kronecker product of two factors, each whole or decomposed.

PEFT multiplies by alpha / r in all cases, LyCORIS only where a factor is decomposed.
"""

from __future__ import annotations

from lora_export.formats.lora_changes import KeyPart, lokr
from lora_export.formats.peft_kinds.kind import Kind, Stored
from lora_export.formats.peft_kinds.lycoris import FIELDS, PATTERNS, own_scale
from lora_export.lora import LoraPair


def _change(stored: Stored) -> LoraPair:
    scale = own_scale(stored.config)
    return lokr(
        {KeyPart(part): tensor for part, tensor in stored.parts.items()}, scale, of_wholes=scale(stored.config["r"])
    )


KIND = Kind(
    peft_type="LOKR",
    title="LoKr",
    change=_change,
    parts=tuple(part for part in KeyPart if part.startswith("lokr")),
    fields=(*FIELDS, "rank_dropout_scale", "decompose_both", "decompose_factor"),
    numbers=("r", "alpha"),
    patterns=PATTERNS,
)
