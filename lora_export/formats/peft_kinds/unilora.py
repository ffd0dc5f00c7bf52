"""Uni-LoRA: every entry of A and B is one of few trained numbers, which all layers share (Li et al. 2025)."""

from __future__ import annotations

import numpy as np

from lora_export.errors import InputRefused
from lora_export.formats.peft_kinds.kind import Kind, Stored
from lora_export.lora import LoraPair

THETA = "unilora_theta_d"
_PARTS = tuple(f"unilora_{what}_{side}" for what in ("indices", "scales") for side in "AB")


def _change(stored: Stored) -> LoraPair:
    theta = stored.shared.get(THETA)
    if theta is None or theta.ndim != 1:
        raise InputRefused(f"{THETA} is {'missing' if theta is None else theta.shape}; a vector is needed")
    factors = []
    for side in "AB":
        indices, scales = stored.parts[f"unilora_indices_{side}"], stored.part(f"unilora_scales_{side}", 2)
        if indices.shape != scales.shape or indices.dtype.kind not in "iu":
            raise InputRefused(f"unilora_indices_{side} {indices.shape} {indices.dtype}, its scales are {scales.shape}")
        if (indices < 0).any() or (indices >= len(theta)).any():
            raise InputRefused(f"unilora_indices_{side} has indices outside of the {len(theta)} trained numbers")
        factors.append(np.asarray(theta, np.float32)[indices] * scales)
    a, b = factors
    if len(a) != stored.config["r"]:
        raise InputRefused(f"A is {a.shape}, the config's rank is {stored.config['r']}")
    return LoraPair(a=a, b=b, scale=1.0)


KIND = Kind(
    peft_type="UNILORA",
    title="Uni-LoRA",
    change=_change,
    parts=_PARTS,
    needed=_PARTS,
    shared=(THETA,),
    fields=(
        *("proj_seed", "theta_d_length", "unilora_dropout", "fan_in_fan_out", "init_theta_d_bound", "init_weights"),
        "save_indices",
    ),
    shared_alone=(
        "the indices of its layers are not saved, and PEFT draws them for all layers in the sequence of the model. "
        "Save the adapter with save_indices=True"
    ),
    numbers=("r",),
)
