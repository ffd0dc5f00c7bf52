"""Groups: the entries of a quantised weight that share a scale."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.lora import EVERY_ROW
from lora_export.weights.tensor_blocks import Patch


@dataclass(frozen=True)
class Groups:
    """Which entries of a stored weight share a scale.

    A *band* is the smallest set of consecutive rows whose scales no other row uses. Scales are stored band after band.
    Where each row has scales of its own, a band is one row.
    """

    shape: tuple[int, ...]
    axis: int | None  # None: one scale for all
    block_size: int  # along the axis; 0: one scale for each position on the axis

    @property
    def band_rows(self) -> int:
        """Rows of one band."""
        if self.axis is None or (self.axis and not self.block_size):
            return self.shape[0]
        return 1 if self.axis else max(self.block_size, 1)

    @property
    def band_groups(self) -> int:
        """Groups of one band."""
        if self.axis is None:
            return 1
        if not self.block_size:
            return self.shape[self.axis] if self.axis else 1
        return math.prod(self._sizes()[1:])

    def bands(self, rows: slice) -> slice:
        """The bands that contain these rows."""
        return slice(rows.start // self.band_rows, -(-rows.stop // self.band_rows))

    def broadcast(self, parameters: NDArray[Any], rows: slice) -> NDArray[Any]:
        """Scales or zero points of the rows' bands (bands, groups), in a shape that broadcasts over the rows."""
        if self.axis is None:
            return parameters.reshape([1] * len(self.shape))
        if not self.block_size:
            return parameters.reshape([-1 if at == self.axis else 1 for at in range(len(self.shape))])
        parameters = parameters.reshape([-1, *self._sizes()[1:]])
        if self.axis:
            repeated = np.repeat(parameters, self.block_size, axis=self.axis)
            return repeated[(EVERY_ROW,) * self.axis + (slice(self.shape[self.axis]),)]
        if len(parameters) == 1:
            return parameters
        numbers = np.arange(rows.start, rows.stop) // self.block_size - rows.start // self.block_size
        by_row: NDArray[Any] = parameters[numbers]
        return by_row

    def reduce(self, function: np.ufunc, entries: NDArray[Any], rows: slice) -> NDArray[Any]:
        """Reduce each group's entries in these rows to one number: (bands, groups)."""
        if self.block_size:
            last = entries.shape[self.axis or 0]
            first = 0 if self.axis else -(rows.start % self.block_size)
            starts = np.maximum(np.arange(first, last, self.block_size), 0)
            entries = function.reduceat(entries, starts, axis=self.axis or 0)
            return entries.reshape(len(entries), -1)
        if self.axis == 0:
            return np.asarray(function.reduce(entries.reshape(len(entries), -1), axis=1))[:, None]
        others = tuple(at for at in range(entries.ndim) if at != self.axis)
        return np.asarray(function.reduce(entries, axis=others)).reshape(1, -1)

    def are_split_by(self, patch: Patch) -> bool:
        """Whether a patch ends in the middle of a group."""
        rows, columns = patch.rows, patch.columns
        ends_at_band = rows.stop % self.band_rows == 0 or rows.stop == self.shape[0]
        fits_rows = rows.start % self.band_rows == 0 and ends_at_band
        if columns == EVERY_ROW or (self.axis == 1 and not self.block_size) or (self.axis == 0 and self.block_size):
            return not fits_rows
        if self.axis != 1:
            return True
        ends_at_group = columns.stop % self.block_size == 0 or columns.stop == self.shape[1]
        return not (fits_rows and columns.start % self.block_size == 0 and ends_at_group)

    def _sizes(self) -> list[int]:
        """The shape of the scales, where the axis is cut into blocks."""
        return [-(-size // self.block_size) if at == self.axis else size for at, size in enumerate(self.shape)]
