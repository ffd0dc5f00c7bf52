"""DeLoRA in PEFT: a low-rank change of bounded length, by the lengths of the weight's columns (Bini et al. 2025).

ΔW = λ / r · B diag(1 / (‖a‖ ‖b‖)) A diag(w), with the rows a of A, the columns b of B, and the lengths w, which PEFT
saves as the training found them. So it is a pair.
"""

from __future__ import annotations

import numpy as np

from lora_export.errors import InputRefused
from lora_export.formats.peft_kinds.kind import Kind, Stored
from lora_export.lora import LoraPair

_PARTS = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")
_SHORTEST = 1e-4  # ‖a‖ and ‖b‖ count as at least that


def _change(stored: Stored) -> LoraPair:
    parts, config = stored.parts, stored.config
    a, b, strength, lengths = (np.asarray(parts[name], np.float64) for name in _PARTS)
    if a.ndim != 2 or b.ndim != 2 or strength.size != 1 or lengths.shape != a.shape[1:] or len(a) != config["r"]:
        shapes = ", ".join(f"{name} {parts[name].shape}" for name in _PARTS)
        raise InputRefused(f"{shapes} and the config's r {config['r']} do not fit each other")
    norms = [np.maximum(np.linalg.norm(each, axis=axis), _SHORTEST) for each, axis in ((a, 1), (b, 0))]
    if norms[0].shape != norms[1].shape:
        raise InputRefused(f"A and B have different ranks: A is {a.shape}, B is {b.shape}")
    a, b = a / norms[0][:, None] * lengths, b / norms[1]
    return LoraPair(a=a.astype(np.float32), b=b.astype(np.float32), scale=float(strength.reshape(-1)[0]) / len(a))


KIND = Kind(
    peft_type="DELORA",
    title="DeLoRA",
    change=_change,
    parts=_PARTS,
    needed=_PARTS,
    fields=("delora_lambda", "module_dropout", "init_weights", "lambda_pattern"),
    numbers=("r",),
    patterns={"rank_pattern": "r"},
)
