"""IA3 in PEFT: one trained scale for each output of a layer, or for each input of a feed-forward one (Liu et al. 2022).

The scales of outputs also multiply the bias.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_export.errors import InputRefused
from lora_export.formats.patterns import Patterns
from lora_export.formats.peft_kinds.kind import Kind, Stored
from lora_export.lora import LoraPair
from lora_export.pairs.stages import EntryWise, Stage
from lora_export.pairs.transforms import WeightTransform

_TITLE = "IA3"


def _change(stored: Stored) -> WeightTransform:
    scales = np.asarray(stored.parts["ia3_l"], np.float32)
    of_inputs = _is_feedforward(stored.module, stored.config.get("feedforward_modules") or ())
    axis = 0 if scales.ndim == 2 and not of_inputs else 1
    count = scales.shape[axis] if scales.ndim >= 2 else 0
    if not count or count != scales.size:
        place = "input" if of_inputs else "output"
        raise InputRefused(f"ia3_l is {scales.shape}; by feedforward_modules it has a scale for each {place}")
    kernel = (0,) * (scales.ndim - 2)
    whole = (0, count, *kernel) if of_inputs else (count, 0, *kernel)
    tensors, settings = {"ia3_l": scales.reshape(-1)}, {"of_inputs": of_inputs}
    bias = None if of_inputs else WeightTransform(_TITLE, tensors, _lower, (count,), settings=settings)
    return WeightTransform(_TITLE, tensors, _lower, whole, settings=settings, bias=bias)


def _is_feedforward(module: str, patterns: Any) -> bool:
    """As PEFT decides it: a pattern for whole names, or ends of names."""
    if isinstance(patterns, str):
        return bool(Patterns({f"^(?:{patterns})": True}, source="feedforward_modules").values(module))
    if not isinstance(patterns, list | tuple) or not all(isinstance(each, str) for each in patterns):
        raise InputRefused(f"feedforward_modules is {patterns!r}: it is no pattern, and no list of names")
    return module.endswith(tuple(patterns))


def _lower(transform: WeightTransform, shape: tuple[int, int]) -> tuple[Stage, ...]:
    change = transform.stored["ia3_l"] - np.float32(1)
    if transform.settings["of_inputs"]:
        a = np.repeat(change, shape[1] // len(change))[None] if shape[1] >= len(change) else change[None]
        return (EntryWise(factor=LoraPair(a=a, b=np.ones((shape[0], 1), np.float32), scale=1.0)),)
    return (EntryWise(factor=LoraPair(a=np.ones((1, shape[1]), np.float32), b=change[:, None], scale=1.0)),)


KIND = Kind(
    peft_type="IA3",
    title=_TITLE,
    change=_change,
    parts=("ia3_l",),
    needed=("ia3_l",),
    fields=("feedforward_modules", "init_ia3_weights", "fan_in_fan_out"),
)
