"""Files are copied in blocks by several threads: every byte, in order, also when one fails."""

from __future__ import annotations

import ctypes
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
from lora_export.storage.block_copy import Block, Bytes, RunningHashes
from lora_export.storage.hashes import ALGORITHMS
from lora_export.storage.system_calls import c_function

DATA = np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8).tobytes()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(DATA)
    return path


def carry(
    source: Path, blocks: Iterable[Block], *, hashes: RunningHashes | None = None, **options: Any
) -> tuple[bytes, list[Any]]:
    """The bytes of the target, and what the blocks' work returned."""
    target = source.with_name("target")
    with target.open("wb") as file:
        passed = block_copy.transfer(source, file.fileno(), blocks, hashes or RunningHashes("sha256"), **options)
        found = [result for _, result in passed]
    return target.read_bytes(), found


def pieces(size: int, work: Callable[[int], block_copy.Work] | None = None) -> Iterator[Block]:
    """The whole of DATA in blocks, shifted by 3 in the target."""
    for start in range(0, len(DATA), size):
        stop = min(start + size, len(DATA))
        yield Block(start, stop, start + 3, stop + 3, work=work(start) if work else None)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("name", ["sha256", "xxh3_128"])
def test_blocks_are_copied_whole_and_hashed_in_order(source, threads, name):
    hashes = RunningHashes(name)
    hashes.target.update(b"abc")
    arrived, found = carry(source, pieces(64), hashes=hashes, threads=threads, buffer_bytes=64)
    assert arrived[3:] == DATA and found == [None] * 16
    assert hashes.source.hexdigest() == ALGORITHMS[name](DATA).hexdigest()
    assert hashes.target.hexdigest() == ALGORITHMS[name](b"abc" + DATA).hexdigest()


def test_results_of_work_come_in_order(source):
    def work(start: int) -> block_copy.Work:
        def double(before: Bytes, after: Bytes, scratch: Bytes) -> int:
            time.sleep(0.01 if start % 200 else 0)  # the later ones are done first
            assert len(scratch) == 400  # two arrays, each as large as the buffer
            after[:] = before.repeat(2)
            return start

        return double

    blocks = [Block(at, at + 100, 2 * at, 2 * at + 200, work=work(at)) for at in range(0, 1000, 100)]
    hashes = RunningHashes("sha256")
    arrived, found = carry(source, blocks, threads=3, buffer_bytes=200, hashes=hashes)
    assert arrived == np.frombuffer(DATA, np.uint8).repeat(2).tobytes()
    assert found == list(range(0, 1000, 100))
    assert hashes.target.hexdigest() == hashlib.sha256(arrived).hexdigest()


def test_several_threads_work_at_the_same_time(source):
    meeting = threading.Barrier(2, timeout=20)
    scratches: list[int] = []

    def meet(before: Bytes, after: Bytes, scratch: Bytes) -> None:
        meeting.wait()  # alone, a thread would wait for ever
        scratches.append(scratch.ctypes.data)
        after[:] = before

    blocks = [Block(at, at + 250, at, at + 250, work=meet) for at in range(0, 1000, 250)]
    assert carry(source, blocks, threads=2)[0] == DATA
    assert len(scratches) == 4 and len(set(scratches)) == 2  # one for each thread, not for each block


def test_the_number_of_blocks_in_memory_is_bounded(source):
    taken = 0

    def counted() -> Iterator[Block]:
        nonlocal taken
        for block in pieces(10):
            taken += 1
            yield block

    with source.with_name("target").open("wb") as file:
        for done, _ in enumerate(
            block_copy.transfer(source, file.fileno(), counted(), RunningHashes("sha256"), threads=2)
        ):
            assert taken - done <= 2 + block_copy.AHEAD + 1


@pytest.mark.parametrize("threads", [1, 3])
def test_a_failed_work_ends_the_transfer_and_its_threads(source, threads):
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


def test_threads_end_when_the_caller_stops_early(source):
    alive = threading.active_count()
    with source.with_name("target").open("wb") as file:
        passed = block_copy.transfer(source, file.fileno(), pieces(10), RunningHashes("sha256"), threads=2)
        next(passed)
        passed.close()
    assert threading.active_count() == alive
    assert source.with_name("target").stat().st_size < 200


def test_a_source_that_ends_too_early_is_refused(source):
    with pytest.raises(InputRefused, match=f"{source} became shorter while it was being read"):
        carry(source, [Block(0, 1001, 0, 1001)])


@pytest.mark.parametrize("most", [1, 7])
def test_partial_reads_and_writes_are_continued(source, monkeypatch, most):
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, into, position: preadv(fd, [into[0][:most]], position))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, position: pwrite(fd, data[:most], position))
    assert carry(source, pieces(100))[0][3:] == DATA


def test_a_failed_write_is_an_error(source, monkeypatch):
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="disk full"):
        carry(source, pieces(100))


def test_the_kernel_is_asked_early_to_write(source, monkeypatch):
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(block_copy, "_start_writing", lambda _, start, count: calls.append((start, count)))
    monkeypatch.setattr(block_copy, "START_WRITING", 250)
    carry(source, [Block(at, at + 100, at, at + 100) for at in range(0, 1000, 100)], threads=1)
    *parts, (start, to_the_end) = calls
    assert [count for _, count in parts] == [300] * len(parts) and len(parts) >= 2
    assert [start for start, _ in calls] == [300 * number for number in range(len(calls))]
    assert (start, to_the_end) == (300 * len(parts), 0)


def as_file_system(monkeypatch: pytest.MonkeyPatch, kind: int) -> None:
    """Every file is on a file system of this kind, by its number in <linux/magic.h>."""

    def fstatfs(_: int, status: ctypes.Array[ctypes.c_char]) -> int:
        ctypes.c_long.from_buffer(status).value = kind
        return 0

    monkeypatch.setattr(block_copy, "c_function", lambda name: fstatfs if name == "fstatfs" else c_function(name))


@pytest.mark.skipif(c_function("fallocate") is None, reason="only Linux reserves space")
@pytest.mark.parametrize(
    ("kind", "size"), [(0xEF53, 200_000), (0x9123683E, 0), (0x4D44, 0)], ids=["ext4", "Btrfs", "FAT"]
)
def test_space_is_reserved_on_ext4_alone(tmp_path, monkeypatch, kind, size):
    as_file_system(monkeypatch, kind)
    with (tmp_path / "target").open("wb") as file:
        block_copy.write(file.fileno(), memoryview(DATA), 0)
        block_copy.reserve(file.fileno(), 200_000)
        assert os.fstat(file.fileno()).st_blocks * 512 >= size
    found = (tmp_path / "target").read_bytes()
    assert found == DATA + bytes(max(0, size - len(DATA)))


@pytest.mark.parametrize("count", [0, 1 << 62])
def test_what_cannot_be_reserved_is_left_to_the_writes(source, count, monkeypatch):
    as_file_system(monkeypatch, 0xEF53)
    with source.with_name("target").open("wb") as file:
        block_copy.reserve(file.fileno(), count)
        assert os.fstat(file.fileno()).st_size == 0
    monkeypatch.undo()
    block_copy.reserve(-1000, count)  # a file in a store
    assert carry(source, pieces(100))[0][3:] == DATA


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
        source, start, count, target_start = struct.unpack("=qQQQ", argument)
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        assert count and start % UNIT == count % UNIT == target_start % UNIT == 0
        self.requests.append((start, target_start, count))
        os.pwrite(fd, os.pread(source, count, start), target_start)
        return 0


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[int, int]]:
    (tmp_path / "source").write_bytes(DATA * 3)
    with (tmp_path / "source").open("rb") as source, (tmp_path / "target").open("wb") as target:
        yield source.fileno(), target.fileno()


@pytest.mark.parametrize(
    ("start", "target_start", "count", "shared"),
    [
        (0, 0, 3000, range(2560)),
        (100, 100, 2000, range(512, 2048)),
        (100, 612, 2000, range(512, 2048)),  # a whole block further on
        (1024, 512, 512, range(1024, 1536)),
        (100, 101, 2000, range(0)),  # at another offset in its blocks
        (513, 1, 900, range(0)),  # contains no whole block
    ],
)
def test_whole_blocks_are_shared(monkeypatch, pair, start, target_start, count, shared):
    system = FileSystem(monkeypatch)
    assert block_copy.share(*pair, start, target_start, count) == shared
    expected = [(shared.start, shared.start + target_start - start, len(shared))] if shared else []
    assert system.requests == expected


@pytest.mark.parametrize(
    "error", [errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM]
)
def test_nothing_is_shared_where_the_file_system_cannot(monkeypatch, pair, error):
    FileSystem(monkeypatch, error)
    assert block_copy.share(*pair, 0, 0, 3000) == range(0)


def test_a_full_disk_while_sharing_is_an_error(monkeypatch, pair):
    FileSystem(monkeypatch, errno.ENOSPC)
    with pytest.raises(OSError, match="No space"):
        block_copy.share(*pair, 0, 0, 3000)


def test_shared_bytes_are_hashed_and_not_written(source, monkeypatch):
    written: list[int] = []
    pwrite = os.pwrite
    monkeypatch.setattr(
        os, "pwrite", lambda fd, data, position: (written.append(position), pwrite(fd, data, position))[1]
    )
    hashes = RunningHashes("sha256")
    carry(source, [Block(0, 100, 0, 100), Block(100, 1000, 100, 1000, shared=True)], hashes=hashes)
    assert written == [0]
    assert hashes.source.hexdigest() == hashes.target.hexdigest() == hashlib.sha256(DATA).hexdigest()


@pytest.fixture(params=["xfs", "btrfs"])
def sharing_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A real file system that shares blocks, in a sparse file of 400 MB."""
    maker = shutil.which(f"mkfs.{request.param}")
    if maker is None or os.geteuid() != 0:
        pytest.skip(f"needs root and mkfs.{request.param}: a {request.param} is mounted")
    (tmp_path / "disk").touch()
    os.truncate(tmp_path / "disk", 400 << 20)
    subprocess.run([maker, "-q", tmp_path / "disk"], check=True, capture_output=True)
    (tmp_path / "mounted").mkdir()
    command = ["mount", "-o", "loop", tmp_path / "disk", tmp_path / "mounted"]
    mounted = subprocess.run(command, check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip(f"this machine mounts no {request.param}: {mounted.stderr.decode().strip()}")
    yield tmp_path / "mounted"
    subprocess.run(["umount", tmp_path / "mounted"], check=True)


def test_a_merge_on_a_sharing_disk_takes_space_for_changes_only(sharing_disk, tmp_path):
    from safetensors.numpy import load_file

    from lora_export import formats, plan
    from lora_export.weights.checkpoint import open_checkpoint
    from lora_export.weights.merge import merge_checkpoint
    from support.handmade import base_file, peft_adapter

    def used() -> int:
        os.sync()
        disk = os.statvfs(sharing_disk)
        return (disk.f_blocks - disk.f_bfree) * disk.f_frsize

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
