"""LoKr in PEFT: the Kronecker product of two factors, each whole or decomposed.

PEFT multiplies by alpha / r in all cases, LyCORIS only where a factor is decomposed. A whole second factor of an
nn.Conv1d has an order of its own, see `FlatKroneckerPair`.
"""

from __future__ import annotations

from lora_export.formats.lora_changes import KeyPart, lokr
from lora_export.formats.peft_kinds.kind import Kind, Stored
from lora_export.formats.peft_kinds.lycoris import LYCORIS_FIELDS, LYCORIS_PATTERNS, own_scale
from lora_export.lora import LoraPair
from lora_export.pairs.computed import FlatKroneckerPair
from lora_export.pairs.structured import KroneckerPair


def _change(stored: Stored) -> LoraPair:
    scale = own_scale(stored.config)
    of_wholes = scale(stored.config["r"])
    pair = lokr({KeyPart(part): tensor for part, tensor in stored.parts.items()}, scale, of_wholes=of_wholes)
    if isinstance(pair, KroneckerPair) and KeyPart.LOKR_W2 in stored.parts and pair.w2.ndim == 3:
        return FlatKroneckerPair({"w1": pair.w1, "w2": pair.w2}, pair.scale)
    return pair


KIND = Kind(
    peft_type="LOKR",
    title="LoKr",
    change=_change,
    parts=tuple(part for part in KeyPart if part.startswith("lokr")),
    fields=(*LYCORIS_FIELDS, "rank_dropout_scale", "decompose_both", "decompose_factor"),
    numbers=("r", "alpha"),
    patterns=LYCORIS_PATTERNS,
)
