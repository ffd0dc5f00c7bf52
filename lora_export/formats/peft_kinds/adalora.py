"""AdaLoRA: B diag(E) A, of the ranks that training left to each layer (Zhang et al. 2023).

PEFT multiplies by alpha / (ranknum + 1e-5). It sets ranknum to the rank with which training began, and never again.
"""

from __future__ import annotations

import numpy as np

from lora_export.errors import InputRefused
from lora_export.formats.peft_kinds.kind import Kind, Stored
from lora_export.lora import LoraPair

_PARTS = ("lora_A", "lora_B", "lora_E")


def _change(stored: Stored) -> LoraPair:
    a, b, e = (stored.parts[part].astype(np.float32) for part in _PARTS)
    kept = (stored.config.get("rank_pattern") or {}).get(f"{stored.module}.lora_E")
    first = stored.config["init_r"]
    rank = first if kept is None else sum(map(bool, kept)) if isinstance(kept, list) else -1
    if a.ndim != 2 or b.ndim != 2 or (len(a), b.shape[1], e.shape) != (rank, rank, (rank, 1)):
        raise InputRefused(f"A {a.shape}, B {b.shape} and E {e.shape} are not of the rank {rank} that the config has")
    scale = stored.config["lora_alpha"] / float(np.float32(first) + np.float32(1e-5))
    if rank == 0:  # training left this layer as it was
        return LoraPair(a=np.zeros((1, a.shape[1]), np.float32), b=np.zeros((len(b), 1), np.float32), scale=scale)
    return LoraPair(a=a * e, b=b, scale=scale)


KIND = Kind(
    peft_type="ADALORA",
    title="AdaLoRA",
    change=_change,
    parts=_PARTS,
    needed=_PARTS,
    fields=(
        *("r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
        *("rank_pattern", "lora_dropout", "init_lora_weights", "fan_in_fan_out", "qalora_group_size", "megatron_core"),
    ),
    numbers=("init_r", "lora_alpha"),
)
