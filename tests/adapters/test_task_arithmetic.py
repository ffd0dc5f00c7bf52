"""Sums, elected signs and removed entries, by hand and against PEFT's functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft.utils import merge_utils

from lora_export.adapters import task_arithmetic as ours

ONE = np.array([[4, -1, 0], [2, 3, -5]], np.float32)
TWO = np.array([[-1, -2, 7], [2, -4, 1]], np.float32)
WEIGHTS = np.array([0.5, 2], np.float32)
ARRAYS = np.random.default_rng(1).normal(size=(3, 40, 30)).astype(np.float32)


def test_a_weighted_sum() -> None:
    assert ours.weighted_sum([ONE, TWO], WEIGHTS).tolist() == [[0, -4.5, 14], [5, -6.5, -0.5]]


def test_values_of_the_elected_sign_are_averaged() -> None:
    # Signs of the sums: + - +; + - -. Zero agrees with no sign. Weights do not vote.
    assert ours.elected_mean([ONE, TWO], WEIGHTS, "total").tolist() == [[2, -2.25, 14], [2.5, -8, -2.5]]
    # Most signs: a draw counts as positive.
    assert ours.elected_mean([ONE, TWO], WEIGHTS, "frequency").tolist() == [[2, -2.25, 14], [2.5, 1.5, 2]]


def test_the_largest_entries_stay() -> None:
    assert ours.largest_entries(ONE, 0.5).tolist() == [[4, 0, 0], [0, 3, -5]]
    assert ours.largest_entries(ONE, 0.1).tolist() == np.zeros((2, 3)).tolist()
    assert ours.largest_entries(ONE, 1.0) is ONE
    assert ours.largest_entries(np.ones((1, 4), np.float32), 0.5).tolist() == [[1, 1, 0, 0]]


def test_random_entries_stay_and_are_rescaled() -> None:
    found = ours.random_entries(ARRAYS[0], 0.25, "key")
    kept = found != 0
    assert 0.2 < kept.mean() < 0.3
    np.testing.assert_array_equal(found[kept], ARRAYS[0][kept] / np.float32(0.25))
    assert ours.random_entries(ONE, 1.0, "key") is ONE


def test_a_key_determines_the_random_entries() -> None:
    # Frozen: another mask would give another adapter for the seed that a user has recorded.
    assert ours.kept_at_random((2, 4), 0.5, "0/1/layer/A").astype(int).tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]
    one, other = (ours.kept_at_random((50, 50), 0.5, key) for key in ("0/1/layer/A", "1/1/layer/A"))
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.07, 0.5, 0.93])
def test_ties_is_that_of_peft(method: str, density: float) -> None:
    weights = np.array([1.5, -0.5, 0.25], np.float32)
    expected = merge_utils.ties([torch.from_numpy(one) for one in ARRAYS], torch.from_numpy(weights), density, method)
    found = ours.elected_mean([ours.largest_entries(one, density) for one in ARRAYS], weights, method)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6, atol=1e-7)
    assert (found != 0).mean() > density / 2
