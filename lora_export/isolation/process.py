"""A process of its own for a file of a stranger: it answers messages, within memory and time, and is ended otherwise.

It is a fresh interpreter (`start`), or a copy of this process that has loaded all that is needed (`copy_of`, on Linux).
Calls of this process end after a time too, or at Ctrl-C.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar, cast

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lora_export.isolation.bounds import bound_child, bound_processor_time, signal_name
from lora_export.isolation.limits import MAX_ANSWER

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

    timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), expire)
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
            return future.result(min(seconds, threading.TIMEOUT_MAX))
        finally:
            if not future.done():
                stop()


Arrays = dict[str, NDArray[Any]]
Streams = tuple[io.BufferedIOBase, io.BufferedIOBase]  # requests, answers
# This package's folder comes last in the child's search path: before the standard library, it could hide parts of that.
START = "import sys; sys.path.append(sys.argv.pop(1)); from {} import main; main()"
TOO_LONG = {-signal.SIGXCPU} if sys.platform != "win32" else set()  # exit codes of what has no processor time left


class ProcessEnded(Exception):
    """The process ended instead of answering: `too_slow`, or `killed` by a signal. The text is the reason."""

    def __init__(self, reason: str, *, too_slow: bool = False, killed: bool = False):
        super().__init__(reason)
        self.too_slow, self.killed = too_slow, killed


class IsolatedProcess:
    """A process that answers messages. It ends with this object, or where it takes more than its memory and time."""

    def __init__(self, process: _Child, streams: Streams, memory: int | None):
        self.memory = memory  # bytes that it may take beyond what it starts with; None: any number
        self._process, self._streams, self._lock = process, streams, threading.Lock()
        self._end = weakref.finalize(self, _end, process, streams)

    @classmethod
    def start(cls, module: str, *arguments: object, memory: int | None) -> IsolatedProcess:
        """Start `main` of a module in a fresh interpreter, which serves `private_streams()`."""
        root = str(Path(__file__).resolve().parents[2])  # the folder of the package
        command = [sys.executable, "-P", "-c", START.format(module), root, *map(str, arguments)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        streams = cast(io.BufferedIOBase, process.stdin), cast(io.BufferedIOBase, process.stdout)
        return cls(process, streams, memory)

    @classmethod
    def copy_of(cls, serve: Callable[[io.BufferedIOBase, io.BufferedIOBase], None], *, memory: int) -> IsolatedProcess:
        """Copy this process, to let `serve(requests, answers)` answer in the copy. It takes some milliseconds.

        The copy has no other thread, so that `serve` must not need one.
        """
        requests, answers = os.pipe(), os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of threads: `serve` needs none
            number = os.fork()
        if not number:
            _serve_in_copy(requests[0], answers[1], serve, memory)
        os.close(requests[0])
        os.close(answers[1])
        return cls(_Copy(number), (os.fdopen(requests[1], "wb"), os.fdopen(answers[0], "rb")), memory)

    def ask(
        self, request: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], seconds: float
    ) -> tuple[dict[str, Any], Arrays]:
        """Send a request, and return its answer: a header and arrays. Raises as `answer`."""
        with self._lock:
            with contextlib.suppress(BrokenPipeError):  # `answer` then finds how the process ended
                write_message(self._streams[0], {**request, "seconds": seconds}, arrays)
            return self.answer(seconds)

    def answer(self, seconds: float) -> tuple[dict[str, Any], Arrays]:
        """The next message. Raises ProcessEnded where the process ends or takes longer, and sent no message."""
        with deadline(seconds, self._process.kill) as expired:
            try:
                return read_message(self._streams[1], most=sys.maxsize if self.memory is None else self.memory)
            except EOFError:
                code = self._process.wait()
            except (ValueError, KeyError, TypeError) as error:
                self.close()
                raise ProcessEnded(f"it sent no outputs: {error}") from error
        too_slow = expired.is_set() or code in TOO_LONG
        raise ProcessEnded(_reason(code, self.memory), too_slow=too_slow, killed=code < 0)

    @property
    def is_running(self) -> bool:
        return self._end.alive and self._process.poll() is None

    def kill(self) -> None:
        """End the process at once. The next answer raises ProcessEnded."""
        self._process.kill()

    def close(self) -> None:
        """End the process, and give back what it holds."""
        self._end()


def private_streams() -> Streams:
    """stdin and stdout of this process for messages alone: descriptors 0, 1 and 2 lead to nowhere from now on."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    sys.stdin = io.TextIOWrapper(io.BytesIO())
    return requests, answers


def read_request(requests: io.BufferedIOBase, threads: int = 1) -> tuple[dict[str, Any], Arrays]:
    """The next request in a child, which may compute as long as its parent waits. Raises EOFError after the last."""
    request, arrays = read_message(requests, most=sys.maxsize)
    bound_processor_time(request.pop("seconds") * threads)
    return request, arrays


# --- Copies ---


class _Child(Protocol):
    def kill(self) -> None: ...
    def poll(self) -> int | None: ...
    def wait(self) -> int: ...


class _Copy:
    """A copy of this process, with the methods of `Popen`."""

    def __init__(self, number: int):
        self.number = number
        self._code: int | None = None

    def kill(self) -> None:
        if self._code is None:
            os.kill(self.number, signal.SIGKILL)

    def poll(self) -> int | None:
        return self._waited(os.WNOHANG)

    def wait(self) -> int:
        code = self._waited(0)
        assert code is not None
        return code

    def _waited(self, options: int) -> int | None:
        if self._code is None:
            number, status = os.waitpid(self.number, options)
            self._code = os.waitstatus_to_exitcode(status) if number else None
        return self._code


def _serve_in_copy(
    requests: int, answers: int, serve: Callable[[io.BufferedIOBase, io.BufferedIOBase], None], memory: int
) -> NoReturn:
    """Serve as a copy, and end it: nothing of what it has from its parent is closed, flushed or removed by it."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        gc.disable()  # a collection would remove the temporary files of the parent's garbage
        os.dup2(requests, 0)
        os.dup2(answers, 1)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # locks and pipes of the parent end with it
        streams = private_streams()
        # Those of the parent may be other files.
        sys.stdout = sys.stderr = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
        bound_child(memory)
        serve(*streams)
    finally:
        os._exit(0)


def _end(process: _Child, streams: Sequence[io.BufferedIOBase]) -> None:
    process.kill()
    for stream in streams:
        with contextlib.suppress(OSError):  # what is left in a buffer cannot be sent any more
            stream.close()
    process.wait()


def _reason(code: int, memory: int | None) -> str:
    if code < 0:
        allowed = "" if memory is None else f". It may take {memory / 2**30:.3g} GiB of memory"
        return f"{signal_name(-code)}{allowed}"
    return f"exit code {code}"


# --- Messages between a process and its child: a JSON header and arrays, in plain bytes. Nothing is pickled ---


MESSAGE_DTYPES = {
    name: np.dtype(getattr(ml_dtypes, name, name))
    for name in (
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("float16", "float32", "float64", "bfloat16", "complex64", "complex128"),
    )
}


def write_message(stream: io.BufferedIOBase, header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write a header and arrays, of the dtypes above. Raises TypeError for another dtype."""
    for name, array in arrays.items():
        if array.dtype.name not in MESSAGE_DTYPES:
            raise TypeError(f"{name} is {array.dtype}")
    described = [[name, array.dtype.name, list(array.shape)] for name, array in arrays.items()]
    content = json.dumps({**header, "arrays": described}).encode()
    stream.write(len(content).to_bytes(8, "little") + content)
    for array in arrays.values():
        stream.write(np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(-1).view(np.uint8).data)
    stream.flush()


def read_message(stream: io.BufferedIOBase, *, most: int) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Read a header and arrays. The sender is not trusted.

    Raises EOFError where the sender has ended, and ValueError for another message, or one with more than `most` bytes
    of arrays.
    """
    size = int.from_bytes(_exactly(stream, 8), "little")
    if size > MAX_ANSWER:
        raise ValueError(f"a header of {size:,} bytes")
    content = _exactly(stream, size)
    try:
        header = json.loads(content)
    except RecursionError as error:
        raise ValueError("a header of too many lists in each other") from error
    described = header.pop("arrays")
    sizes = [math.prod(shape) * MESSAGE_DTYPES[dtype].itemsize for _, dtype, shape in described]
    if sum(sizes) > most or any(length < 0 for _, _, shape in described for length in shape):
        raise ValueError(f"arrays of {sum(sizes):,} bytes")
    arrays = {}
    for (name, dtype, shape), nbytes in zip(described, sizes, strict=True):
        arrays[str(name)] = np.frombuffer(_exactly(stream, nbytes), MESSAGE_DTYPES[dtype]).reshape(shape)
    return header, arrays


def _exactly(stream: io.BufferedIOBase, size: int) -> bytearray:
    content = bytearray(size)
    view, done = memoryview(content), 0
    while done < size:
        count = stream.readinto(view[done:])
        if not count:
            raise EOFError("the other process has ended")
        done += count
    return content
