"""Requests that need nothing of each other: all of them are done, also those whose worker dies."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterable, Iterator
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
    waiting, suspects = [(request, 1) for request in reversed(list(requests))], list[tuple[_R, int]]()
    running: dict[concurrent.futures.Future[Any], tuple[_R, int]] = {}

    def submit(request: _R, tries: int) -> None:
        running[engine.submit(request, memory, on_gpu=False)] = request, tries

    while waiting or suspects or running:
        if suspects and not running:
            submit(*suspects.pop())
        while waiting and not suspects and len(running) < _most(engine, running.values()):
            submit(*waiting.pop())
        for future in concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED).done:
            request, tries = running.pop(future)
            error = future.exception()
            if error is None:
                yield request, future.result()
            elif not (reason := engine.died(error)):
                raise error
            elif engine.is_tried_again and tries < TRIES_OF_JOB:
                suspects.append((request, tries + 1))
            else:
                raise EnvironmentLacking(f"{request.name}: {reason} ({TRIES_OF_JOB} times)")


def _most(engine: Engine, running: Iterable[tuple[Any, int]]) -> int:
    """How many may run beside these: a second try runs alone."""
    return 1 if any(tries > 1 for _, tries in running) else engine.at_once
