"""Short steps that Ctrl-C and SIGTERM do not interrupt."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


@contextlib.contextmanager
def deferred_signals() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait for the block's end.

    The block must be short. Interrupted halfway, it would leave something behind. Outside the main thread this does
    nothing, because Python delivers signals to the main thread only.
    """
    pending: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the handler's signature
        pending.append(number)

    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in previous:
            signal.signal(number, remember)
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for number in pending[:1]:
            signal.raise_signal(number)
