"""The numbers that PyTorch's generator on the CPU gives for a seed, without PyTorch.

Both PyTorch and NumPy use the Mersenne Twister MT19937 (Matsumoto and Nishimura 1998). PyTorch seeds it with the lower
32 bits of the seed, as NumPy's `RandomState` does. Tests compare every function with PyTorch bit for bit.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused

WIDE_FROM = (1 << 32) // 20  # PyTorch shuffles so many numbers, or more, by draws of 64 bits
LANES = 16  # numbers that PyTorch makes normal at a time
FLOAT_BITS = 24  # of a draw that become a float32


class Generator:
    """PyTorch's generator on the CPU, after `manual_seed`. Raises InputRefused for a seed that it does not take."""

    def __init__(self, seed: Any, name: str):
        if type(seed) is not int or not -(1 << 63) <= seed < 1 << 64:
            raise InputRefused(f"{name} is {seed!r}; it must be an integer of 64 bits")
        self._twister = np.random.MT19937()
        state: Any = np.random.RandomState(seed % (1 << 32)).get_state(legacy=False)
        self._twister.state = state

    def _draws(self, count: int) -> NDArray[np.uint64]:
        """Draws of 32 bits."""
        return np.asarray(self._twister.random_raw(count))

    def uniform(self, shape: tuple[int, ...], low: float, high: float) -> NDArray[np.float32]:
        """`torch.empty(shape).uniform_(low, high)`.

        PyTorch multiplies and adds with one rounding (FMA), which fp64 does here. On a processor without that, the last
        bit of some of PyTorch's numbers is another one.
        """
        unit = (self._draws(math.prod(shape)) & np.uint64((1 << FLOAT_BITS) - 1)) * 2.0**-FLOAT_BITS
        width = np.float64(np.float32(high) - np.float32(low))
        return (unit * width + np.float64(np.float32(low))).astype(np.float32).reshape(shape)

    def normal(self, shape: tuple[int, ...], deviation: float) -> NDArray[np.float32]:
        """`torch.empty(shape).normal_(0, deviation)`, but for the last bits. Raises InputRefused for fewer than 16.

        PyTorch makes eight pairs of 16 uniform numbers at a time (Box and Muller 1958). The last 16 are drawn anew,
        where the number of all is no multiple of 16.
        """
        size = math.prod(shape)
        if size < LANES:
            raise InputRefused(f"PyTorch draws {size} normal numbers in another way than is known here")
        values = self.uniform((size,), 0, 1)
        rest, normal = size % LANES, np.empty(size, np.float32)
        normal[: size - rest] = _box_muller(values[: size - rest].reshape(-1, LANES)).reshape(-1)
        if rest:
            normal[-LANES:] = _box_muller(self.uniform((1, LANES), 0, 1)).reshape(-1)
        return (normal * np.float32(deviation)).reshape(shape)

    def start_of_permutation(self, size: int, count: int) -> NDArray[np.int64]:
        """`torch.randperm(size)[:count]`: the first steps of a Fisher-Yates shuffle settle the first numbers.

        Raises InputRefused for a size from which on PyTorch shuffles in another way, whose last step settles them.
        """
        if size >= WIDE_FROM:
            raise InputRefused(f"PyTorch shuffles {size:,} numbers in another way than is known here")
        draws = self._draws(count)
        moved: dict[int, int] = {}  # place -> the number there, where it is not the place itself
        first = np.empty(count, np.int64)
        for step, draw in enumerate(draws.tolist()):
            other = step + draw % (size - step)
            first[step] = moved.get(other, other)
            moved[other] = moved.get(step, step)
        return first


def _box_muller(uniform: NDArray[np.float32]) -> NDArray[np.float32]:
    """Normal numbers of uniform ones, (blocks, 16)."""
    radius, angle = np.sqrt(-2 * np.log(1 - uniform[:, : LANES // 2])), 2 * np.pi * uniform[:, LANES // 2 :]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
