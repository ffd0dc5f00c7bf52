"""Functions of the C library: where they exist, where not, and what they report."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from lora_export.storage.system_calls import c_function, deferred_signals, read_at, write_at


def test_a_function_is_found_and_stores_its_error():
    getpid, close = c_function("getpid"), c_function("close")
    assert getpid is not None and getpid() == os.getpid()
    ctypes.set_errno(0)
    assert close is not None and close(-1) == -1
    assert ctypes.get_errno() == errno.EBADF


def test_a_function_that_does_not_exist_is_none():
    assert c_function("no_such_function_of_any_system") is None


@pytest.mark.parametrize("error", [TypeError("argument 1 must be str, not None"), OSError("no library")])
def test_a_system_without_a_default_library_has_no_function(monkeypatch, error):
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert c_function("getpid") is None


# --- Reading and writing at a position of an open file, from several threads at once ---


DATA = np.random.default_rng(0).integers(0, 256, 1 << 20, dtype=np.uint8).tobytes()
PIECES = [range(start, start + 4096) for start in range(0, len(DATA), 4096)]


@pytest.fixture(params=["system calls", "portable"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "portable":
        for name in ("preadv", "pwrite"):
            monkeypatch.delattr(os, name, raising=False)
        lseek = os.lseek

        def slow(*arguments: int) -> int:
            position = lseek(*arguments)
            time.sleep(0.0002)  # other threads run meanwhile
            return position

        monkeypatch.setattr(os, "lseek", slow)
    elif not hasattr(os, "preadv"):
        pytest.skip("this system has no preadv")


@pytest.mark.usefixtures("system")
def test_threads_read_their_own_positions(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DATA)

    def read(piece: range) -> bytes:
        buffer = bytearray(len(piece))
        assert read_at(file.fileno(), memoryview(buffer), piece.start) == len(piece)
        return bytes(buffer)

    with (tmp_path / "file").open("rb") as file, ThreadPoolExecutor(8) as pool:
        assert b"".join(pool.map(read, PIECES)) == DATA


@pytest.mark.usefixtures("system")
def test_threads_write_their_own_positions(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file, ThreadPoolExecutor(8) as pool:

        def write(piece: range) -> int:
            return write_at(file.fileno(), memoryview(DATA)[piece.start : piece.stop], piece.start)

        assert set(pool.map(write, reversed(PIECES))) == {4096}
    assert (tmp_path / "file").read_bytes() == DATA


@pytest.mark.usefixtures("system")
def test_the_file_keeps_its_own_position(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b", buffering=0) as file:
        file.write(b"abc")
        read_at(file.fileno(), memoryview(bytearray(2)), 0)
        write_at(file.fileno(), memoryview(b"xyz"), 6)
        file.write(b"def")
    assert (tmp_path / "file").read_bytes() == b"abcdefxyz"


@pytest.mark.usefixtures("system")
def test_at_the_end_of_the_file_nothing_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    with (tmp_path / "file").open("rb") as file:
        buffer = bytearray(5)
        assert read_at(file.fileno(), memoryview(buffer), 1) == 2 and buffer == b"bc\0\0\0"
        assert read_at(file.fileno(), memoryview(buffer), 3) == 0


@pytest.mark.usefixtures("system")
def test_a_failed_write_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    with (tmp_path / "file").open("rb") as file, pytest.raises(OSError, match="Bad file descriptor"):
        write_at(file.fileno(), memoryview(b"x"), 0)


# --- Short steps that Ctrl-C and SIGTERM do not interrupt ---


def test_ctrl_c_waits_for_the_end_of_the_block():
    steps = []
    with pytest.raises(KeyboardInterrupt), deferred_signals():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # one exception for both
        steps.append("done")
    assert steps == ["done"]


def test_an_exception_in_the_block_restores_the_handlers():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), deferred_signals():
        raise ZeroDivisionError
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_another_thread_may_use_it():
    ran = []

    def work() -> None:
        with deferred_signals():
            ran.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ran == [signal.getsignal(signal.SIGINT)]
