"""TinyLoRA: B R A, where A and B are singular vectors of the base and in the file, and R is few trained numbers.

R = Σ v_i P_i. Several layers may share one v. The file does not record which v a layer has: it is that of the layer's
position in the model, and so is the seed of its P, by which the position is found.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.formats.peft_kinds.kind import Kind, Stored
from lora_export.formats.peft_kinds.torch_random import LANES, Generator
from lora_export.lora import LoraPair

V, _SEED = "tinylora_v", "projection_seed"
TOLERANCE = 1e-4  # of P: a processor's logarithms and cosines are not another's, bit for bit


def _change(stored: Stored) -> LoraPair:
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
    return int(distances.argmin())


@functools.lru_cache(maxsize=8)
def _starts(first: int, count: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The first numbers of P at each position (count, 16)."""
    drawn = (Generator(first + position, _SEED).normal(shape, shape[1] ** -0.5) for position in range(count))
    return np.stack([each.reshape(-1)[:LANES] for each in drawn])


KIND = Kind(
    peft_type="TINYLORA",
    title="TinyLoRA",
    change=_change,
    parts=("tinylora_A", "tinylora_B", "tinylora_P"),
    needed=("tinylora_A", "tinylora_B"),
    shared=(V,),
    fields=(
        *("r", "u", "weight_tying", _SEED, "save_projection", "tinylora_dropout", "fan_in_fan_out", "init_v_bound"),
        "init_weights",
    ),
)
