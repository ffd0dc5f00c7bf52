"""All requests are done, whichever workers die: the tries, their order, and what ends the whole."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import pytest

from lora_export.errors import EnvironmentLacking
from lora_export.workers.tasks import each_result


@dataclass(frozen=True)
class Named:
    name: str


class Died(Exception):
    pass


class Dying:
    """An engine whose futures end two at a time; a death ends both. Keeps what ran at the same time."""

    def __init__(self, deaths: dict[str, int], *, at_once: int = 2, is_tried_again: bool = True):
        self.deaths, self.at_once, self.is_tried_again = deaths, at_once, is_tried_again
        self.together: list[list[str]] = []
        self._open: list[tuple[str, Future[Any]]] = []

    def submit(self, request: Named, memory: int, *, on_gpu: bool) -> Future[Any]:
        assert memory == 7 and not on_gpu
        future: Future[Any] = Future()
        self._open.append((request.name, future))
        return future

    def died(self, error: BaseException) -> str:
        return "it died" if isinstance(error, Died) else ""

    def end_what_runs(self, *_: Any, **__: Any) -> None:
        running, self._open = self._open, []
        self.together.append([name for name, _ in running])
        is_death = any(self.deaths.get(name, 0) > 0 for name, _ in running)
        for name, future in running:
            self.deaths[name] = self.deaths.get(name, 0) - 1
            future.set_exception(Died()) if is_death else future.set_result(name.upper())


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    from lora_export.workers import tasks

    def run(engine: Dying) -> list[Any]:
        wait = tasks.concurrent.futures.wait

        def ended(running: Any, **options: Any) -> Any:
            engine.end_what_runs()
            return wait(running, **options)

        monkeypatch.setattr(tasks.concurrent.futures, "wait", ended)
        return [(one.name, found) for one, found in each_result(engine, map(Named, "abcd"), 7)]

    return run


def test_as_many_run_as_the_engine_takes(run: Callable[..., list[Any]]) -> None:
    engine = Dying({})
    assert sorted(run(engine)) == [("a", "A"), ("b", "B"), ("c", "C"), ("d", "D")]
    assert engine.together == [["a", "b"], ["c", "d"]]


def test_what_ran_when_a_worker_died_is_tried_again_alone(run: Callable[..., list[Any]]) -> None:
    engine = Dying({"b": 2})
    assert sorted(found for found, _ in run(engine)) == ["a", "b", "c", "d"]
    first, *again, last = engine.together
    assert (first, sorted(again), last) == (["a", "b"], [["a"], ["b"], ["b"]], ["c", "d"])


def test_the_third_death_ends_the_whole(run: Callable[..., list[Any]]) -> None:
    with pytest.raises(EnvironmentLacking, match=r"b: it died \(3 times\)"):
        run(Dying({"b": 3}))


def test_an_engine_that_tries_again_itself_gets_a_request_once(run: Callable[..., list[Any]]) -> None:
    engine = Dying({"b": 1}, is_tried_again=False)
    with pytest.raises(EnvironmentLacking, match="it died"):
        run(engine)
    assert engine.together == [["a", "b"]]


def test_an_error_of_the_work_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    class Faulty(Dying):
        def submit(self, request: Named, memory: int, *, on_gpu: bool) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_exception(KeyError(request.name))
            return future

    with pytest.raises(KeyError, match="a"):
        list(each_result(Faulty({}, at_once=1), [Named("a")], 7))
