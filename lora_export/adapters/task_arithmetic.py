"""How several arrays of one shape become one: the arithmetic of PEFT's `add_weighted_adapter`.

TIES: Yadav et al. 2023. DARE: Yu et al. 2024. All in fp32. The arrays are factors of pairs, or whole changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

TaskTensors = Sequence[NDArray[np.float32]]


def weighted_sum(arrays: TaskTensors, weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Σ weight · array."""
    total: NDArray[np.float32] = np.sum(_weighted(arrays, weights), axis=0)
    return total


def elected_mean(arrays: TaskTensors, weights: NDArray[np.float32], majority_sign: str) -> NDArray[np.float32]:
    """For each entry, the mean of those weighted values whose sign is the elected one.

    "total" elects the sign of the sum, "frequency" that of most values; both without the weights, as PEFT does. A
    value of zero agrees with no sign.
    """
    stacked = np.stack(arrays)
    signs = np.sign(stacked)
    votes = (stacked if majority_sign == "total" else signs).sum(axis=0)
    agree = signs == np.where(votes >= 0, np.float32(1), np.float32(-1))
    total: NDArray[np.float32] = np.sum(_weighted(arrays, weights) * agree, axis=0)
    mean: NDArray[np.float32] = total / np.maximum(agree.sum(axis=0), 1).astype(np.float32)
    return mean


def _weighted(arrays: TaskTensors, weights: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.stack(arrays) * weights.reshape(-1, *[1] * arrays[0].ndim)


def largest_entries(array: NDArray[np.float32], density: float) -> NDArray[np.float32]:
    """The array with all entries zero but the largest: `int(density * size)` of them. 1.0 keeps all.

    Of entries with one magnitude, the first ones are taken.
    """
    if density >= 1:
        return array
    count = int(density * array.size)
    flat = np.abs(array).reshape(-1)
    kept = np.zeros(array.size, np.bool_)
    if count:
        limit = np.partition(flat, array.size - count)[array.size - count]
        kept = flat > limit
        kept[np.flatnonzero(flat == limit)[: count - np.count_nonzero(kept)]] = True
    return array * kept.reshape(array.shape)


def random_entries(array: NDArray[np.float32], density: float, key: str) -> NDArray[np.float32]:
    """The array with random entries zero; the others are divided by `density`. 1.0 keeps all, unchanged.

    `key` determines which entries are kept: the same ones on every machine (see `kept_at_random`).
    """
    if density >= 1:
        return array
    return array * kept_at_random(array.shape, density, key) / np.float32(density)


def kept_at_random(shape: tuple[int, ...], density: float, key: str) -> NDArray[np.bool_]:
    """A mask in which each entry is true with the probability `density`.

    NumPy promises that a bit generator gives the same raw numbers in every version; it promises no such thing for
    distributions.
    """
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest(), "little")
    raw = np.random.PCG64(seed).random_raw(int(np.prod(shape)))
    return np.reshape(raw < np.uint64(int(density * 2.0**64)), shape)
