"""What the operating system does for files: functions of the C library, reads at positions, signals that wait.

Linux and macOS read and write at a position in one system call. Windows has none: there a lock per descriptor makes one
step of moving the file's position, reading or writing, and moving it back.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import itertools
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, Protocol

_locks: dict[int, threading.Lock] = {}  # by descriptor


def c_function(name: str) -> Any | None:
    """A function of the C library, or None. A call of it stores its error for `ctypes.get_errno()`."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
    except (TypeError, OSError):  # on Windows, the C library has no default name
        return None
    return getattr(library, name, None)


# --- Reading and writing at a position of an open file, from several threads at once ---


class Opened(Protocol):
    """What is read or written at positions as a file is, and is none of the operating system's."""

    def read_at(self, buffer: memoryview, position: int) -> int: ...
    def write_at(self, data: memoryview, position: int) -> int: ...
    def status(self) -> os.stat_result: ...


_opened: dict[int, Opened] = {}  # by descriptors that no file has: the system's calls refuse numbers below 0
_numbers = itertools.count(-1000, -1)


def descriptor_of(opened: Opened) -> int:
    """A descriptor for `read_at`, `write_at` and `file_status`, until `forget_descriptor`."""
    descriptor = next(_numbers)
    _opened[descriptor] = opened
    return descriptor


def forget_descriptor(descriptor: int) -> None:
    _opened.pop(descriptor, None)


def file_status(descriptor: int) -> os.stat_result:
    """What `os.fstat` returns."""
    return _opened[descriptor].status() if descriptor in _opened else os.fstat(descriptor)


def read_at(descriptor: int, buffer: memoryview, position: int) -> int:
    """Fill the first bytes of `buffer` from a position of the file. Returns how many; 0 at the file's end."""
    if descriptor in _opened:
        return _opened[descriptor].read_at(buffer, position)
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], position)
    with _moved_to(descriptor, position), io.FileIO(descriptor, closefd=False) as file:
        return file.readinto(buffer)


def write_at(descriptor: int, data: memoryview, position: int) -> int:
    """Write the first bytes of `data` at a position of the file. Returns how many."""
    if descriptor in _opened:
        return _opened[descriptor].write_at(data, position)
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, data, position)
    with _moved_to(descriptor, position):
        return os.write(descriptor, data)


@contextlib.contextmanager
def _moved_to(descriptor: int, position: int) -> Iterator[None]:
    with _locks.setdefault(descriptor, threading.Lock()):
        before = os.lseek(descriptor, 0, os.SEEK_CUR)  # the caller's file object relies on it
        os.lseek(descriptor, position, os.SEEK_SET)
        try:
            yield
        finally:
            os.lseek(descriptor, before, os.SEEK_SET)


# --- Short steps that Ctrl-C and SIGTERM do not interrupt ---


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
