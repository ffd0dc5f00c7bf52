"""Calls that end after a time, or at Ctrl-C."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


@contextlib.contextmanager
def deadline(seconds: float, stop: Callable[[], None]) -> Iterator[threading.Event]:
    """Call `stop` in another thread after so many seconds, unless the context has ended, and set the event before.

    `stop` is never called after the context, and nothing refers to it then.
    """
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        stop()

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield expired
    finally:
        timer.cancel()
        timer.join()


def call_within(seconds: float, call: Callable[[], Result], stop: Callable[[], None]) -> Result:
    """The result of a call in another thread, which `stop` ends after so many seconds, or at Ctrl-C.

    Python sees Ctrl-C when a call of a library returns, and an endless one does not. Raises TimeoutError once a call
    that took too long has ended.
    """
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(call)
        try:
            return future.result(None if math.isinf(seconds) else seconds)
        finally:
            if not future.done():
                stop()
