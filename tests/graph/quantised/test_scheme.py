"""Scales, zero points and integers by the rules of a scheme, by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lora_export.graph.quantised.scheme import Rule, Scheme, ValueRange

FOUR_BITS = Scheme(
    lowest=0,
    highest=15,
    default_zero=8,
    rule=Rule.SYMMETRIC,
    scale_dtype=np.dtype(np.float32),
    zero_dtype=np.dtype(np.uint8),
    scale_of_zeros=0,
)


def value_range(low: float, high: float) -> ValueRange:
    return ValueRange(np.float32([[low]]), np.float32([[high]]))


@pytest.mark.parametrize(
    ("rule", "low", "high", "scale", "zero"),
    [
        (Rule.SYMMETRIC, -3, 6, 6 / 7.5, 8),  # the range is -6 to 6
        (Rule.SIGNED_SCALE, -3, 6, 6 / -8, 8),  # 6 becomes the lowest integer
        (Rule.SIGNED_SCALE, -6, 3, -6 / -8, 8),
        (Rule.ASYMMETRIC, -5, 10, 1, 5),  # the range is -5 to 10, and 5 is zero
    ],
)
def test_scale_and_zero_point_follow_from_range(rule: Rule, low: float, high: float, scale: float, zero: int) -> None:
    scales, zeros = replace(FOUR_BITS, rule=rule).parameters(value_range(low, high))
    np.testing.assert_allclose(scales, [[scale]], rtol=1e-6)
    assert np.all(zeros == zero)


def test_scale_is_rounded_to_its_stored_dtype() -> None:
    scheme = replace(FOUR_BITS, scale_dtype=np.dtype(np.float16))
    scales, _ = scheme.parameters(value_range(-1, 0.5))
    assert scales.tolist() == [[float(np.float16(1 / 7.5))]]


def test_group_of_zeros_has_its_own_scale() -> None:
    scales, _ = replace(FOUR_BITS, scale_of_zeros=1).parameters(value_range(0, 0))
    assert scales.tolist() == [[1]]


def test_levels_are_rounded_and_clipped() -> None:
    weight, scales, zeros = np.float32([-9, -0.9, 0, 1.1, 99]), np.float32(0.5), np.float32(8)
    assert FOUR_BITS.levels(weight, scales, zeros).tolist() == [0, 6, 8, 10, 15]
