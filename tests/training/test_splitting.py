"""Rows that are held out of training."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.training.splitting import split_rows


def groups(*counts: int) -> NDArray[np.int64]:
    return np.repeat(np.arange(len(counts)), counts)


def test_the_same_part_of_each_group_is_held_out() -> None:
    for seed in range(5):
        trained_on, held_out = split_rows(groups(10, 20, 1), 0.2, seed=seed)
        assert np.bincount(groups(10, 20, 1)[held_out], minlength=3).tolist() == [2, 4, 0]
        assert sorted([*trained_on, *held_out]) == list(range(31))
        assert list(trained_on) == sorted(trained_on)


def test_every_group_keeps_a_row_to_train_on() -> None:
    trained_on, _ = split_rows(groups(10, 2, 1), 0.9, seed=0)
    assert np.bincount(groups(10, 2, 1)[trained_on]).tolist() == [1, 1, 1]


def test_a_split_repeats_by_seed() -> None:
    first, again, other = (split_rows(groups(30, 30), 0.2, seed=seed)[1].tolist() for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("holdout", "message"),
    [
        (0.0, "between 0 and 1"),
        (1.0, "between 0 and 1"),
        (0.01, r"10 examples are too few to .* of each class.*holdout=0"),
    ],
)
def test_a_holdout_that_leaves_nothing_is_refused(holdout: float, message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        split_rows(groups(5, 5), holdout, seed=0)


def test_without_classes_no_class_is_named() -> None:
    with pytest.raises(InputRefused, match=r"^2 examples are too few to hold out 0\.2 of them\. "):
        split_rows(groups(2), 0.2, seed=0)
