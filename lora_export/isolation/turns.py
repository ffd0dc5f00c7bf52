"""One thread at a time where PyTorch itself is changed.

torch.export exchanges functions of PyTorch while it traces, and so does an export for models that a trace cannot
follow. A model that another thread runs meanwhile would be traced too, and two that put back what they found leave
behind what the other one had exchanged: for good, in every later run of the process.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

_lock = threading.RLock()  # a callback of the same thread may take it again

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _renew() -> None:
    """Give a child process a lock of its own: the thread that holds the parent's does not exist there."""
    global _lock  # noqa: PLW0603 - who is inside releases the lock that it took
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


@contextlib.contextmanager
def pytorch_turn() -> Iterator[None]:
    """The context in which this thread may change PyTorch. Waits until no other thread is in one."""
    with _lock:
        yield


def in_turn(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """A function that waits until no other thread is in one of these."""

    @functools.wraps(function)
    def call(*arguments: _P.args, **keywords: _P.kwargs) -> _R:
        with pytorch_turn():
            return function(*arguments, **keywords)

    return call
