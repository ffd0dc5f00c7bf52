"""Which numbers of a weight share a scale, how scales are stored, and what the rule of a scheme makes them.

The scale of some numbers is the largest magnitude among them, divided by `reach`, as the library of the scheme has it.
With zero points, which stay, it is the smallest scale on which the codes reach all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

# Values of all scales, in the order of the file -> rows of the file -> the value of each number, or what broadcasts
Spread = Callable[[NDArray[np.float32]], Callable[[slice], NDArray[np.float32]]]
EXPONENT_OF_1 = 127
MOST_SCALES = 1 << 24  # an index of one in fp32 is exact


@dataclass(frozen=True, eq=False)
class ScaleRule:
    """The scales of a weight. `decode` and `encode` are between stored scales and factors of numbers, in fp32."""

    name: str  # the stored tensor
    read: Callable[[], NDArray[Any]]  # it. Raises InputRefused where it is damaged
    spread: Spread
    reach: float = 0.0  # 0: zero points decide
    decode: Callable[[NDArray[Any]], NDArray[np.float32]] = lambda stored: stored.astype(np.float32)
    encode: Callable[[NDArray[np.float32]], NDArray[Any]] | None = None  # None: rounded to the dtype

    def stored(self, factors: NDArray[np.float32], like: NDArray[Any]) -> NDArray[Any]:
        """Factors as they are stored: the nearest of the dtype, but where the scheme has a rule of its own."""
        with np.errstate(all="ignore"):
            found = factors if self.encode is None else self.encode(factors)
            return found.astype(like.dtype)


def to_floats8(factors: NDArray[np.float32]) -> NDArray[Any]:
    """Factors in e4m3, up to its largest number."""
    largest = float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)
    return np.clip(factors, -largest, largest).astype(ml_dtypes.float8_e4m3fn)


def to_exponents(factors: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The powers of two that are the next smaller ones, stored as exponents (OCP's rule for microscaling)."""
    exponents = np.frexp(factors)[1] - 1 + EXPONENT_OF_1
    return np.where(factors > 0, np.clip(exponents, 0, 2 * EXPONENT_OF_1), 0).astype(np.uint8)


def to_larger_exponents(factors: NDArray[np.float32]) -> NDArray[np.uint8]:
    """As `to_exponents`, the next larger ones: none of the numbers is cut off."""
    mantissa, exponents = np.frexp(factors)
    found = exponents - (mantissa == 0.5) + EXPONENT_OF_1
    return np.where(factors > 0, np.clip(found, 0, 2 * EXPONENT_OF_1), 0).astype(np.uint8)
