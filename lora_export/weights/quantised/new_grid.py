"""Another grid for a weight that stays quantised: the values that its numbers have, and what its tensors become.

`finer` makes one of 8 bits of fewer: each step becomes a power of two smaller, as long as 8 bits have it. Every number
of the old grid is one of the new grid, so that what does not change keeps its value. No scale is searched for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_export.weights.quantised.codes import Grid, StoredCodes

FINE_BITS = 8


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
