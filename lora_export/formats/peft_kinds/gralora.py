"""GraLoRA: the weight in k x k blocks, each with a pair of its own of the rank r / k (Jung et al. 2025)."""

from __future__ import annotations

import numpy as np

from lora_export.errors import InputRefused
from lora_export.formats.peft_config import adapter_scale
from lora_export.formats.peft_kinds.kind import Kind, Stored
from lora_export.lora import LoraPair

_MOST_RANK = 4  # of all blocks together, as a multiple of the weight's larger side
GENERAL = ("gralora_A_general.weight", "gralora_B_general.weight")  # a pair of the whole weight


def _change(stored: Stored) -> LoraPair:
    a, b = stored.part("gralora_A", 3), stored.part("gralora_B", 3)
    blocks, rank, hybrid = (stored.config.get(field) for field in ("gralora_k", "r", "hybrid_r"))
    if type(blocks) is not int or type(rank) is not int or blocks < 1 or rank % blocks:
        raise InputRefused(f"r is {rank} and gralora_k {blocks}; r must be a multiple of gralora_k")
    if (a.shape[0], a.shape[2]) != (blocks, rank) or b.shape[:2] != (blocks, rank):
        raise InputRefused(
            f"gralora_A {a.shape} and gralora_B {b.shape} are not of {blocks} blocks and the rank {rank}"
        )
    if blocks * rank > _MOST_RANK * max(blocks * a.shape[1], blocks * b.shape[2]):
        raise InputRefused(
            f"its {blocks} x {blocks} blocks have the rank {blocks * rank} together, more than the weight"
        )
    # Rank (p, n, s) joins the block of outputs p with the block of inputs n.
    own = rank // blocks
    one = np.zeros((blocks, blocks, own, blocks, a.shape[1]), np.float32)
    other = np.zeros((blocks, b.shape[2], blocks, blocks, own), np.float32)
    for n in range(blocks):
        one[:, n, :, n] = a[n].T.reshape(blocks, own, -1)
        other[n, :, n] = b[n].T.reshape(-1, blocks, own)
    factors = [one.reshape(blocks * rank, -1), other.reshape(-1, blocks * rank)]
    if any(name in stored.parts for name in GENERAL) is not bool(hybrid):
        raise InputRefused(
            f"hybrid_r is {hybrid}, and the pair of the whole weight is {'missing' if hybrid else 'there'}"
        )
    if hybrid:
        general = [stored.part(name, 2) for name in GENERAL if name in stored.parts]
        if len(general) != 2 or general[0].shape != (hybrid, factors[0].shape[1]) or general[1].shape[1] != hybrid:
            raise InputRefused(f"the pair of the whole weight does not fit its blocks, or hybrid_r {hybrid}")
        factors = [np.concatenate(parts, axis=axis) for axis, parts in enumerate(zip(factors, general, strict=True))]
    scale = adapter_scale(rank + (hybrid or 0), stored.config["alpha"], {})
    return LoraPair(a=factors[0], b=factors[1], scale=scale)


KIND = Kind(
    peft_type="GRALORA",
    title="GraLoRA",
    change=_change,
    parts=("gralora_A", "gralora_B", *GENERAL),
    needed=("gralora_A", "gralora_B"),
    fields=("gralora_k", "hybrid_r", "gralora_dropout", "fan_in_fan_out", "init_weights"),
    numbers=("r", "alpha"),
)
