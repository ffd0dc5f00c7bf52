"""The pooler of an encoder whose decoder reads the hidden states alone.

transformers gives a VisionEncoderDecoderModel the pooler of its encoder's class. Checkpoints such as TrOCR's have no
weights for it. Nothing that the model returns depends on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_export.models.sentence_transformer import has_removable_pooler

COMPOSITE = "EncoderDecoderModel"  # the end of the names of classes that are made of two models
PLACE = "encoder.pooler."


def without_unread_pooler(module: Any, new: Sequence[str]) -> tuple[str, ...]:
    """Remove the pooler whose weights are all `new`, those that the folder lacks; return the other new weights.

    Pairs on it are then left out, with a note (see `layers.module_spelling`).
    """
    encoder = getattr(module, "encoder", None)
    if encoder is None or not type(module).__name__.endswith(COMPOSITE) or not has_removable_pooler(encoder):
        return tuple(new)
    own = {f"{PLACE}{name}" for name, _ in encoder.pooler.named_parameters()}
    if not own or not own <= set(new):
        return tuple(new)
    encoder.pooler = None
    module.unread = (PLACE,)
    return tuple(name for name in new if name not in own)
