"""Quantisation schemes: which integers there are, and how scales and zero points follow from the weights.

The rules are those of onnxruntime's quantisers (`matmul_nbits_quantizer` and `quant_utils`): nearest integers, without
a search for better scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Rule(StrEnum):
    """How scales follow from weights. All rules represent zero exactly."""

    # The entry of largest magnitude becomes the lowest integer, whatever its sign: half of the scales are negative.
    SIGNED_SCALE = "signed"
    SYMMETRIC = "symmetric"  # the range is equally wide on both sides of zero
    ASYMMETRIC = "asymmetric"  # the range is that of the weights, and the zero point is its position of zero


class ValueRange(NamedTuple):
    """The lowest and highest value of each group, zero included."""

    low: NDArray[np.float32]  # (bands, groups in a band)
    high: NDArray[np.float32]


class QuantParameters(NamedTuple):
    """Scales and zero points, as numbers to compute with."""

    scales: NDArray[np.float32]  # (bands, groups in a band)
    zeros: NDArray[np.float32]  # the same shape, or a scalar


@dataclass(frozen=True)
class Scheme:
    """The range of the integers, and the rule for scales and zero points."""

    lowest: int
    highest: int
    default_zero: int  # the zero point where none are stored
    rule: Rule
    scale_dtype: np.dtype[Any]
    zero_dtype: np.dtype[Any] | None  # a float zero point may be between two integers; None: none are stored
    scale_of_zeros: float  # the scale of a group of zeros

    def parameters(self, value_range: ValueRange) -> QuantParameters:
        """Scales and zero points for groups with this range. Both are rounded to their stored dtypes."""
        low, high = value_range
        if self.rule is Rule.SIGNED_SCALE:
            extent, steps = np.where(high > -low, high, low), (self.lowest - self.highest - 1) / 2
        elif self.rule is Rule.SYMMETRIC:
            extent, steps = np.maximum(high, -low), (self.highest - self.lowest) / 2
        else:
            extent, steps = high - low, self.highest - self.lowest
        scales = extent / np.float32(steps)
        stored: NDArray[np.float32] = scales.astype(self.scale_dtype).astype(np.float32)
        is_zero = stored == 0
        zeros = np.array(self.default_zero, np.float32)
        if self.rule is Rule.ASYMMETRIC and self.zero_dtype is not None:
            exact = np.where(is_zero, 0, self.lowest - low / np.where(is_zero, 1, stored))
            if self.zero_dtype.kind in "iu":
                exact = np.clip(np.rint(exact), self.lowest, self.highest)
            zeros = exact.astype(self.zero_dtype).astype(np.float32)
        stored[is_zero] = self.scale_of_zeros
        return QuantParameters(stored, zeros)

    def levels(self, weight: NDArray[np.float32], scales: NDArray[np.float32], zeros: NDArray[np.float32]) -> Any:
        """The nearest integers, as floats."""
        levels = weight / np.where(scales == 0, 1, scales)
        levels += zeros
        np.rint(levels, out=levels)
        return np.clip(levels, self.lowest, self.highest, out=levels)
