"""The positions of tokens, for a graph that takes them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def token_positions(mask: NDArray[np.int64], *, by_mask: bool) -> NDArray[np.int64]:
    """The positions [batch, length] that a model takes for a mask [batch, length] of ones and zeros.

    They are 0, 1, 2, ... in every row. `by_mask`, only the ones are counted, and a zero has the position -1.
    """
    if by_mask:
        return np.cumsum(mask, axis=1) * mask - 1
    return np.broadcast_to(np.arange(mask.shape[1]), mask.shape)
