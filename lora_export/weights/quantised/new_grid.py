"""Other grids for a weight that stays quantised: more bits, or new scales by the rule of its scheme.

`finer` makes a grid of 8 bits of fewer: each step becomes a power of two smaller, as long as 8 bits have it. Every
number of the old grid is one of the new grid, so that what does not change keeps its value. No scale is searched for.

By a rule, the scale of some numbers is the largest magnitude among them, divided by `reach`, as the library of the
scheme has it. With zero points, which stay, it is the smallest scale on which the codes reach all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lora_export.weights.quantised.codes import Grid, StoredCodes
from lora_export.weights.quantised.packed_numbers import FINE_BITS

# Values of all scales, in the order of the file -> rows of the file -> the value of each number, or what broadcasts
Spread = Callable[[NDArray[np.float32]], Callable[[slice], NDArray[np.float32]]]
EXPONENT_OF_1 = 127
MOST_SCALES = 1 << 24  # an index of one in fp32 is exact


class OldAndNew(NamedTuple):
    """All stored scales of a weight, before and after."""

    old: NDArray[Any]
    new: NDArray[Any]


@dataclass(frozen=True, eq=False)
class ScaleRule:
    """The scales of a weight. `decode` and `encode` are between stored scales and factors of numbers, in fp32."""

    name: str  # the stored tensor
    read: Callable[[], NDArray[Any]]  # it. Raises InputRefused where it is damaged
    spread: Spread
    reach: float = 0.0  # 0: zero points decide
    decode: Callable[[NDArray[Any]], NDArray[np.float32]] = lambda stored: stored.astype(np.float32)
    encode: Callable[[NDArray[np.float32]], NDArray[Any]] | None = None  # None: rounded to the dtype

    def grid(self) -> Grid:
        """The scales of a weight without zero points. Reads all of them."""
        of_rows = self.spread(self.decode(self.read()))
        return lambda rows: (of_rows(rows), None)

    def tensors(self, scales: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """The stored tensors that have these scales, which are as `read` has them."""
        return {self.name: scales}

    def renewed(self, factors: NDArray[np.float32], is_changed: NDArray[np.bool_], old: NDArray[Any]) -> NDArray[Any]:
        """The scales for factors that changed numbers need. Others stay, and those for which none can be stored."""
        new = self.stored(factors, old)
        found = self.decode(new)
        return np.where(is_changed & np.isfinite(found) & (found > 0), new, old).astype(old.dtype)

    def between(
        self, factors: NDArray[np.float32], is_changed: NDArray[np.bool_], scales: OldAndNew, tolerance: float
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
        """The least and the largest scale that the rule may make of factors within a relative tolerance, and of which.

        Both are factors, as `decode` makes them.
        """
        low, high = (self.stored(factors * np.float32(1 + sign * tolerance), scales.old) for sign in (-1, 1))
        return self.decode(low), self.decode(high), is_changed

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


class NewPart(NamedTuple):
    """What a stored tensor becomes, in its own dtype."""

    shape: tuple[int, ...]
    make: Callable[[], NDArray[Any]]


@dataclass(frozen=True, eq=False)
class NewGrid:
    """How a weight is stored on other scales, with other zero points, or in more bits."""

    scheme: str
    codes: StoredCodes  # its grid has the new scales
    packed_shape: tuple[int, ...]
    parts: Mapping[str, NewPart] = field(default_factory=dict)  # stored tensor -> what it becomes; others stay
    is_rescaled: bool = False  # new scales for the numbers that it has

    @property
    def stored_as(self) -> str:
        """The scheme of the weight in a report."""
        return f"{self.scheme}, new scales" if self.is_rescaled else self.scheme


def new_parts(scaling: ScaleRule, made: Callable[[], NDArray[Any]]) -> dict[str, NewPart]:
    """What becomes of the tensors with the scales of a weight; `made` makes all scales. Reads those it has."""

    def make(name: str) -> NDArray[Any]:
        return scaling.tensors(made())[name]

    old = scaling.tensors(scaling.read())
    return {name: NewPart(array.shape, functools.partial(make, name)) for name, array in old.items()}


def finer_scales(scales: NDArray[Any], bits: int) -> NDArray[Any] | None:
    """The scales of 8 bits for those of `bits`, in their dtype; None where one is too small to be halved so often."""
    found = (scales.astype(np.float32) * finer_step(bits)).astype(scales.dtype)
    return found if np.array_equal(found.astype(np.float32), scales.astype(np.float32) * finer_step(bits)) else None


def finer_grid(load: Callable[[], Grid], bits: int) -> Callable[[], Grid]:
    """What loads the grid of 8 bits for one of fewer bits."""

    def loaded() -> Grid:
        of_rows, step = load(), finer_step(bits)

        def of_finer(rows: slice) -> tuple[NDArray[np.float32], NDArray[Any] | None]:
            scales, points = of_rows(rows)
            return scales * step, None if points is None else points / step

        return of_finer

    return loaded


def finer_step(bits: int) -> np.float32:
    """A step of 8 bits, of one of fewer bits."""
    return np.float32(2.0 ** (bits - FINE_BITS))
