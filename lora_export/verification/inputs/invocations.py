"""Texts with the invocation tokens of activated LoRAs: at random, no text would contain them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lora_export.graph.cache_names import IDS, MASK
from lora_export.runtime.runner import Arrays

# In each row of a batch, one after the other: where the tokens begin, as a share of the places where they fit, and
# where they begin without their last token. A row with two of them is active from the second on, one without is the
# base's, and one that ends with them is active at the end.
_PATTERNS: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...] = (
    ((0.3,), (0.8,)),
    ((0.1, 0.6), ()),
    ((1.0,), (0.2,)),
    ((), (0.5,)),
)


def with_invocations(arrays: Arrays, invocations: Sequence[tuple[int, ...]]) -> Arrays:
    """The arrays with one of these invocations in the rows of `input_ids`, where its tokens are no padding.

    Texts that are too short for it stay as they are.
    """
    if not invocations or IDS not in arrays:
        return arrays
    ids = arrays[IDS].copy()
    mask = np.broadcast_to(arrays.get(MASK, np.ones_like(ids)), ids.shape)
    for number, (row, is_token) in enumerate(zip(ids, mask, strict=True)):
        invocation = invocations[number % len(invocations)]
        wholes, parts = _PATTERNS[number // len(invocations) % len(_PATTERNS)]
        _put_into(row, is_token, np.array(invocation), wholes, parts)
    return {**arrays, IDS: ids}


def _put_into(
    row: NDArray[np.int64],
    is_token: NDArray[np.int64],
    invocation: NDArray[np.int64],
    wholes: Sequence[float],
    parts: Sequence[float],
) -> None:
    length = len(invocation)
    starts = [start for start in range(len(row) - length + 1) if is_token[start : start + length].all()]
    if not starts:
        return
    for share in parts:
        start = starts[round(share * (len(starts) - 1))]
        row[start : start + length - 1] = invocation[:-1]
    for share in wholes:
        start = starts[round(share * (len(starts) - 1))]
        row[start : start + length] = invocation
