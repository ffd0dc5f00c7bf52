"""From file to file in blocks: every byte, in order, by several threads; and what happens when one fails."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_export.errors import InputRefused
from lora_export.storage import block_copy
from lora_export.storage.block_copy import Block, Bytes, Hashes
from lora_export.storage.hashes import ALGORITHMS

DATA = np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8).tobytes()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(DATA)
    return path


def carry(
    source: Path, blocks: Iterable[Block], *, hashes: Hashes | None = None, **options: Any
) -> tuple[bytes, list[Any]]:
    """What arrived, and what the blocks' works found."""
    target = source.with_name("target")
    with target.open("wb") as file:
        passed = block_copy.transfer(source, file.fileno(), blocks, hashes or Hashes("sha256"), **options)
        found = [result for _, result in passed]
    return target.read_bytes(), found


def pieces(size: int, work: Callable[[int], block_copy.Work] | None = None) -> Iterator[Block]:
    """The whole of DATA in blocks, shifted by 3 in the target."""
    for start in range(0, len(DATA), size):
        stop = min(start + size, len(DATA))
        yield Block(start, stop, start + 3, stop + 3, work=work(start) if work else None)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("name", ["sha256", "xxh3_128"])
def test_blocks_arrive_whole_and_are_hashed_in_order(source, threads, name):
    hashes = Hashes(name)
    hashes.target.update(b"abc")
    arrived, found = carry(source, pieces(64), hashes=hashes, threads=threads, room=64)
    assert arrived[3:] == DATA and found == [None] * 16
    assert hashes.source.hexdigest() == ALGORITHMS[name](DATA).hexdigest()
    assert hashes.target.hexdigest() == ALGORITHMS[name](b"abc" + DATA).hexdigest()


def test_work_makes_the_targets_bytes_and_its_finds_come_in_order(source):
    def work(start: int) -> block_copy.Work:
        def double(before: Bytes, after: Bytes, spare: Bytes) -> int:
            time.sleep(0.01 if start % 200 else 0)  # the later ones are done first
            assert len(spare) == 400  # room for two arrays, each as large as the block's largest form
            after[:] = before.repeat(2)
            return start

        return double

    blocks = [Block(at, at + 100, 2 * at, 2 * at + 200, work=work(at)) for at in range(0, 1000, 100)]
    hashes = Hashes("sha256")
    arrived, found = carry(source, blocks, threads=3, room=200, hashes=hashes)
    assert arrived == np.frombuffer(DATA, np.uint8).repeat(2).tobytes()
    assert found == list(range(0, 1000, 100))
    assert hashes.target.hexdigest() == hashlib.sha256(arrived).hexdigest()


def test_blocks_are_worked_on_at_the_same_time(source):
    meeting = threading.Barrier(2, timeout=20)
    spares: list[int] = []

    def meet(before: Bytes, after: Bytes, spare: Bytes) -> None:
        meeting.wait()  # alone, a thread would wait for ever
        spares.append(spare.ctypes.data)
        after[:] = before

    blocks = [Block(at, at + 250, at, at + 250, work=meet) for at in range(0, 1000, 250)]
    assert carry(source, blocks, threads=2)[0] == DATA
    assert len(spares) == 4 and len(set(spares)) == 2  # nobody shares one, and no block has one of its own


def test_no_more_blocks_are_held_than_threads_and_those_ahead(source):
    taken = 0

    def counted() -> Iterator[Block]:
        nonlocal taken
        for block in pieces(10):
            taken += 1
            yield block

    with source.with_name("target").open("wb") as file:
        for done, _ in enumerate(block_copy.transfer(source, file.fileno(), counted(), Hashes("sha256"), threads=2)):
            assert taken - done <= 2 + block_copy.AHEAD + 1


@pytest.mark.parametrize("threads", [1, 3])
def test_a_work_that_fails_ends_the_transfer_and_its_threads(source, threads):
    def work(start: int) -> block_copy.Work:
        def fail(before: Bytes, after: Bytes, _: Bytes) -> None:
            if start == 100:
                raise InputRefused("block 100")
            after[:] = before

        return fail

    alive = threading.active_count()
    with pytest.raises(InputRefused, match="block 100"):
        carry(source, pieces(50, work), threads=threads)
    assert threading.active_count() == alive


def test_nobody_works_on_when_nobody_listens(source):
    alive = threading.active_count()
    with source.with_name("target").open("wb") as file:
        passed = block_copy.transfer(source, file.fileno(), pieces(10), Hashes("sha256"), threads=2)
        next(passed)
        passed.close()
    assert threading.active_count() == alive
    assert source.with_name("target").stat().st_size < 200


def test_a_source_that_ends_too_early_is_refused(source):
    with pytest.raises(InputRefused, match=f"{source} became shorter while it was being read"):
        carry(source, [Block(0, 1001, 0, 1001)])


@pytest.mark.parametrize("most", [1, 7])
def test_reads_and_writes_that_take_a_part_are_continued(source, monkeypatch, most):
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, into, place: preadv(fd, [into[0][:most]], place))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, place: pwrite(fd, data[:most], place))
    assert carry(source, pieces(100))[0][3:] == DATA


def test_a_disk_that_fails_is_a_failure(source, monkeypatch):
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="disk full"):
        carry(source, pieces(100))


def test_the_kernel_is_told_to_write_what_has_arrived(source, monkeypatch):
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(block_copy, "_start_writing", lambda _, start, count: told.append((start, count)))
    monkeypatch.setattr(block_copy, "START_WRITING", 250)
    carry(source, [Block(at, at + 100, at, at + 100) for at in range(0, 1000, 100)], threads=1)
    *parts, (start, to_the_end) = told
    assert [count for _, count in parts] == [300] * len(parts) and len(parts) >= 2
    assert [start for start, _ in told] == [300 * number for number in range(len(told))]
    assert (start, to_the_end) == (300 * len(parts), 0)


# --- Shared blocks of the disk ---

UNIT = 512


class FileSystem:
    """A file system that can share blocks: the request is checked as the kernel would, and carried out by a copy."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: int = 0):
        self.requests: list[tuple[int, int, int]] = []
        self.error = error
        monkeypatch.setattr(fcntl, "ioctl", self.ioctl)
        monkeypatch.setattr(os, "fstatvfs", lambda _: type("", (), {"f_bsize": UNIT}))

    def ioctl(self, fd: int, request: int, argument: bytes) -> int:
        assert request == 0x4020940D
        source, start, count, place = struct.unpack("=qQQQ", argument)
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        assert count and start % UNIT == count % UNIT == place % UNIT == 0
        self.requests.append((start, place, count))
        os.pwrite(fd, os.pread(source, count, start), place)
        return 0


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[int, int]]:
    (tmp_path / "source").write_bytes(DATA * 3)
    with (tmp_path / "source").open("rb") as source, (tmp_path / "target").open("wb") as target:
        yield source.fileno(), target.fileno()


@pytest.mark.parametrize(
    ("start", "place", "count", "shared"),
    [
        (0, 0, 3000, range(2560)),
        (100, 100, 2000, range(512, 2048)),
        (100, 612, 2000, range(512, 2048)),  # a whole block further on
        (1024, 512, 512, range(1024, 1536)),
        (100, 101, 2000, range(0)),  # lies otherwise in its blocks
        (513, 1, 900, range(0)),  # holds no whole block
    ],
)
def test_whole_blocks_are_shared(monkeypatch, pair, start, place, count, shared):
    system = FileSystem(monkeypatch)
    assert block_copy.share(*pair, start, place, count) == shared
    expected = [(shared.start, shared.start + place - start, len(shared))] if shared else []
    assert system.requests == expected


@pytest.mark.parametrize(
    "error", [errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM]
)
def test_a_file_system_that_cannot_share_is_copied_to(monkeypatch, pair, error):
    FileSystem(monkeypatch, error)
    assert block_copy.share(*pair, 0, 0, 3000) == range(0)


def test_a_disk_that_is_full_while_blocks_are_shared_is_a_failure(monkeypatch, pair):
    FileSystem(monkeypatch, errno.ENOSPC)
    with pytest.raises(OSError, match="No space"):
        block_copy.share(*pair, 0, 0, 3000)


def test_what_is_shared_is_hashed_and_not_written(source, monkeypatch):
    written: list[int] = []
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, place: (written.append(place), pwrite(fd, data, place))[1])
    hashes = Hashes("sha256")
    carry(source, [Block(0, 100, 0, 100), Block(100, 1000, 100, 1000, shared=True)], hashes=hashes)
    assert written == [0]
    assert hashes.source.hexdigest() == hashes.target.hexdigest() == hashlib.sha256(DATA).hexdigest()


@pytest.fixture(params=["xfs", "btrfs"])
def sharing_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A real file system that shares blocks, in a file of 400 MB that is mostly holes."""
    maker = shutil.which(f"mkfs.{request.param}")
    if maker is None or os.geteuid() != 0:
        pytest.skip(f"needs root and mkfs.{request.param}: a {request.param} is mounted")
    (tmp_path / "disk").touch()
    os.truncate(tmp_path / "disk", 400 << 20)
    subprocess.run([maker, "-q", tmp_path / "disk"], check=True, capture_output=True)
    (tmp_path / "place").mkdir()
    command = ["mount", "-o", "loop", tmp_path / "disk", tmp_path / "place"]
    mounted = subprocess.run(command, check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip(f"this machine mounts no {request.param}: {mounted.stderr.decode().strip()}")
    yield tmp_path / "place"
    subprocess.run(["umount", tmp_path / "place"], check=True)


def test_a_merge_on_a_disk_that_shares_takes_room_for_what_changes_alone(sharing_disk, tmp_path):
    from safetensors.numpy import load_file

    from lora_export import formats, plan
    from lora_export.weights.checkpoint import open_checkpoint
    from lora_export.weights.merge import merge_checkpoint
    from support.handmade import base_file, peft_adapter

    def used() -> int:
        os.sync()
        place = os.statvfs(sharing_disk)
        return (place.f_blocks - place.f_bfree) * place.f_frsize

    rng = np.random.default_rng(0)
    tensors = {"fc.weight": np.ones((4, 8)), "kept": rng.random((4096, 4096))}  # 64 MiB
    base = base_file(sharing_disk / "base.safetensors", tensors)
    before = used()
    adapter = formats.load(peft_adapter(tmp_path / "adapter", {"fc": (np.ones((1, 8)), np.ones((4, 1)))}))
    checkpoint = open_checkpoint(base)
    (sharing_disk / "out").mkdir()
    merge_checkpoint(plan.make([adapter], checkpoint.specs), checkpoint, sharing_disk / "out")
    assert used() - before < 8 << 20
    merged = load_file(sharing_disk / "out/model.safetensors")
    assert merged["fc.weight"].tolist() == [[2] * 8] * 4
    assert merged["kept"].tobytes() == tensors["kept"].astype(np.float32).tobytes()
