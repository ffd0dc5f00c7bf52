"""VB-LoRA: A and B of mixtures of the vectors of one bank (Li et al. 2024)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.formats.peft_kinds.kind import Kind, Stored
from lora_export.lora import LoraPair

BANK = "vblora_vector_bank"
_INDICES, _WEIGHTS = "_topk_indices", "_topk_weights"


def _change(stored: Stored) -> LoraPair:
    bank = stored.shared.get(BANK)
    if bank is None or bank.ndim != 2 or 0 in bank.shape:
        raise InputRefused(f"{BANK} is {'missing' if bank is None else bank.shape}; a matrix is needed")
    a, b = (_vectors(stored, f"vblora_logits_{side}", np.asarray(bank, np.float32)) for side in "AB")
    rank = stored.config["r"]
    if len(a) != rank or b.shape[1] != rank:
        raise InputRefused(f"the ranks of its logits are {len(a)} and {b.shape[1]}, the config's is {rank}")
    return LoraPair(a=a.reshape(rank, -1), b=b.transpose(0, 2, 1).reshape(-1, rank), scale=1.0)


def _vectors(stored: Stored, name: str, bank: NDArray[np.float32]) -> NDArray[np.float32]:
    """The mixtures (., ., length), from logits for all vectors of the bank, or from the largest weights alone."""
    count = stored.config["topk"]
    if not 0 < count <= len(bank):
        raise InputRefused(f"topk is {count}, and the bank has {len(bank)} vectors")
    if name in stored.parts:
        logits = stored.part(name, 3)
        if logits.shape[2] != len(bank):
            raise InputRefused(f"{name} is {logits.shape}, and the bank has {len(bank)} vectors")
        indices = np.argsort(-logits, axis=-1, kind="stable")[..., :count]
        largest = np.take_along_axis(logits, indices, axis=-1)
        weights = np.exp(largest - largest[..., :1])
        weights /= weights.sum(-1, keepdims=True)
    elif {name + _INDICES, name + _WEIGHTS} <= stored.parts.keys():
        indices, but_last = stored.parts[name + _INDICES].astype(np.int64), stored.part(name + _WEIGHTS, 3)
        if indices.ndim != 3 or indices.shape[2] != count or but_last.shape != (*indices.shape[:2], count - 1):
            raise InputRefused(
                f"{name}: the indices {indices.shape} and weights {but_last.shape} are not those of {count}"
            )
        weights = np.concatenate([but_last, 1 - but_last.sum(-1, keepdims=True)], axis=-1)
    else:
        raise InputRefused(f"there is neither {name} nor {name + _INDICES} and {name + _WEIGHTS}")
    if (indices < 0).any() or (indices >= len(bank)).any():
        raise InputRefused(f"{name} has indices outside of the bank of {len(bank)} vectors")
    mixtures = np.zeros((*indices.shape[:2], bank.shape[1]), np.float32)
    for number in range(count):
        mixtures += weights[..., number, None] * bank[indices[..., number]]
    return mixtures


KIND = Kind(
    peft_type="VBLORA",
    title="VB-LoRA",
    change=_change,
    parts=tuple(f"vblora_logits_{side}{kind}" for side in "AB" for kind in ("", _INDICES, _WEIGHTS)),
    shared=(BANK,),
    fields=(
        *("num_vectors", "vector_length", "save_only_topk_weights", "vblora_dropout", "init_vector_bank_bound"),
        *("init_logits_std", "fan_in_fan_out"),
    ),
    numbers=("r", "topk"),
)
