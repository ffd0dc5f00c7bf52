"""Read and write at a position of an open file, from several threads at once.

Linux and macOS do it in one system call. Windows has none: there a lock per descriptor makes one step of moving the
file's position, reading or writing, and moving it back.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
from collections.abc import Iterator

_locks: dict[int, threading.Lock] = {}  # by descriptor


def read_at(descriptor: int, buffer: memoryview, position: int) -> int:
    """Fill the first bytes of `buffer` from a position of the file. Returns how many; 0 at the file's end."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], position)
    with _moved_to(descriptor, position), io.FileIO(descriptor, closefd=False) as file:
        return file.readinto(buffer)


def write_at(descriptor: int, data: memoryview, position: int) -> int:
    """Write the first bytes of `data` at a position of the file. Returns how many."""
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
