"""The kinds of changes that a file stores for a module, and the pair that the tensors of each make.

LoRA, LoCon's Tucker decomposition, LoHa and LoKr (https://github.com/KohakuBlueleaf/LyCORIS), also with DoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.formats.lora_keys import KeyPart
from lora_export.lora import LoraPair
from lora_export.structured_pairs import HadamardPair, KroneckerPair

LOHA_FACTORS = (KeyPart.LOHA_W1_A, KeyPart.LOHA_W1_B, KeyPart.LOHA_W2_A, KeyPart.LOHA_W2_B)
Tensors = Mapping[KeyPart, NDArray[Any]]  # of one module


@dataclass(frozen=True)
class ChangeKind:
    """A kind of change: its own parts, those without which it is none, and how they become a pair."""

    own: frozenset[KeyPart]
    needed: tuple[KeyPart, ...]
    make: Callable[[Tensors, Callable[[int], float]], LoraPair]


def _lora(tensors: Tensors, scale: Callable[[int], float]) -> LoraPair:
    a, b = fp32(tensors[KeyPart.A]), fp32(tensors[KeyPart.B])
    rank = a.shape[0] if a.ndim else 0
    if a.ndim < 2 or b.ndim < 2:
        raise InputRefused(f"A is {a.shape} and B is {b.shape}; both need at least two dimensions")
    if KeyPart.MID in tensors:
        mid = fp32(tensors[KeyPart.MID])
        if mid.ndim < 3 or mid.shape[:2] != (b.shape[1], rank) or a[0].size != a.shape[1] or b[0].size != b.shape[1]:
            raise InputRefused(f"A {a.shape}, the core {mid.shape} and B {b.shape} make no convolution")
        a = np.einsum("pq...,qi->pi...", mid, a.reshape(rank, -1))
    if b.ndim > 2 and a.ndim == 2:
        a = a.reshape(*a.shape, *[1] * (b.ndim - 2))
    if a.ndim > 2 and b.ndim == 2:
        b = b.reshape(*b.shape, *[1] * (a.ndim - 2))
    return LoraPair(a=a, b=b, scale=scale(rank), magnitude=_magnitude(tensors, len(b)))


def _loha(tensors: Tensors, scale: Callable[[int], float]) -> LoraPair:
    factors: dict[str, NDArray[np.float32]] = {}
    ranks = []
    for number, down, up, core in (
        ("1", KeyPart.LOHA_W1_B, KeyPart.LOHA_W1_A, KeyPart.LOHA_T1),
        ("2", KeyPart.LOHA_W2_B, KeyPart.LOHA_W2_A, KeyPart.LOHA_T2),
    ):
        a, b = _matrix(tensors[down], down), _matrix(tensors[up], up)
        ranks.append(rank := a.shape[0])
        if core in tensors:
            tucker = fp32(tensors[core])
            if tucker.shape[:2] != (b.shape[0], rank) or tucker.ndim < 3:
                raise InputRefused(f"{down} {a.shape}, {core} {tucker.shape} and {up} {b.shape} make no convolution")
            a, b = np.einsum("pq...,qi->pi...", tucker, a), b.T
        factors |= {f"a{number}": a, f"b{number}": b}
    return HadamardPair(factors, scale(ranks[0]), _magnitude(tensors, len(factors["b1"])))


def _lokr(tensors: Tensors, scale: Callable[[int], float]) -> LoraPair:
    stored = {
        part.removeprefix("lokr_"): value
        for whole, up, down, core in (
            (KeyPart.LOKR_W1, KeyPart.LOKR_W1_A, KeyPart.LOKR_W1_B, None),
            (KeyPart.LOKR_W2, KeyPart.LOKR_W2_A, KeyPart.LOKR_W2_B, KeyPart.LOKR_T2),
        )
        for part, value in _kronecker_factor(tensors, whole, up, down, core).items()
    }
    ranks = {tensors[down].shape[0] for down in (KeyPart.LOKR_W1_B, KeyPart.LOKR_W2_B) if down in tensors}
    if len(ranks) > 1:
        raise InputRefused(f"its two factors have the ranks {', '.join(map(str, sorted(ranks)))}")
    # Where no factor is decomposed there is no rank, and LyCORIS does not use alpha.
    pair = KroneckerPair(stored, scale(ranks.pop()) if ranks else 1.0)
    magnitude = _magnitude(tensors, pair.shape[0])
    return pair if magnitude is None else KroneckerPair(stored, pair.scale, magnitude)


def _kronecker_factor(
    tensors: Tensors, whole: KeyPart, up: KeyPart, down: KeyPart, core: KeyPart | None
) -> dict[KeyPart, NDArray[np.float32]]:
    """The stored parts of one factor. Raises InputRefused where they do not make one."""
    if whole in tensors:
        if up in tensors or down in tensors:
            raise InputRefused(f"it has {whole} and {up} or {down}")
        return {whole: fp32(tensors[whole])}
    if up not in tensors or down not in tensors:
        raise InputRefused(f"there is neither {whole} nor {up} and {down} for it")
    b, a = _matrix(tensors[up], up), fp32(tensors[down])
    if core is not None and core in tensors:
        tucker = fp32(tensors[core])
        if tucker.ndim < 3 or a.ndim != 2 or tucker.shape[:2] != (b.shape[0], a.shape[0]):
            raise InputRefused(f"{up} {b.shape}, {core} {tucker.shape} and {down} {a.shape} make no convolution")
        return {up: b, down: a, core: tucker}
    if a.ndim < 2 or b.shape[1] != a.shape[0]:
        raise InputRefused(f"{up} {b.shape} and {down} {a.shape} have different ranks")
    return {up: b, down: a}


CHANGE_KINDS = (
    ChangeKind(frozenset({KeyPart.A, KeyPart.B, KeyPart.MID}), (KeyPart.A, KeyPart.B), _lora),
    ChangeKind(frozenset(part for part in KeyPart if part.startswith("hada")), LOHA_FACTORS, _loha),
    ChangeKind(frozenset(part for part in KeyPart if part.startswith("lokr")), (), _lokr),
)


def _magnitude(tensors: Tensors, out: int) -> NDArray[np.float32] | None:
    """DoRA's magnitude of each output (out,). PEFT stores (out,) or (1, out, 1, ...), LyCORIS (out, 1, ...)."""
    stored = tensors.get(KeyPart.MAGNITUDE, tensors.get(KeyPart.DORA_SCALE))
    if stored is None:
        return None
    axis = 0 if KeyPart.DORA_SCALE in tensors or stored.ndim < 3 else 1
    if stored.size != out or stored.ndim <= axis or stored.shape[axis] != out:
        raise InputRefused(
            f"its DoRA magnitude is {stored.shape}, and the weight has {out} outputs. A magnitude of each input "
            "(LyCORIS with wd_on_output=False) scales columns by their length over all outputs, and a pair here has a "
            "magnitude of each output, as PEFT, diffusers and kohya's scripts have it"
        )
    return fp32(stored).reshape(-1)


def _matrix(tensor: NDArray[Any], part: KeyPart) -> NDArray[np.float32]:
    if tensor.ndim != 2:
        raise InputRefused(f"{part} is {tensor.shape}; a matrix is needed")
    return fp32(tensor)


def fp32(tensor: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(tensor, np.float32)


def is_finite(tensor: NDArray[Any]) -> bool:
    return bool(np.isfinite(tensor.astype(np.float64)).all())
