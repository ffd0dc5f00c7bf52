"""LoKr in PEFT: the Kronecker product of two factors, each whole or decomposed.

PEFT multiplies by alpha / r in all cases, LyCORIS only where a factor is decomposed.
"""

from __future__ import annotations

from lora_export.formats.lora_changes import KeyPart, lokr
from lora_export.formats.peft_kinds.kind import Config, Kind, Tensors
from lora_export.formats.peft_kinds.lycoris import FIELDS, PATTERNS, own_scale
from lora_export.lora import LoraPair


def _change(parts: Tensors, config: Config, shared: Tensors) -> LoraPair:
    scale = own_scale(config)
    return lokr({KeyPart(part): tensor for part, tensor in parts.items()}, scale, of_wholes=scale(config["r"]))


KIND = Kind(
    peft_type="LOKR",
    title="LoKr",
    change=_change,
    parts=tuple(part for part in KeyPart if part.startswith("lokr")),
    fields=(*FIELDS, "rank_dropout_scale", "decompose_both", "decompose_factor"),
    numbers=("r", "alpha"),
    patterns=PATTERNS,
)
