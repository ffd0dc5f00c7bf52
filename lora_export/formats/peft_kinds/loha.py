"""LoHa in PEFT: (w1_a w1_b) ∘ (w2_a w2_b), entry by entry (Hyeon-Woo et al. 2022)."""

from __future__ import annotations

from lora_export.formats.lora_changes import LOHA_FACTORS, KeyPart, loha
from lora_export.formats.peft_kinds.kind import Kind, Stored
from lora_export.formats.peft_kinds.lycoris import LYCORIS_FIELDS, LYCORIS_PATTERNS, own_scale
from lora_export.lora import LoraPair


def _change(stored: Stored) -> LoraPair:
    return loha({KeyPart(part): tensor for part, tensor in stored.parts.items()}, own_scale(stored.config))


KIND = Kind(
    peft_type="LOHA",
    title="LoHa",
    change=_change,
    parts=tuple(part for part in KeyPart if part.startswith("hada")),
    needed=LOHA_FACTORS,
    fields=LYCORIS_FIELDS,
    numbers=("r", "alpha"),
    patterns=LYCORIS_PATTERNS,
)
