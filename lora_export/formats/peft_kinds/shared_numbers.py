"""PEFT's kinds that make the factors of every layer of few trained numbers, which layers share."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.formats.peft_kinds.kind import Stored
from lora_export.formats.peft_kinds.random_matrices import LANES, Generator
from lora_export.lora import LoraPair

THETA = "unilora_theta_d"
_PARTS = tuple(f"unilora_{what}_{side}" for what in ("indices", "scales") for side in "AB")


def unilora(stored: Stored) -> LoraPair:
    """Uni-LoRA: every entry of A and B is one of few trained numbers, which all layers share (Li et al. 2025)."""
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


BANK = "vblora_vector_bank"
_INDICES, _WEIGHTS = "_topk_indices", "_topk_weights"


def vblora(stored: Stored) -> LoraPair:
    """VB-LoRA: A and B of mixtures of the vectors of one bank (Li et al. 2024)."""
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
    if not isinstance(count, int) or count > len(bank):
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
        indices, but_last = (stored.parts[name + end] for end in (_INDICES, _WEIGHTS))  # of one vector, no weights
        if indices.ndim != 3 or indices.shape[2] != count or but_last.shape != (*indices.shape[:2], count - 1):
            raise InputRefused(
                f"{name}: the indices {indices.shape} and weights {but_last.shape} are not those of {count}"
            )
        indices, but_last = indices.astype(np.int64), but_last.astype(np.float32)
        weights = np.concatenate([but_last, 1 - but_last.sum(-1, keepdims=True)], axis=-1)
    else:
        raise InputRefused(f"there is neither {name} nor {name + _INDICES} and {name + _WEIGHTS}")
    if (indices < 0).any() or (indices >= len(bank)).any():
        raise InputRefused(f"{name} has indices outside of the bank of {len(bank)} vectors")
    mixtures = np.zeros((*indices.shape[:2], bank.shape[1]), np.float32)
    for number in range(count):
        mixtures += weights[..., number, None] * bank[indices[..., number]]
    return mixtures


V, _SEED = "tinylora_v", "projection_seed"
TOLERANCE = 1e-4  # of P: a processor's logarithms and cosines are not another's, bit for bit


def tinylora(stored: Stored) -> LoraPair:
    """TinyLoRA: B R A, where A and B are singular vectors of the base and in the file, and R is few trained numbers.

    R = Σ v_i P_i. Several layers may share one v. The file does not record which v a layer has: it is that of the
    layer's position in the model, and so is the seed of its P, by which the position is found.
    """
    if "tinylora_P" not in stored.parts:
        raise InputRefused(
            "its projection is not saved, and PEFT draws it by the position of the layer in the model. Save the "
            "adapter with save_projection=True"
        )
    a, b, p = (stored.part(f"tinylora_{name}", dimensions) for name, dimensions in (("A", 2), ("B", 2), ("P", 3)))
    rank = len(a)
    v = _vector(stored, p)
    if b.shape[1] != rank or p.shape != (*v.shape, rank, rank):
        raise InputRefused(f"tinylora_A {a.shape}, tinylora_B {b.shape}, tinylora_P {p.shape} and v {v.shape} disagree")
    return LoraPair(a=np.einsum("i,ijk->jk", v, p) @ a, b=b, scale=1.0)


def _vector(stored: Stored, p: NDArray[np.float32]) -> NDArray[np.float32]:
    """The trained numbers of this layer."""
    numbers = sorted((name.partition(".")[2] for name in stored.shared), key=lambda each: (len(each), each))
    if not numbers or numbers != list(map(str, range(len(numbers)))):
        raise InputRefused(f"the numbers of {V} are {', '.join(numbers) or 'missing'}; they must be 0, 1, 2, ...")
    tied = stored.config.get("weight_tying", 0.0)
    wanted = max(1, round(stored.modules * (1 - tied))) if isinstance(tied, float | int) and 0 <= tied <= 1 else 0
    if len(numbers) != wanted:
        raise InputRefused(
            f"weight_tying {tied!r} of {stored.modules} layers needs another number than {len(numbers)} of {V}"
        )
    position = 0
    if len(numbers) > 1:
        size = max(1, stored.modules // len(numbers))  # layers with one v
        position = min(_position(stored, p) // size, len(numbers) - 1)
    v = np.asarray(stored.shared[f"{V}.{position}"], np.float32)
    if v.ndim != 1:
        raise InputRefused(f"{V}.{position} is {v.shape}; a vector is needed")
    return v


def _position(stored: Stored, p: NDArray[np.float32]) -> int:
    first = stored.config.get(_SEED)
    Generator(first, _SEED)
    distances = np.abs(_starts(first, stored.modules, p.shape) - p.reshape(-1)[:LANES]).max(axis=1)
    if distances.min() > TOLERANCE:
        raise InputRefused(f"tinylora_P is that of no layer by {_SEED} {first}, so that its v is unknown")
    if np.count_nonzero(distances <= TOLERANCE) > 1:  # of few numbers: with r and u of 1, P is one number
        raise InputRefused(f"tinylora_P is that of several layers by {_SEED} {first}, so that its v is unknown")
    return int(distances.argmin())


@functools.lru_cache(maxsize=8)
def _starts(first: int, count: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The first numbers of P at each position (count, at most 16)."""
    drawn = (Generator(first + position, _SEED).normal(shape, shape[1] ** -0.5) for position in range(count))
    return np.stack([each.reshape(-1)[:LANES] for each in drawn])
