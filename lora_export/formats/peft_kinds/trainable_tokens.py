"""Trained rows of a table of embeddings. They replace the base's rows, which the config records."""

from __future__ import annotations

import numpy as np

from lora_export.errors import InputRefused
from lora_export.formats.peft_kinds.kind import Kind, ModuleChange, Stored
from lora_export.lora import TokenRows

_DELTA = "trainable_tokens_delta"


def _change(stored: Stored) -> ModuleChange:
    indices = stored.config.get("token_indices")
    if not isinstance(indices, list) or not all(type(index) is int and abs(index) < 1 << 62 for index in indices):
        raise InputRefused("token_indices of the config is no list of integers")
    return ModuleChange(rows=TokenRows(np.array(indices, np.int64), stored.parts[_DELTA]))


KIND = Kind(
    peft_type="TRAINABLE_TOKENS",
    title="trainable tokens",
    change=_change,
    parts=(_DELTA,),
    needed=(_DELTA,),
    fields=("token_indices", "init_weights"),
)
