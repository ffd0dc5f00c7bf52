"""Errors of a call's values, beside PyTorch's own."""

from __future__ import annotations

import math

import numpy as np

from lora_export.verification.diagnose.compare_calls import figures_of

REFERENCE = np.random.default_rng(0).normal(size=(2, 3, 4))


def test_pytorchs_own_error_sets_the_allowed_error() -> None:
    deployed = REFERENCE + 1e-6
    near, far = (figures_of(REFERENCE + error, REFERENCE, deployed) for error in (2e-6, 1e-3))
    assert near.error <= near.allowed < far.error
    assert math.isclose(near.deployed_error, 1e-6, rel_tol=1e-3)


def test_swapped_batch_and_length_are_read_either_way() -> None:
    swapped = np.ascontiguousarray(REFERENCE.swapaxes(0, 1))
    assert figures_of(swapped, REFERENCE, REFERENCE).error == 0
    assert figures_of(REFERENCE.reshape(-1), REFERENCE, REFERENCE).error == 0
    assert figures_of(REFERENCE[:1], REFERENCE, REFERENCE).error == math.inf


def test_wrong_integers_are_counted() -> None:
    ids = np.array([[1, 2, 3]])
    assert figures_of(np.array([[1, 9, 8]]), ids, ids) == (2.0, 0.0, 0.0)
