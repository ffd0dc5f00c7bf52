"""Rows that are held out, examples of each step, and its learning rate."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.training.order import ShuffledOrder, learning_rate_factor, parts_of, split_rows


def test_every_row_is_seen_once_an_epoch_in_seeded_order() -> None:
    orders = []
    for seed in (0, 1):
        order = ShuffledOrder(10, 4, seed)
        steps = [order.rows_of(step) for step in range(6)]
        assert [len(rows) for rows in steps] == [4, 4, 2, 4, 4, 2]
        assert [order.epoch_of(step) for step in range(6)] == [0, 0, 0, 1, 1, 1]
        orders += [tuple(row for rows in half for row in rows) for half in (steps[:3], steps[3:])]
        assert ShuffledOrder(10, 4, seed).rows_of(4) == steps[4]  # whatever came before
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len({*orders, tuple(range(10))}) == 5


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 2, 7, 12])
def test_processes_and_parts_together_have_every_row_once(count: int, parts: int, processes: int) -> None:
    rows = list(range(100, 100 + count))
    shares = [parts_of(rows, parts, rank=rank, processes=processes) for rank in range(processes)]
    assert sorted(row for share in shares for part in share for row in part) == rows
    assert all(len(share) <= parts for share in shares)
    largest = [len(part) for share in shares for part in share]
    assert max(largest) <= -(-count // (parts * processes))


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


def test_a_holdout_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(InputRefused, match=r"10 examples are too few to .* of each class.*holdout=0"):
        split_rows(groups(5, 5), 0.01, seed=0)


def test_without_classes_no_class_is_named() -> None:
    with pytest.raises(InputRefused, match=r"^1 example is too few to hold out"):
        split_rows(groups(1), 0.2, seed=0)
    with pytest.raises(InputRefused, match=r"^2 examples are too few to hold out 0\.2 of them\. "):
        split_rows(groups(2), 0.2, seed=0)


def factors(schedule: str, steps: int, warmup: float) -> list[float]:
    return [learning_rate_factor(schedule, step, steps, warmup) for step in range(steps)]


def test_rates_warm_up_and_then_follow_the_schedule() -> None:
    warm = [1 / 3, 2 / 3, 1]
    assert factors("linear", 10, 0.2) == pytest.approx([*warm, *(number / 8 for number in (7, 6, 5, 4, 3, 2, 1))])
    assert factors("constant", 5, 0.4) == pytest.approx([*warm, 1, 1])
    cosine = [(1 + math.cos(math.pi * number / 4)) / 2 for number in range(4)]
    assert factors("cosine", 4, 0.0) == pytest.approx(cosine)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_every_step_learns(schedule: str) -> None:
    assert factors(schedule, 1, 0.9) == [1.0]
    assert min(factors(schedule, 7, 0.5)) > 0
