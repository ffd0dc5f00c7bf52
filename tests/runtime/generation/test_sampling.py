"""The choice of a token: the most probable one, or a seeded draw."""

from __future__ import annotations

import numpy as np
import pytest

from lora_export.errors import WrongUsage
from lora_export.runtime.generation.sampling import Sampling

LOGITS = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))


def drawn(sampling: Sampling, count: int, logits: np.ndarray = LOGITS) -> np.ndarray:
    generators = sampling.generators(1)
    return np.array([sampling.choose(logits, generators)[0] for _ in range(count)])


def test_no_temperature_takes_the_most_probable_token_of_each_row() -> None:
    logits = np.array([[1, 3, 2], [5, 0, 9]], np.float32)
    assert Sampling().choose(logits, Sampling().generators(2)).tolist() == [1, 2]


def test_draws_have_the_probabilities_of_the_softmax() -> None:
    tokens = drawn(Sampling(temperature=1.0), 4000)
    shares = np.bincount(tokens, minlength=4) / len(tokens)
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.15, 0.05], atol=0.03)


def test_higher_temperature_evens_the_probabilities_out() -> None:
    tokens = drawn(Sampling(temperature=2.0), 4000)
    expected = np.sqrt([0.5, 0.3, 0.15, 0.05])
    np.testing.assert_allclose(np.bincount(tokens) / len(tokens), expected / expected.sum(), atol=0.03)


@pytest.mark.parametrize(("top_p", "possible"), [(0.5, {0}), (0.51, {0, 1}), (0.8, {0, 1}), (0.94, {0, 1, 2})])
def test_top_p_leaves_out_improbable_tokens(top_p: float, possible: set[int]) -> None:
    assert set(drawn(Sampling(temperature=1.0, top_p=top_p), 500).tolist()) == possible


def test_draws_of_a_row_depend_on_the_seed_and_no_neighbour() -> None:
    logits = np.zeros((1, 50), np.float32)
    one = drawn(Sampling(1.0, seed=3), 20, logits)
    assert one.tolist() == drawn(Sampling(1.0, seed=3), 20, logits).tolist()
    assert one.tolist() != drawn(Sampling(1.0, seed=4), 20, logits).tolist()
    sampling = Sampling(1.0, seed=3)
    generators = sampling.generators(2)
    both = np.array([sampling.choose(np.zeros((2, 50), np.float32), generators) for _ in range(20)])
    assert both[:, 0].tolist() == one.tolist()
    assert both[:, 1].tolist() != one.tolist()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "the temperature is -1"),
        ({"temperature": float("nan")}, "the temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"seed": -1}, "the seed is -1"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(WrongUsage, match=message):
        Sampling(**values)  # type: ignore[arg-type]
