"""HiRA in PEFT: W' = W + W ∘ (B A), entry by entry, with a low-rank B A and no scale (Huang et al. 2025)."""

from __future__ import annotations

import numpy as np

from lora_export.errors import InputRefused
from lora_export.formats.peft_kinds.kind import Kind, Stored
from lora_export.lora import LoraPair
from lora_export.pairs.stages import EntryWise, Stage
from lora_export.pairs.transforms import WeightTransform

_TITLE = "HiRA"
_LAYER, _TABLE = ("hira_A", "hira_B"), ("hira_embedding_A", "hira_embedding_B")


def _change(stored: Stored) -> WeightTransform:
    parts = stored.parts
    names = _TABLE if _TABLE[0] in parts else _LAYER
    if set(names) != set(parts):
        raise InputRefused(f"it has {' and '.join(sorted(parts))}; {' and '.join(names)} are needed")
    pair = LoraPair(a=np.asarray(parts[names[0]], np.float32), b=np.asarray(parts[names[1]], np.float32), scale=1.0)
    tensors = {"a": pair.a, "b": pair.b}
    return WeightTransform(_TITLE, tensors, _lower, pair.shape, rank=pair.rank, embedding=names is _TABLE)


def _lower(transform: WeightTransform, _shape: tuple[int, int]) -> tuple[Stage, ...]:
    a, b = transform.stored["a"], transform.stored["b"]
    return (EntryWise(factor=LoraPair(a=a.reshape(len(a), -1), b=b.reshape(len(b), -1), scale=1.0)),)


KIND = Kind(
    peft_type="HIRA",
    title=_TITLE,
    change=_change,
    parts=(*_LAYER, *_TABLE),
    fields=(
        "r",
        "rank_pattern",
        "hira_dropout",
        "init_weights",
        "fan_in_fan_out",
        "ephemeral_gpu_offload",
        "runtime_config",
    ),
)
