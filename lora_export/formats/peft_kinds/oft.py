"""OFT in PEFT: each block of a layer's inputs is rotated, W' = W Rᵀ (Qiu et al. 2023). Of a table, its columns are.

A rotation is the Cayley transform of a skew-symmetric matrix, or the first terms of its series.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.formats.peft_kinds.kind import Kind, Stored
from lora_export.pairs.stages import Blocks, Stage
from lora_export.pairs.transforms import WeightTransform

_TITLE = "OFT"
_MOST_TERMS = 1000  # of the series of a rotation; PEFT's default is 5
_OF_LAYER, _OF_TABLE = "oft_R.weight", "oft_embedding_R.weight"
_Wide = NDArray[np.float64]


def _change(stored: Stored) -> WeightTransform:
    config, parts = stored.config, stored.parts
    if len(parts) != 1:
        raise InputRefused("it has rotations of a layer and of a table")
    (part,) = parts
    rows, embedding = stored.part(part, 2), part == _OF_TABLE
    block = (1 + math.isqrt(1 + 8 * rows.shape[-1])) // 2  # rows.shape[1] = block (block - 1) / 2
    if block * (block - 1) != 2 * rows.shape[1]:
        raise InputRefused(f"{part} is {rows.shape}; it has the upper half of a square matrix for each block")
    is_shared = bool(config.get("block_share"))
    if is_shared and len(rows) > 1:
        raise InputRefused(f"{part} has {len(rows)} blocks, and the config sets block_share")
    terms = config.get("num_cayley_neumann_terms", 5) if config.get("use_cayley_neumann", True) else 0
    eps = config.get("eps", 6e-5)
    if type(terms) is not int or not 0 <= terms <= _MOST_TERMS or not isinstance(eps, int | float) or not eps > 0:
        raise InputRefused(f"num_cayley_neumann_terms is {terms!r}, and eps {eps!r}")
    inputs = 0 if is_shared else len(rows) * block
    whole = (inputs, 0) if embedding else (0, inputs)
    if config.get("coft"):  # PEFT shortens the rows whenever it uses them
        limit = eps / math.sqrt(len(rows))
        lengths = math.sqrt(2) * np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
        rows = np.where(lengths <= limit, rows, rows * (limit / np.maximum(lengths, limit))).astype(np.float32)
    settings = {"block": block, "terms": terms, "embedding": embedding}
    return WeightTransform(_TITLE, {_OF_LAYER: rows}, _lower, whole, settings=settings, rank=block, embedding=embedding)


def _lower(transform: WeightTransform, _shape: tuple[int, int]) -> tuple[Stage, ...]:
    if math.prod(transform.whole[2:]) > 1:
        raise InputRefused(
            "PEFT's OFT of a convolution folds overlapping patches of its input, which no weight does, and its own "
            "merge computes something else. Only kernels of size 1 are merged"
        )
    block, embedding = transform.settings["block"], transform.settings["embedding"]
    rows = transform.stored[_OF_LAYER]
    q = np.zeros((len(rows), block, block))
    q[:, *np.triu_indices(block, 1)] = rows
    change = change_of_rotation(q - q.swapaxes(1, 2), transform.settings["terms"])
    change = change.swapaxes(1, 2) if embedding else change
    return (Blocks(turned=not embedding, less_identity=change.astype(np.float32)),)


def change_of_rotation(q: _Wide, terms: int) -> _Wide:
    """R - I of skew-symmetric matrices (blocks, size, size): (I - Q)(I + Q)⁻¹ - I, or 2 Q + 2 Q² + ... of its series.

    PEFT's series has 2 Q from two terms on, and ends with one Qⁿ, n = terms - 1, from the cube on.
    """
    if not terms:
        return -2 * np.linalg.inv(np.eye(q.shape[-1]) + q) @ q
    if terms < 3:
        return 2.0 * (terms - 1) * q
    total, power = 2 * q + 2 * q @ q, q @ q
    for _ in range(3, terms - 1):
        power = power @ q
        total += 2 * power
    return total + power @ q


KIND = Kind(
    peft_type="OFT",
    title=_TITLE,
    change=_change,
    parts=(_OF_LAYER, _OF_TABLE),
    fields=(
        *("r", "oft_block_size", "module_dropout", "init_weights", "block_share", "eps"),
        *("use_cayley_neumann", "num_cayley_neumann_terms", "coft", "fan_in_fan_out"),
    ),
)
