"""Figures of arrays, against values computed by hand."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from lora_export.verification import parity
from lora_export.verification.parity import Case, figures, judge
from support.parity_cases import make


def test_rms_of_values_whose_square_overflows() -> None:
    assert parity.rms(np.array([3.0, 4.0, 0.0, 0.0])) == 2.5
    assert parity.rms(np.array([3e200, 4e200, 0.0, 0.0])) == pytest.approx(2.5e200)
    assert parity.rms(np.array([3e-200, 4e-200, 0.0, 0.0])) == pytest.approx(2.5e-200)
    assert parity.rms(np.array([0.0])) == 0.0


def test_values_are_spiked_where_the_rms_exceeds_multiples_of_the_median() -> None:
    rng, found = np.random.default_rng(0), set()
    for size in range(1, 60):
        values = rng.normal(size=size)
        values[0] = rng.choice([1, 10, 100])
        expected = parity.rms(values) > 5 * np.median(np.abs(values))
        assert parity.Magnitudes(values).are_spiked(5) == expected
        found.add((size % 2, bool(expected)))
    assert len(found) == 4


@pytest.mark.parametrize("size", [1e-200, 1e-101, 1e-99, 1.0, 1e99, 1e101, 1e200])
def test_rms_and_peak_of_any_size_are_those_of_exact_sums(size: float) -> None:
    values = np.random.default_rng(0).normal(size=(7, 11))[:, ::2]
    magnitudes, squares = parity.Magnitudes(values * size), [float(value) ** 2 for value in values.flat]
    assert magnitudes.rms == pytest.approx(size * math.sqrt(math.fsum(squares) / len(squares)), rel=1e-14)
    assert magnitudes.peak == np.abs(values * size).max()


@pytest.mark.parametrize("dtype", parity.EPS)
def test_eps_is_that_of_the_dtype(dtype: str) -> None:
    assert parity.EPS[dtype] == float(ml_dtypes.finfo(np.dtype(dtype)).eps)


def test_worst_element_of_a_matrix_has_two_indices() -> None:
    truth = np.zeros((32, 32))
    error = truth.copy()
    error[3, 17] = 0.5
    case = make(own=0, error=error, effect=np.ones((32, 32)), truth=truth)
    measured = judge([case]).comparisons[0].figures
    assert measured is not None and measured.worst == parity.WorstElement((3, 17), 0.5, 0.0)
    assert measured.max_relative_error is None and measured.cosine is None, "both need a reference that is not zero"


def test_logits_have_agreement_and_divergence() -> None:
    truth = np.log(np.array([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]]))  # (rows, classes)
    other = np.log(np.array([[0.25, 0.5, 0.25], [0.25, 0.25, 0.5]]))
    case = Case(
        "first", "", {"logits": truth}, {"logits": truth}, {"logits": other}, {"logits": -truth}, {"logits": truth}
    )
    measured = judge([case]).comparisons[0].figures
    assert measured is not None
    assert measured.top1 == 0.5
    # KL of (1/2, 1/4, 1/4) from (1/4, 1/2, 1/4) is 1/4 ln 2, in one of two rows
    assert measured.kl == pytest.approx(math.log(2) / 8)
    assert "top-1 agreement 50 %, mean KL divergence 0.0866 nats" in str(judge([case]))


def test_agreement_leaves_out_rows_that_pytorchs_rounding_decides() -> None:
    truth = np.array([[0.0, 3.0, 1.0], [2.0, 2.0 - 1e-7, 0.0]])  # (rows, classes): the second row is a near tie
    swapped = truth[:, [1, 0, 2]]
    within_rounding = truth + np.array([[0.0, 0.0, 0.0], [0.0, 2e-7, 0.0]])
    assert figures.top1_agreement(within_rounding, truth, truth) == 0.5
    assert figures.top1_agreement(within_rounding, truth, within_rounding) == 1.0
    assert figures.top1_agreement(swapped, truth, within_rounding) == 0.0
    assert figures.top1_agreement(truth, np.ones((2, 3)), truth) is None


@pytest.mark.parametrize(
    ("output", "shape", "has_classes"),
    [
        ("logits", (2, 3), True),
        ("start_logits", (2, 7), True),
        ("logits", (2, 1), False),
        ("logits_per_image", (2, 3), False),
        ("text_embeds", (2, 512), False),
    ],
)
def test_only_class_scores_have_agreement(output: str, shape: tuple[int, ...], has_classes: bool) -> None:
    assert figures.is_class_scores(output, np.zeros(shape, np.float32)) == has_classes


def test_histogram_counts_by_powers_of_two() -> None:
    found = parity.figures.histogram(np.array([0.0, 1.0, 1.99, -2.0, 0.25, 0.0]))
    assert (found.first, found.counts, found.zeros) == (-2, (1, 0, 2, 1), 2)
    assert parity.figures.histogram(np.zeros(3)) == parity.figures.Histogram(0, (), 3)
    assert parity.figures.histogram(np.array([5e-324])).first == -1074
