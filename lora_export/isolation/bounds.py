"""Bounds on what a process takes: its memory for a while or for good, its processor time, the files that it writes.

Only Linux bounds the memory of a process. Where the system cannot, there is no bound.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

if sys.platform != "win32":
    import resource

NO_MEMORY = re.compile(
    "can't allocate memory|not enough memory|can't start new thread|bad_alloc|bad allocation|failed to allocate memory",
    re.IGNORECASE,
)
UNBOUNDED_LIMIT = "of the process"
_ends: dict[object, int] = {}  # what bounds the memory now, UNBOUNDED_LIMIT among it -> bytes of data
_lock = threading.Lock()


def bound_child(memory: int) -> None:
    """Bound the memory that this process takes from now on, and forbid it to write files, for good."""
    if sys.platform == "win32":
        return
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    with contextlib.suppress(OSError, ValueError):
        most = min(_data_bytes() + memory, sys.maxsize)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def signal_name(number: int) -> str:
    """The name of a signal, or its number where it has no name, as most of those of real time."""
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def bound_processor_time(seconds: float) -> None:
    """End this process where it computes longer than this from now on, also where its parent is gone."""
    if sys.platform == "win32":
        return
    with contextlib.suppress(OSError, ValueError, OverflowError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        most = math.ceil(time.process_time() + seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (most, resource.getrlimit(resource.RLIMIT_CPU)[1]))


@contextlib.contextmanager
def bounded_memory(memory: int) -> Iterator[None]:
    """Bound the memory that this process takes meanwhile. What it allocates beyond that fails as without memory.

    Other threads meet the bound too, so that only the main thread sets one.
    """
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        yield
        return
    key = object()
    with _lock:
        _ends.setdefault(UNBOUNDED_LIMIT, resource.getrlimit(resource.RLIMIT_DATA)[0])
        _ends[key] = min(_data_bytes() + memory, sys.maxsize)  # the system has no larger limit
        _set_least()
    try:
        yield
    finally:
        with _lock:
            del _ends[key]
            _set_least()
            if not _ends.keys() - {UNBOUNDED_LIMIT}:
                _ends.clear()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is that of Python, NumPy, PyTorch or onnxruntime where they get no memory."""
    return isinstance(error, MemoryError) or bool(NO_MEMORY.search(str(error)))


def _set_least() -> None:
    least = min(_ends.values(), key=lambda end: math.inf if end == resource.RLIM_INFINITY else end)
    resource.setrlimit(resource.RLIMIT_DATA, (least, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _data_bytes() -> int:
    """The bytes of writable memory of this process, as RLIMIT_DATA counts them, and of its stack."""
    return int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")
