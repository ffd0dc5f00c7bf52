"""One thread at a time where PyTorch itself is changed.

torch.export exchanges functions of PyTorch while it traces, and so does an export for models that a trace cannot
follow. A model that another thread runs meanwhile would be traced too, and two that put back what they found leave
behind what the other one had exchanged: for good, in every later run of the process.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

PYTORCH_TURN = threading.RLock()  # again by a callback of the same thread

_P = ParamSpec("_P")
_R = TypeVar("_R")


def in_turn(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """A function that waits until no other thread is in one of these."""

    @functools.wraps(function)
    def call(*arguments: _P.args, **keywords: _P.kwargs) -> _R:
        with PYTORCH_TURN:
            return function(*arguments, **keywords)

    return call
