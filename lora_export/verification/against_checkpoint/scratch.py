"""Memory that is used again for every block: new memory for each costs more than what is computed in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Scratch:
    """Named arrays of any content, for one thread. An array is valid until its name is requested again."""

    def __init__(self) -> None:
        self._bytes: dict[str, NDArray[np.uint8]] = {}

    def array(self, name: str, shape: Sequence[int], dtype: Any = np.float64) -> NDArray[Any]:
        """An array of this shape and dtype, in the memory that is kept under this name."""
        kind = np.dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        held = self._bytes.get(name)
        if held is None or held.size < size:
            held = self._bytes[name] = np.empty(size, np.uint8)
        found: NDArray[Any] = held[:size].view(kind).reshape(shape)
        return found
