"""Requests that need nothing of each other: all of them are done, also those whose worker dies."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from lora_export.errors import EnvironmentLacking
from lora_export.workers.engines import TRIES_OF_JOB, Engine, Request

_R = TypeVar("_R", bound=Request)


def each_result(engine: Engine, requests: Iterable[_R], memory: int) -> Iterator[tuple[_R, Any]]:
    """Yield each request with what came of it, in the order in which they end. `memory` is that of one, in bytes.

    The death of a process ends all that run beside it. These are tried again one at a time, so that one that takes all
    memory ends no other. Raises EnvironmentLacking where one ended its worker TRIES_OF_JOB times, and what the
    function of the engine raises.
    """
    waiting = [(request, 1) for request in reversed(list(requests))]  # with the number of the try; the last is next
    running: dict[concurrent.futures.Future[Any], tuple[_R, int]] = {}
    while waiting or running:
        while waiting and _has_place(waiting[-1][1], [tries for _, tries in running.values()], engine.at_once):
            request, tries = waiting.pop()
            running[engine.submit(request, memory, on_gpu=False)] = request, tries
        for future in concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED).done:
            request, tries = running.pop(future)
            error = future.exception()
            if error is None:
                yield request, future.result()
            elif not (reason := engine.died(error)):
                raise error
            elif engine.is_tried_again and tries < TRIES_OF_JOB:
                waiting.append((request, tries + 1))
            else:
                raise EnvironmentLacking(f"{request.name}: {reason} ({TRIES_OF_JOB} times)")


def _has_place(tries: int, running: Sequence[int], at_once: int) -> bool:
    """Whether a request may run beside others, by the number of its try and of theirs: a second try runs alone."""
    return not running or (max(tries, *running) == 1 and len(running) < at_once)
