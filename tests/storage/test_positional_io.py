"""Reading and writing at a position works from several threads, with the system's calls and without them."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from lora_export.storage.positional_io import read_at, write_at

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
