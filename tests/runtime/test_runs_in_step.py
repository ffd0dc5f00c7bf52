"""Runs in step: a weight is used once for all runs that come to it, and an error ends no other run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar

import pytest

from lora_export.runtime.runs_in_step import Meet, by_itself, run_in_step

WEIGHTS = [[1.0], [10.0], [100.0]]
USED: ContextVar[list[tuple[float, int]]] = ContextVar("USED")


def times(weight: Sequence[float], values: Sequence[float]) -> list[float]:
    if weight[0] < 0:
        raise ValueError(f"a weight of {weight[0]}")
    USED.get().append((weight[0], len(values)))
    return [weight[0] * value for value in values]


def through(weights: Sequence[Sequence[float]], value: float) -> Callable[[Meet], float]:
    def run(meet: Meet) -> float:
        total = 0.0
        for weight in weights:
            total += meet(times, weight, value)
        return total

    return run


@pytest.fixture
def used() -> list[tuple[float, int]]:
    """Each use of a weight, and for how many runs."""
    USED.set([])
    return USED.get()


def test_a_weight_is_used_once_for_all_runs(used: list[tuple[float, int]]) -> None:
    assert run_in_step([through(WEIGHTS, value) for value in (1, 2, 3)]) == [111, 222, 333]
    assert used == [(1, 3), (10, 3), (100, 3)]
    assert through(WEIGHTS, 2)(by_itself) == 222 and used[3:] == [(1, 1), (10, 1), (100, 1)]


def test_runs_with_other_weights_get_their_own(used: list[tuple[float, int]]) -> None:
    runs = [through(WEIGHTS, 1), through(WEIGHTS[:1], 2), through(WEIGHTS[::-1], 3), through([], 4)]
    assert run_in_step(runs) == [111, 2, 333, 0]
    assert used == [(1, 2), (100, 1), (10, 2), (100, 1), (1, 1)]
    assert run_in_step([]) == []


def test_a_weight_that_two_runs_use_otherwise_is_used_for_each(used: list[tuple[float, int]]) -> None:
    def plus(weight: Sequence[float], values: Sequence[float]) -> list[float]:
        return [weight[0] + value for value in values]

    def run(meet: Meet) -> float:
        result: float = meet(plus, WEIGHTS[1], 5)
        return result

    assert run_in_step([through(WEIGHTS[1:2], 5), run]) == [50, 15]
    assert used == [(10, 1)]


def test_a_run_has_the_context_variables_of_its_caller(used: list[tuple[float, int]]) -> None:
    """The settings of a proof are such variables: a new thread has none."""

    def run(meet: Meet) -> float:
        assert USED.get() is used
        USED.set([])
        return through(WEIGHTS, 1)(meet)

    assert run_in_step([run, run]) == [111, 111] and USED.get() is used


def test_an_error_is_raised_when_the_others_have_ended(used: list[tuple[float, int]]) -> None:
    ended = []

    def good(meet: Meet) -> float:
        result = through(WEIGHTS, 1)(meet)
        ended.append(result)
        return result

    with pytest.raises(ValueError, match="a weight of -1"):
        run_in_step([through([[-1.0]], 1), good])
    with pytest.raises(ZeroDivisionError):
        run_in_step([lambda meet: 1 / 0, good])
    assert ended == [111, 111]


def test_ctrl_c_ends_all_runs(used: list[tuple[float, int]]) -> None:
    before = threading.active_count()

    def interrupt(weight: object, values: Sequence[float]) -> list[float]:
        raise KeyboardInterrupt

    def run(meet: Meet) -> float:
        result: float = meet(interrupt, WEIGHTS[0], 1)
        return result

    with pytest.raises(KeyboardInterrupt):
        run_in_step([run, through(WEIGHTS, 1)])
    assert threading.active_count() == before
