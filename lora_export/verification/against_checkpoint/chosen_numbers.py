"""Whether the numbers of a layer were chosen by its inputs for one sum. Shares no code with a merge.

E are the errors M - V of a calibrated weight, d the distance from each number to the value on the other side of V, and
H the damped second moments of the layer's inputs. To take the other value changes ‖XEᵀ‖² by 2 (EH)_k d_k + H_kk d_k².
Feedback leaves almost no number where that is negative. What all of them could gain, relative to Σ H_kk d_k², is below
2e-4 (measured on 4 bits, 8 bits and bf16). For another sum it is larger, by the more it differs in the outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.verification.parity import Wide
from lora_export.weights.calibrated_rounding import DAMPING

MOST_LEFT = 1e-3  # of what single numbers could gain: see above
NEARLY = 1 + 2.0**-10  # times half a step: a sum in fp32 may round to either value


@dataclass(eq=False)
class ChosenNumbers:
    """The errors of one layer against several sums, by the names of these, block by block."""

    fitted: NDArray[np.float32]  # inputs of the layer, (tokens, inputs)
    held_out: NDArray[np.float32]
    is_transposed: bool  # whether the rows of the stored weight are inputs: all blocks are judged together then
    _moments: Wide = field(init=False)
    _sums: dict[str, Wide] = field(default_factory=dict)
    _waiting: dict[str, list[tuple[NDArray[Any], ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = self.fitted.astype(np.float64)
        self._moments = rows.T @ rows
        diagonal = np.einsum("ii->i", self._moments)
        diagonal += DAMPING * (diagonal.mean() or 1.0)

    def add(self, name: str, difference: Wide, halves: tuple[Wide, Wide], change: Wide) -> None:
        """Add a block of M - V, with half the distances to the values beside M, and V - W."""
        half = np.where(difference > 0, *halves)
        other = -np.sign(difference) * 2 * np.where(np.isfinite(half), half, 0)
        arrays = difference.copy(), other, np.abs(difference) <= half * NEARLY, change.copy()
        if self.is_transposed:
            self._waiting.setdefault(name, []).append(arrays)
        else:
            self._add(name, *arrays)

    def _add(self, name: str, error: Wide, other: Wide, is_nearest: NDArray[np.bool_], change: Wide) -> None:
        """Add whole outputs, all (outputs, inputs)."""
        diagonal = np.einsum("ii->i", self._moments)
        sizes = diagonal * np.square(other)
        gains = np.minimum(2 * (error @ self._moments) * other + sizes, 0)
        chosen = ~is_nearest.all(axis=1)  # all others are rounded to nearest
        nearest = np.where(is_nearest, error, error + other)
        rows = self.held_out.astype(np.float64)
        squares = [np.square(rows @ each.T).sum() for each in (error, nearest, change)]
        found = np.array([-gains[chosen].sum(), sizes[chosen].sum(), np.count_nonzero(chosen), *squares])
        self._sums[name] = self._sums.get(name, 0) + found

    def _of(self, name: str) -> Wide:
        if waiting := self._waiting.pop(name, None):
            self._add(name, *(np.concatenate(each).T for each in zip(*waiting, strict=True)))
        return self._sums[name]

    def fits(self, name: str) -> bool:
        """Whether the numbers were chosen for this sum; those of whole outputs may be the nearest."""
        gain, size, *_ = self._of(name)
        return bool(gain <= MOST_LEFT * size)

    def is_calibrated(self, name: str) -> bool:
        """Whether some number is not the nearest."""
        return bool(self._of(name)[2])

    def errors(self, name: str) -> tuple[float, float] | None:
        """‖X(M - V)ᵀ‖ / ‖X(V - W)ᵀ‖ on held-out inputs, of M and of the nearest numbers; None without an effect."""
        *_, own, nearest, effect = self._of(name)
        return (float(np.sqrt(own / effect)), float(np.sqrt(nearest / effect))) if effect else None
