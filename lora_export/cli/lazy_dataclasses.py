"""Dataclasses that are completed when they are first used.

`dataclass` compiles four to six methods for each class, which takes half a millisecond. A merge imports 140 such
classes, and uses 40 of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

_PACKAGE = __package__.partition(".")[0]

_pending: dict[type, dict[str, Any]] = {}  # classes that are not complete, with the settings of their decorator
_lock = threading.RLock()
_complete = dataclasses.dataclass


@contextlib.contextmanager
def lazy_dataclasses() -> Iterator[None]:
    """Within the block, a class of this package that is decorated as a dataclass becomes one when it is first used."""
    dataclasses.dataclass = _declare
    try:
        yield
    finally:
        dataclasses.dataclass = _complete


def _declare(cls: type | None = None, /, **settings: Any) -> Any:
    if cls is None:
        return lambda decorated: _declare(decorated, **settings)
    makes_instances = cls.__new__ not in (object.__new__, _new) or "__init__" in vars(cls) or settings.get("slots")
    if makes_instances or cls.__module__.partition(".")[0] != _PACKAGE:
        return _complete(cls, **settings)
    _pending[cls] = settings
    cls.__dataclass_fields__ = _Fields()  # type: ignore[attr-defined]
    cls.__new__ = _new  # type: ignore[assignment]
    return cls


def _new(cls: type, *_: Any, **__: Any) -> Any:
    """Every instance is made here, also that of a subclass and of a pickle. `__init__` is looked up afterwards."""
    _complete_all(cls)
    return object.__new__(cls)


class _Fields:
    """In place of a class's fields, which `fields`, `is_dataclass` and the decorator of a subclass look up."""

    def __get__(self, instance: object, cls: type) -> dict[str, dataclasses.Field[Any]]:
        _complete_all(cls)
        found: dict[str, dataclasses.Field[Any]] = cls.__dataclass_fields__  # type: ignore[attr-defined]
        return found


def _complete_all(cls: type) -> None:
    """Complete a class and those from which it inherits. Another thread waits until that is done."""
    if _pending.keys().isdisjoint(cls.__mro__):
        return
    with _lock:
        for one in reversed(cls.__mro__):
            if one in _pending:
                _complete(one, **_pending[one])
                del _pending[one]
