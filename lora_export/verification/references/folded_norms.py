"""Batch norms that an exporter folded into the layers before them: the graph has their factors in other weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lora_export.verification.parity import Array, Wide


class BatchNorm(NamedTuple):
    """A batch norm of a model: (x - mean) * factor + shift, each (channels,)."""

    variance: str  # the name of a tensor that a graph has only if the norm is not folded
    factor: Wide
    mean: Wide
    shift: Wide

    def undone(self, array: Array) -> Iterator[Array]:
        """What a weight or a bias was before this norm was folded into it, on each axis that may be that of channels.

        ConvTranspose has its output channels on the second axis.
        """
        for axis in range(min(2, array.ndim)):
            if array.shape[axis] == len(self.factor):
                shape = [-1 if at == axis else 1 for at in range(array.ndim)]
                with np.errstate(over="ignore", invalid="ignore"):
                    if array.ndim == 1:
                        before = (array - self.shift) / self.factor + self.mean
                    else:
                        before = array / self.factor.reshape(shape)
                    before = before.astype(array.dtype)
                yield before
