"""Several copies of one source in one pass: each byte is read and hashed once, however the blocks are cut."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_export.errors import InputRefused
from lora_export.storage import block_copy
from lora_export.storage.block_copy import Block, Bytes, Copy, RunningHashes

SIZE = 500
DATA = np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8).tobytes()
CUTS = st.lists(st.sets(st.integers(1, SIZE - 1), max_size=12), min_size=2, max_size=5)


def inverted(before: Bytes, after: Bytes, _: Bytes) -> None:
    after[:] = 255 - before


def cut(edges: set[int], work: Any) -> Iterator[Block]:
    """The whole of DATA in blocks; the last block again at the end, as an untied tensor."""
    ends = [0, *sorted(edges), SIZE]
    for start, stop in itertools.pairwise(ends):
        yield Block(start, stop, start, stop, work=work)
    yield Block(ends[-2], SIZE, SIZE, 2 * SIZE - ends[-2], work=work, repeated=True)


def made(folder: Path, cuts: list[set[int]], works: list[Any]) -> tuple[list[bytes | Exception], list[RunningHashes]]:
    """The targets of DATA that is cut so, or the errors that ended them; and their hashes."""
    (folder / "source").write_bytes(DATA)
    hashes = [RunningHashes("sha256") for _ in cuts]
    for one in hashes[1:]:
        one.source = hashes[0].source
    files = [(folder / str(number)).open("wb") for number in range(len(cuts))]
    found: list[bytes | Exception] = [b""] * len(cuts)
    try:
        copies = [
            Copy(file.fileno(), cut(edges, work), own)
            for file, edges, work, own in zip(files, cuts, works, hashes, strict=True)
        ]
        for copy, _, _, error in block_copy.transfer_together(folder / "source", copies, buffer_bytes=SIZE, threads=2):
            found[copies.index(copy)] = b"" if error is None else error
    finally:
        for file in files:
            file.close()
    return [(folder / str(number)).read_bytes() if one == b"" else one for number, one in enumerate(found)], hashes


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[range]:
    """What was read of the source."""
    found: list[range] = []
    read = block_copy.read

    def counted(source: Path, fd: int, buffer: Bytes, position: int) -> None:
        found.append(range(position, position + len(buffer)))
        read(source, fd, buffer, position)

    monkeypatch.setattr(block_copy, "read", counted)
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=CUTS)
def test_each_byte_is_read_and_hashed_once(cuts: list[set[int]], tmp_path: Path, reads: list[range]) -> None:
    reads.clear()
    works = [None if number % 2 else inverted for number in range(len(cuts))]
    targets, hashes = made(tmp_path, cuts, works)
    for edges, work, target, own in zip(cuts, works, targets, hashes, strict=True):
        whole = DATA + DATA[max(edges, default=0) :]
        expected = bytes(255 - byte for byte in whole) if work else whole
        assert target == expected and own.target.hexdigest() == hashlib.sha256(expected).hexdigest()
        assert own.source.hexdigest() == hashlib.sha256(DATA).hexdigest()
    repeated = sum(SIZE - max(edges, default=0) for edges in cuts)
    assert sum(map(len, reads)) == SIZE + repeated


def test_memory_is_that_of_a_few_blocks(tmp_path: Path) -> None:
    """Copies whose blocks overlap take little more than one copy takes."""
    (tmp_path / "source").write_bytes(DATA)
    allocated: list[int] = []

    def memory(count: int) -> Bytes:
        allocated.append(count)
        return np.empty(count, np.uint8)

    def taken(*firsts: int) -> int:
        allocated.clear()
        copies = []
        for number, first in enumerate(firsts):
            edges = [0, *range(first, SIZE, 10), SIZE]
            blocks = (Block(*pair, *pair, work=inverted) for pair in itertools.pairwise(edges))
            file = to_close.enter_context((tmp_path / str(number)).open("wb"))
            copies.append(Copy(file.fileno(), blocks, hashes))
        list(block_copy.transfer_together(tmp_path / "source", copies, buffer_bytes=10, threads=2, memory=memory))
        return sum(allocated)

    hashes = RunningHashes("sha256")
    with contextlib.ExitStack() as to_close:
        assert taken(2, 5, 7, 9) <= 2 * taken(2)


def test_an_error_ends_one_copy_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(before: Bytes, after: Bytes, _: Bytes) -> None:
        raise InputRefused("not finite")

    targets, hashes = made(tmp_path, [{100, 200}, {150}, set()], [inverted, fail, inverted])
    assert isinstance(targets[1], InputRefused)
    assert targets[0][:SIZE] == targets[2][:SIZE] == bytes(255 - byte for byte in DATA)  # type: ignore[index]
    assert hashes[0].source.hexdigest() == hashlib.sha256(DATA).hexdigest()


def test_a_full_disk_ends_one_copy_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite

    def write(fd: int, data: memoryview, position: int) -> int:
        if os.fstat(fd).st_ino == (tmp_path / "1").stat().st_ino:
            raise OSError(errno.ENOSPC, "disk full")
        return pwrite(fd, data, position)

    monkeypatch.setattr(os, "pwrite", write)
    targets, _ = made(tmp_path, [{100}, {100}, {30}], [inverted, None, inverted])
    assert isinstance(targets[1], OSError)
    assert targets[0][:SIZE] == targets[2][:SIZE] == bytes(255 - byte for byte in DATA)  # type: ignore[index]


def test_a_source_that_ends_too_early_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the next read would succeed: the hash of the source would lack these bytes."""
    read, failing = block_copy.read, [True]

    def once(source: Path, fd: int, buffer: Bytes, position: int) -> None:
        if failing and position >= 100:
            failing.clear()
            raise InputRefused("became shorter")
        read(source, fd, buffer, position)

    monkeypatch.setattr(block_copy, "read", once)
    targets, _ = made(tmp_path, [{100}, {100}, {100}], [inverted, None, inverted])
    assert [str(one) for one in targets] == ["became shorter"] * 3
