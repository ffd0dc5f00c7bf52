"""The statistics of a merge, on numbers whose figures a person can compute."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from lora_export.weights.merge_report import Statistics, StepResult
from support.handmade import rounded_sum

BF16 = ml_dtypes.bfloat16


def result_of(weight: np.ndarray, change: list[float], merged: np.ndarray | None = None) -> StepResult:
    wanted = np.array(change, np.float32)
    statistics = Statistics("w")
    statistics.add_block(weight, wanted, rounded_sum(weight, wanted) if merged is None else merged)
    return statistics.result()


def test_a_change_without_rounding_has_no_noise():
    # ‖W‖ = 5, ‖ΔW‖ = 10
    result = result_of(np.array([3, 4], np.float32), [0, 10])
    assert result == StepResult("w", relative_change=2.0, retention=1.0, noise=0.0, changed=1, elements=2)


def test_a_change_that_is_rounded_away_is_not_retained():
    # Around 256 bf16 has every second number: + 1 is lost, + 3 becomes + 4.
    result = result_of(np.array([256, 256], BF16), [1, 3])
    assert result.retention == 4 * 3 / (1 + 9)
    assert result.noise == math.sqrt((1 + 1) / 10)
    assert result.relative_change == pytest.approx(math.sqrt(10) / math.sqrt(2 * 256**2), rel=1e-12)
    assert (result.changed, result.elements) == (1, 2)


def test_a_change_lost_to_rounding_has_retention_zero():
    result = result_of(np.array([256, 512], BF16), [0.5, -0.5])
    assert (result.retention, result.noise, result.changed) == (0.0, 1.0, 0)


def test_the_rounding_of_a_conversion_is_noise():
    # 257 as bf16 is 256: nothing of + 1 is seen, and the weight moved the other way.
    result = result_of(np.array([256], np.float32), [1], np.array([256], BF16))
    assert (result.retention, result.noise) == (0.0, 1.0)


def test_statistics_of_blocks_merge_to_those_of_the_whole():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((8, 5)).astype(BF16)
    change = 0.01 * rng.standard_normal((8, 5)).astype(np.float32)
    whole, blocks = Statistics("w"), Statistics("w")
    whole.add_block(weight, change, rounded_sum(weight, change))
    for rows in (slice(0, 3), slice(3, 8)):
        blocks.add_block(weight[rows], change[rows], rounded_sum(weight[rows], change[rows]))
    one, other = whole.result(), blocks.result()
    assert (one.changed, one.elements) == (other.changed, other.elements)
    assert (one.retention, one.noise, one.relative_change) == pytest.approx(
        (other.retention, other.noise, other.relative_change), rel=1e-6
    )


def test_a_change_of_zero_has_retention_one():
    assert result_of(np.array([1], np.float32), [0]) == StepResult("w", 0.0, 1.0, 0.0, changed=0, elements=1)


def test_the_relative_change_of_a_zero_weight_is_infinite():
    assert result_of(np.array([0], np.float32), [1]).relative_change == math.inf


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_squares_beyond_fp32_are_computed_in_fp64(size):
    tiny = result_of(np.array([1], np.float32), [1e-30])
    assert (tiny.retention, tiny.relative_change) == (0.0, pytest.approx(1e-30))
    result = result_of(np.array([3 * size, 4 * size], np.float32), [size, 0])
    assert result.relative_change == pytest.approx(0.2)
    assert result.retention == pytest.approx(1)


def test_an_fp64_weight_is_measured_in_fp64():
    result = result_of(np.array([1.0, 1.0]), [2**-40, 0])
    assert (result.retention, result.noise, result.changed) == (1.0, 0.0, 1)
