"""New scales for quantised weights that change: those that the rule of their scheme makes of W + ΔW.

Scales whose numbers do not change stay, to the bit. A pass over the weight finds the others before it is written.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.storage import block_copy
from lora_export.weights.kept_weights import KeptChange, KeptTensor
from lora_export.weights.quantised.codes import Grid, StoredCodes
from lora_export.weights.quantised.new_grid import NewGrid, NewPart
from lora_export.weights.quantised.scaling import MOST_SCALES, ScaleRule


def rescaled(tensor: KeptTensor, scheme: str, path: Path, scaling: ScaleRule | None) -> NewGrid | None:
    """The grid of a weight with new scales; None where its scheme has no rule. Reads the scales it has."""
    if scaling is None or scaling.read().size > MOST_SCALES:
        return None
    made = functools.cache(lambda: _new_scales(tensor, path, scaling))

    def load() -> Grid:
        old, of_rows = tensor.codes.load(), scaling.spread(scaling.decode(made()))
        return lambda rows: (of_rows(rows), old(rows)[1])

    codes = replace(tensor.codes, load=load)
    parts = {scaling.name: NewPart(scaling.read().shape, made)}
    return NewGrid(scheme, codes, tensor.source.shape, parts, is_rescaled=True)


def _new_scales(tensor: KeptTensor, path: Path, scaling: ScaleRule) -> NDArray[Any]:
    """The stored scales after the change."""
    old = scaling.read()
    needed = NeededScales(tensor.codes, scaling, old.size)
    with path.open("rb") as reader:
        change = KeptChange.of(replace(tensor, grid=None), path, reader.fileno())
        for rows, _ in tensor.pieces:
            first, last = tensor.codes.layout.extent(rows)
            packed = np.empty(last - first, np.uint8)
            block_copy.read(path, reader.fileno(), packed, tensor.source.start + first)
            before, total, zeros = change.sums(rows, packed)
            needed.add(rows, before, total, zeros)
    new = scaling.stored(needed.factors.astype(np.float32).reshape(old.shape), old)
    factors = scaling.decode(new)
    is_new = (needed.change > 0).reshape(old.shape) & np.isfinite(factors) & (factors > 0)
    return np.where(is_new, new, old).astype(old.dtype)


class NeededScales:
    """What the rule of a scheme makes of each scale of a weight, from its rows."""

    def __init__(self, codes: StoredCodes, scaling: ScaleRule, count: int) -> None:
        self.factors, self.change = np.zeros((2, count))  # the scales, and the largest change of a number of each
        self._codes, self._scaling = codes, scaling
        self._place = scaling.spread(np.arange(count, dtype=np.float32))

    def add(self, rows: slice, before: NDArray[Any], after: NDArray[Any], zeros: NDArray[Any] | None) -> None:
        """Count some rows of the file, before and after a change."""
        places = np.broadcast_to(self._place(rows), before.shape).astype(np.intp)
        np.maximum.at(self.factors, places, self._needed(after, zeros))
        np.maximum.at(self.change, places, np.abs(after - before))

    def _needed(self, weight: NDArray[Any], zeros: NDArray[Any] | None) -> NDArray[Any]:
        """The scale on which each number is the last value, or `reach`."""
        if self._scaling.reach:
            magnitudes: NDArray[Any] = np.abs(weight)
            return magnitudes / self._scaling.reach
        points: Any = 0.0 if zeros is None else zeros
        ends = [np.nanmax(self._codes.values) - points, np.nanmin(self._codes.values) - points]
        with np.errstate(all="ignore"):
            found = [np.where(np.not_equal(end, 0), weight / end, 0) for end in ends]
        needed: NDArray[Any] = np.maximum(*found)
        return needed
