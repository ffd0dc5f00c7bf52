"""Runs that need the same weights one after the other: each weight is read and converted once for all of them.

Every run is a thread, and one thread runs at a time. A run that comes to a weight waits until all others wait, too.
Then each weight that some of them wait for is used for all of these. What a run computes does not depend on the others:
it has the bits of a run by itself. Runs that come to other weights wait for their own.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

T = TypeVar("T")
MOST_IN_STEP = 1 << 28  # bytes of the outputs of runs that are computed together

Compute = Callable[[Any, Sequence[Any]], Sequence[Any]]  # of a weight, and of the arguments of each run
Meet = Callable[[Compute, Any, Any], Any]  # compute, the weight, and this run's arguments: the result of this run


def by_itself(compute: Compute, weight: Any, arguments: Any) -> Any:
    """The `Meet` of a run without others."""
    return compute(weight, [arguments])[0]


class _Request(NamedTuple):
    compute: Compute
    weight: Any
    arguments: Any


class _Abandoned(BaseException):
    """Ends a run whose result nobody waits for."""


class InTurn(Generic[T]):
    """Work in a thread of its own, which goes on while `advance` waits for it."""

    def __init__(self, work: Callable[[], T]) -> None:
        self.request: Any = None  # what it waits for; None before its start and after its end
        self._answer: Any = None
        self._error: BaseException | None = None
        self._go_on, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        own = contextvars.copy_context().run
        self._thread = threading.Thread(target=own, args=(self._work, work), daemon=True)

    def advance(self, answer: Any = None) -> None:
        """Let it go on to its next request, or to its end. An answer that is an error is raised in it."""
        self.request, self._answer = None, answer
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go_on.release()
        self._waits.acquire()

    def wait_for(self, request: Any) -> Any:
        """In its thread: the answer to a request."""
        self.request = request
        self._waits.release()
        self._go_on.acquire()
        if isinstance(self._answer, BaseException):
            raise self._answer
        return self._answer

    def end(self, error: BaseException) -> None:
        """Raise an error in it where it waits, or comes to wait."""
        self._answer = error
        self._go_on.release()

    def join(self, seconds: float | None = None) -> None:
        """Wait until its thread has ended, for so long at most."""
        if self._thread.ident is not None:
            self._thread.join(seconds)

    @property
    def result(self) -> T:
        """What it returned. Raises what it raised."""
        if self._error is not None:
            raise self._error
        return self._result

    def _work(self, work: Callable[[], T]) -> None:
        try:
            self._result = work()
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is read
            self._error = error
        self._waits.release()


class _Run(InTurn[T]):
    """A run whose requests are its weights."""

    def __init__(self, call: Callable[[Meet], T]) -> None:
        super().__init__(lambda: call(self._meet))

    def _meet(self, compute: Compute, weight: Any, arguments: Any) -> Any:
        return self.wait_for(_Request(compute, weight, arguments))


def run_in_step(calls: Sequence[Callable[[Meet], T]]) -> list[T]:
    """The results of the calls, which get their weights by the function that they are given.

    Raises what the first of them raises that fails; all others are run to their end.
    """
    runs = [_Run(call) for call in calls]
    try:
        for run in runs:
            run.advance()
        while waiting := [(run, run.request) for run in runs if run.request is not None]:
            answers = _answers([request for _, request in waiting])
            for (run, request), answer in zip(waiting, answers, strict=True):
                del request
                run.advance(answer)
    except BaseException:
        for run in runs:
            run.end(_Abandoned())
            run.join()
        raise
    return [run.result for run in runs]


def _answers(requests: Sequence[_Request]) -> list[Any]:
    """The result of each request, or the error that ended its weight."""
    answers: list[Any] = [None] * len(requests)
    groups: dict[tuple[int, str], list[int]] = {}  # a tied weight may be a table in one run and a layer in another
    for number, request in enumerate(requests):
        groups.setdefault((id(request.weight), getattr(request.compute, "__name__", "")), []).append(number)
    for numbers in groups.values():
        first = requests[numbers[0]]
        try:
            found = first.compute(first.weight, [requests[number].arguments for number in numbers])
        except Exception as error:  # noqa: BLE001 - each run describes it as its own
            found = [error] * len(numbers)
        for number, one in zip(numbers, found, strict=True):
            answers[number] = one
    return answers
