"""PEFT's kinds that train whole parameters, or rows of them."""

from __future__ import annotations

import numpy as np

from lora_export.errors import InputRefused
from lora_export.formats.peft_kinds.kind import ModuleChange, Stored
from lora_export.lora import TokenRows


def beft(stored: Stored) -> ModuleChange:
    """BEFT: a trained vector is added to the bias of a layer."""
    return ModuleChange(bias=stored.parts["beft_bias"].reshape(-1))


LAYER = "ln_tuning_layers."


def ln_tuning(stored: Stored) -> ModuleChange:
    """Tuning of normalisation layers: the adapter has these layers as wholes (Zhao et al. 2023)."""
    return ModuleChange(replaced={part.removeprefix(LAYER): tensor for part, tensor in stored.parts.items()})


_DELTA = "trainable_tokens_delta"


def trainable_tokens(stored: Stored) -> ModuleChange:
    """Trained rows of a table of embeddings. They replace the base's rows, which the config records."""
    indices = stored.config.get("token_indices")
    if not isinstance(indices, list) or not all(type(index) is int and abs(index) < 1 << 62 for index in indices):
        raise InputRefused("token_indices of the config is no list of integers")
    return ModuleChange(rows=TokenRows(np.array(indices, np.int64), stored.parts[_DELTA]))
