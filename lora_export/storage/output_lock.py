"""The lock of an output: one run writes it at a time, and a second run ends at once.

The lock is `flock` on Linux and macOS; elsewhere the library filelock makes it, on Windows by `LockFileEx`. It takes
longer to import than a small merge needs for its plan. The operating system frees the lock of a run that was killed.
Opening, signing and removing the lock's file stay here, because filelock's own FileLock leaves the file on the disk,
and does not record which process holds it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from lora_export.errors import OutputFailed
from lora_export.storage.system_calls import deferred_signals

LONGEST_SIGNATURE = 32  # bytes
TAKEN = frozenset({errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK})  # EACCES: of some network file systems
# O_NOFOLLOW: a symbolic link that appears after the check is not followed. O_BINARY: Windows keeps every byte.
LOCK_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


@contextlib.contextmanager
def output_lock(path: Path, target: Path) -> Iterator[None]:
    """Hold the lock at `path` while the block writes `target`. Raises OutputFailed where another run holds it."""
    lock = _lock_of_system()
    take = _marker_file if lock is None else functools.partial(_locked_file, lock)
    release: Callable[[], None] | None = None
    try:
        with deferred_signals():
            if path.is_symlink():
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
            release = take(path, target)
        yield
    finally:
        if release is not None:
            with deferred_signals():
                release()


def _lock_of_system() -> Callable[[int], bool] | None:
    """What locks an open file, and returns False where another process has its lock; None on a system without it."""
    try:
        import fcntl

        _ = fcntl.flock
    except (ImportError, AttributeError):
        if sys.platform == "win32":
            from filelock import lock_descriptor

            return functools.partial(lock_descriptor, blocking=False)
        return None

    def lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in TAKEN:
                raise
            return False
        return True

    return lock


def _locked_file(lock: Callable[[int], bool], path: Path, target: Path) -> Callable[[], None]:
    """Take the lock and return the function that releases it."""
    while True:
        descriptor = os.open(path, LOCK_FLAGS, 0o666)
        try:
            locked = lock(descriptor)
        except OSError:  # a file system without locks
            _remove(path, descriptor)
            raise
        # Windows locks the file's first byte, and lets no other process read it. So the signature begins behind it.
        if not locked:
            os.lseek(descriptor, 1, os.SEEK_SET)
            owner = os.read(descriptor, LONGEST_SIGNATURE).decode("ascii", "replace").strip()
            os.close(descriptor)
            raise _taken(owner, target)
        if os.fstat(descriptor).st_nlink:
            with contextlib.suppress(OSError):  # on a full disk, the lock holds without a signature
                os.truncate(descriptor, 0)
                os.write(descriptor, f" {os.getpid()}\n".encode())
            return lambda: _remove(path, descriptor)
        # Between our open and our lock, the owner finished and removed the file: the one that we hold has no name.
        os.close(descriptor)


def _remove(path: Path, descriptor: int) -> None:
    """Remove the lock's file while it is still locked: a file that is unlocked first may be another run's by then."""
    try:
        path.unlink(missing_ok=True)
    except PermissionError:  # Windows removes no file that is open
        os.close(descriptor)
        with contextlib.suppress(OSError):  # another run has opened it meanwhile, and will remove it
            path.unlink(missing_ok=True)
    else:
        os.close(descriptor)


def _marker_file(path: Path, target: Path) -> Callable[[], None]:
    """Where the system has no locks, the file's existence is the lock. filelock replaces the file of a dead process."""
    from filelock import SoftFileLock, Timeout

    marker = SoftFileLock(path)
    for _ in range(2):  # the first attempt may do no more than remove the file of a dead process
        with contextlib.suppress(Timeout):
            marker.acquire(blocking=False)
            return marker.release
    raise _taken(str(marker.pid or ""), target)


def _taken(owner: str, target: Path) -> OutputFailed:
    return OutputFailed(f"another run (process {owner or 'unknown'}) is writing {target}")
