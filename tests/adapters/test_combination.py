"""One pair of several: by hand for the exact sum and for `linear`, and what does not go together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft.utils import merge_utils

from lora_export.adapters import combination as ours
from lora_export.adapters.combination import combined_pair
from lora_export.errors import InputRefused, WrongUsage
from lora_export.lora import LoraPair
from lora_export.options.combining import Combination
from lora_export.plan import Term
from lora_export.structured_pairs import HadamardPair

NUMBERS = {"one": 0, "two": 1}


def term(adapter: str, a: Any, b: Any, scale: float = 1.0, strength: float = 1.0, **kind: bool) -> Term:
    return Term(adapter, "fc", LoraPair(np.array(a), np.array(b), scale, **kind), strength)


ONE = term("one", [[1, 2]], [[1], [3]], scale=4.0)
TWO = term("two", [[5, 0]], [[0], [2]], scale=2.0, strength=-2.0)


def test_cat_is_the_sum_of_the_changes() -> None:
    pair = combined_pair(Combination("cat"), [ONE, TWO], NUMBERS, 1)
    assert (pair.a.tolist(), pair.b.tolist(), pair.scale) == ([[4, 8], [-20, 0]], [[1, 0], [3, 2]], 1.0)
    assert pair.delta().tolist() == [[4, 8], [12 - 40, 24]]


def test_linear_sums_the_factors_and_has_cross_terms() -> None:
    pair = combined_pair(
        Combination("linear"), [ONE, TWO], NUMBERS, 1
    )  # roots of weight · scale: 2, and 2 with A negative
    assert (pair.a.tolist(), pair.b.tolist()) == ([[-8, 4]], [[2], [10]])
    assert pair.delta().tolist() == [[-16, 8], [-80, 40]]


def test_svd_cuts_the_exact_sum_to_the_largest_rank() -> None:
    pair = combined_pair(Combination("svd"), [ONE, TWO], NUMBERS, 1)
    exact = np.array([[4, 8], [-28, 24]])
    left = np.linalg.svd(exact)[1][1]
    assert pair.rank == 1 and np.linalg.norm(pair.delta() - exact) == pytest.approx(left, rel=1e-5)
    whole = combined_pair(Combination("svd", svd_rank=2), [ONE, TWO], NUMBERS, 1)
    np.testing.assert_allclose(whole.delta(), exact, atol=1e-5)


def test_a_seed_determines_what_dare_keeps() -> None:
    wide = [term(name, np.ones((2, 40)), np.ones((30, 2))) for name in NUMBERS]
    pairs = [combined_pair(Combination("dare_linear", 0.5, seed=seed), wide, NUMBERS, 2) for seed in (0, 0, 1)]
    assert np.array_equal(pairs[0].a, pairs[1].a) and not np.array_equal(pairs[0].a, pairs[2].a)
    assert np.array_equal(pairs[0].a, combined_pair(Combination("dare_linear", 0.5), wide, NUMBERS, 2).a)


@pytest.mark.parametrize(
    ("method", "others", "message"),
    [
        ("linear", term("two", [[1, 2], [0, 1]], [[1, 0], [0, 1]]), r"different ranks: 1 \(one\), 2 \(two\)"),
        ("cat", term("two", [[1, 2, 3]], [[1], [0]]), "different kinds or shapes"),
        ("svd", term("two", [[1, 2]], [[1], [0]], embedding=True), "different kinds or shapes"),
        ("magnitude_prune_svd", term("two", [[1, 2]], [[1], [0]], scale=3e38, strength=10), "float32 cannot hold"),
        ("linear", term("two", [[3e38, 2]], [[1], [0]], scale=1e6), "not finite"),
    ],
)
def test_pairs_that_do_not_go_together_are_refused(method: str, others: Term, message: str) -> None:
    combination = Combination(method, 0.5 if "prune" in method else None)
    with pytest.raises(InputRefused, match=message):
        combined_pair(combination, [ONE, others], NUMBERS, 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "sum"}, "method= is 'sum'; it must be cat, linear"),
        ({"method": "ties"}, "needs density="),
        ({"method": "ties", "density": 0.0}, "above 0 and at most 1"),
        ({"method": "ties", "density": float("nan")}, "above 0 and at most 1"),
        ({"method": "linear", "density": 0.5}, 'density=: combination="linear" does not use it'),
        ({"method": "dare_linear", "density": 0.5, "majority_sign": "total"}, "majority_sign=: "),
        ({"method": "ties", "density": 0.5, "majority_sign": "all"}, "must be total or frequency"),
        ({"method": "ties", "density": 0.5, "seed": 1, "svd_rank": 2}, "svd_rank= and seed=: "),
        ({"method": "svd", "svd_rank": 0}, "at least 1"),
    ],
)
def test_options_that_a_method_does_not_use_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(WrongUsage, match=message):
        Combination(**values)


def test_the_record_has_what_was_used() -> None:
    assert Combination().settings == {}
    assert Combination("dare_ties", 0.5).settings == {
        "combine": {"method": "dare_ties", "density": 0.5, "majority_sign": "total", "seed": 0}
    }
    assert str(Combination("dare_ties", 0.5, seed=3)) == "dare_ties (majority_sign total, seed 3, density 0.5)"


@pytest.mark.parametrize(("shape", "kernel"), [((5, 4), 2), ((9, 4), 1)])
def test_the_sum_with_a_loha_is_no_larger_than_the_change(shape: tuple[int, int], kernel: int) -> None:
    rng = np.random.default_rng(0)
    out, inner = shape
    factors = {"a1": (3, inner, kernel), "b1": (out, 3), "a2": (4, inner, kernel), "b2": (out, 4)}
    loha = HadamardPair({name: rng.standard_normal(size) for name, size in factors.items()}, 0.5)
    plain = LoraPair(rng.standard_normal((2, inner, kernel)), rng.standard_normal((out, 2, 1)), 3.0)
    terms = [Term("one", "m", loha, 2.0), Term("two", "m", plain, -1.0)]
    expected = 2 * loha.delta().astype(np.float64) - plain.delta()
    found = combined_pair(Combination(), terms, NUMBERS, 12)
    assert found.rank == min(out, inner * kernel) and found.scale == 1
    np.testing.assert_allclose(found.delta(), expected, atol=1e-5)
    svd = combined_pair(Combination("svd", svd_rank=3), terms, NUMBERS, 12)
    values = np.linalg.svd(expected.reshape(out, -1))[1]
    assert np.linalg.norm(svd.delta() - expected) == pytest.approx(np.sqrt(np.sum(values[3:] ** 2)), rel=1e-4)


def test_a_method_of_factors_refuses_a_change_that_has_none() -> None:
    loha = HadamardPair({name: np.ones((2, 3) if name[0] == "a" else (3, 2)) for name in ("a1", "b1", "a2", "b2")}, 1.0)
    terms = [Term("one", "m", loha, 1.0), Term("two", "m", loha, 1.0)]
    with pytest.raises(InputRefused, match=r"HadamardPair \(one\), HadamardPair \(two\): ties combines A with A and"):
        combined_pair(Combination("ties", density=0.5), terms, NUMBERS, 4)


# --- Sums, elected signs and removed entries, by hand and against PEFT's functions. ---


FIRST = np.array([[4, -1, 0], [2, 3, -5]], np.float32)
SECOND = np.array([[-1, -2, 7], [2, -4, 1]], np.float32)
WEIGHTS = np.array([0.5, 2], np.float32)
ARRAYS = np.random.default_rng(1).normal(size=(3, 40, 30)).astype(np.float32)


def test_a_weighted_sum() -> None:
    assert ours.weighted_sum([FIRST, SECOND], WEIGHTS).tolist() == [[0, -4.5, 14], [5, -6.5, -0.5]]


def test_values_of_the_elected_sign_are_averaged() -> None:
    # Signs of the sums: + - +; + - -. Zero agrees with no sign. Weights do not vote.
    assert ours.elected_mean([FIRST, SECOND], WEIGHTS, "total").tolist() == [[2, -2.25, 14], [2.5, -8, -2.5]]
    # Most signs: a draw counts as positive.
    assert ours.elected_mean([FIRST, SECOND], WEIGHTS, "frequency").tolist() == [[2, -2.25, 14], [2.5, 1.5, 2]]


def test_the_largest_entries_stay() -> None:
    assert ours.largest_entries(FIRST, 0.5).tolist() == [[4, 0, 0], [0, 3, -5]]
    assert ours.largest_entries(FIRST, 0.1).tolist() == np.zeros((2, 3)).tolist()
    assert ours.largest_entries(FIRST, 1.0) is FIRST
    assert ours.largest_entries(np.ones((1, 4), np.float32), 0.5).tolist() == [[1, 1, 0, 0]]


def test_random_entries_stay_and_are_rescaled() -> None:
    found = ours.random_entries(ARRAYS[0], 0.25, "key")
    kept = found != 0
    assert 0.2 < kept.mean() < 0.3
    np.testing.assert_array_equal(found[kept], ARRAYS[0][kept] / np.float32(0.25))
    assert ours.random_entries(FIRST, 1.0, "key") is FIRST


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
