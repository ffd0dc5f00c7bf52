"""A context of the whole process, in which several threads may be at once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any


class SharedContext(contextlib.AbstractContextManager[None]):
    """The first thread enters the contexts that `make` makes, the last one leaves them.

    Where each thread put a function of its own into a library's place, they could end in another order than they began:
    the library would keep one of these functions.
    """

    def __init__(self, *make: Callable[[], contextlib.AbstractContextManager[Any]]):
        self._make = make
        self._lock, self._inside, self._entered = threading.Lock(), 0, contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                with contextlib.ExitStack() as entered:
                    for make in self._make:
                        entered.enter_context(make())
                    self._entered = entered.pop_all()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._entered.close()
