"""LyCORIS' kinds whose change follows from the weight (https://github.com/KohakuBlueleaf/LyCORIS).

Diag-OFT and BOFT rotate blocks of outputs, IA3 scales outputs or inputs, and GLoRA multiplies the weight by a product.
None of them changes the bias.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.lora import LoraPair
from lora_export.pairs.stages import Blocks, EntryWise, LowRank, Stage
from lora_export.pairs.transforms import WeightTransform

_Array = NDArray[Any]


def rotations(blocks: _Array, rescale: _Array | None, constraint: float) -> WeightTransform:
    """OFT of `blocks` (count, size, size), BOFT of (factors, count, size, size); `constraint` is stored as alpha.

    R = (I + Q)(I - Q)⁻¹ with Q = blocks - blocksᵀ, which is shortened to the constraint times the outputs.
    """
    if blocks.ndim not in (3, 4) or blocks.shape[-1] != blocks.shape[-2] or 0 in blocks.shape:
        raise InputRefused(f"oft_blocks is {blocks.shape}; square blocks are needed")
    count, size = blocks.shape[-3], blocks.shape[-1]
    outputs, is_butterfly = count * size, blocks.ndim == 4
    if is_butterfly and (size % 2 or any(outputs % (2**number * size) for number in range(len(blocks)))):
        raise InputRefused(f"oft_blocks is {blocks.shape}: so many blocks have no butterfly of {len(blocks)} factors")
    if rescale is not None and rescale.size != outputs:
        raise InputRefused(f"rescale is {rescale.shape}, and the blocks have {outputs} outputs")
    stored = {"blocks": blocks} | ({} if rescale is None else {"rescale": rescale.reshape(-1)})
    kind, settings = f"LyCORIS {'BOFT' if is_butterfly else 'OFT'}", {"limit": constraint * outputs}
    return WeightTransform(kind, stored, _lower_rotations, (outputs, 0), settings=settings, rank=size)


def _lower_rotations(transform: WeightTransform, shape: tuple[int, int]) -> tuple[Stage, ...]:
    blocks = transform.stored["blocks"].astype(np.float64)
    q = blocks - blocks.swapaxes(-1, -2)
    limit, length = transform.settings["limit"], float(np.linalg.norm(q)) + 1e-8
    q = q * (limit / length) if 0 < limit < length else q
    changes = (2 * q @ np.linalg.inv(np.eye(q.shape[-1]) - q)).astype(np.float32)
    if blocks.ndim == 3:
        stages: list[Stage] = [Blocks(less_identity=changes.swapaxes(1, 2))]
    else:
        orders = [_order(number, *changes.shape[1:3]) for number in range(len(changes))]
        stages = [Blocks(less_identity=each, order=order) for each, order in zip(changes, orders, strict=True)]
    if "rescale" in transform.stored:
        b = transform.stored["rescale"][:, None] - np.float32(1)
        stages.append(EntryWise(factor=LoraPair(a=np.ones((1, shape[1]), np.float32), b=b, scale=1.0)))
    return tuple(stages)


def _order(factor: int, count: int, size: int) -> NDArray[np.int64]:
    """The outputs in the order in which they form blocks: those of two halves of a group alternate."""
    order: NDArray[np.int64] = np.arange(count * size).reshape(-1, 2, 2**factor * size // 2).swapaxes(1, 2).reshape(-1)
    return order


def input_or_output_scales(weight: _Array, on_input: _Array) -> WeightTransform:
    """IA3: W + W ∘ w, w of each input or output."""
    axis = 0 if weight.ndim < 2 else 1
    if on_input.size != 1 or weight.ndim < 1 or weight.size != weight.shape[axis] or not weight.size:
        raise InputRefused(f"weight is {weight.shape} and on_input {on_input.shape}; one number for each is needed")
    of_inputs, kernel = bool(on_input.reshape(-1)[0]), (0,) * (weight.ndim - 2)
    whole = (0, weight.size, *kernel) if of_inputs else (weight.size, 0, *kernel)
    settings = {"of_inputs": of_inputs}
    return WeightTransform("LyCORIS IA3", {"weight": weight.reshape(-1)}, _lower_scales, whole, settings=settings)


def _lower_scales(transform: WeightTransform, shape: tuple[int, int]) -> tuple[Stage, ...]:
    weight = transform.stored["weight"]
    if transform.settings["of_inputs"]:
        a, b = np.repeat(weight, max(1, shape[1] // len(weight)))[None], np.ones((shape[0], 1), np.float32)
    else:
        a, b = np.ones((1, shape[1]), np.float32), weight[:, None]
    return (EntryWise(factor=LoraPair(a=a, b=b, scale=1.0)),)


def product_and_pair(a1: _Array, a2: _Array, b1: _Array, b2: _Array, scale: float) -> WeightTransform:
    """GLoRA: W + scale (W A1 A2 + B1 B2). A1 (in, rank), A2 (rank, in), B1 (out, rank), B2 (rank, in, ...)."""
    b1 = b1.reshape(*b1.shape[:2], *[1] * (b2.ndim - 2))
    pair = LoraPair(a=b2, b=b1, scale=scale)
    inputs, rank = pair.shape[1], pair.rank
    if (a1.shape[:2], a2.shape[:2]) != ((inputs, rank), (rank, inputs)) or {a1.size, a2.size} != {inputs * rank}:
        raise InputRefused(f"a1 {a1.shape} and a2 {a2.shape} do not fit b1 {b1.shape} and b2 {b2.shape}")
    stored = {"a1": a1.reshape(inputs, rank), "a2": a2.reshape(rank, inputs), "b1": pair.b, "b2": pair.a}
    settings = {"scale": scale}
    return WeightTransform("LyCORIS GLoRA", stored, _lower_product, pair.shape, settings=settings, rank=rank)


def _lower_product(transform: WeightTransform, shape: tuple[int, int]) -> tuple[Stage, ...]:
    stored, scale = transform.stored, transform.settings["scale"]
    kernel = np.eye(math.prod(transform.whole[2:]), dtype=np.float32)  # all places of a kernel are mixed alike
    u, v = np.kron(stored["a2"].T, kernel), np.kron(stored["a1"].T * np.float32(scale), kernel)
    b1, b2 = (stored[name].reshape(len(stored[name]), -1) for name in ("b1", "b2"))
    assert u.shape[0] == shape[1]
    return LowRank(turned=True, u=u, v=v), EntryWise(addend=LoraPair(a=b2, b=b1, scale=scale))
