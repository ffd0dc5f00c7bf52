"""From file to file in blocks: read, worked on and written by several threads, hashed by one, in order.

A block is small enough to stay in a core's cache while it is read, changed, written and hashed, so that
memory sees every byte once on its way in and once on its way out. What was measured (2 cores of an AMD EPYC
with AVX2, ext4, 2.2 GB of bf16, every linear layer changed at rank 16; by hand, with sketches of this module;
`make bench` times the whole):

- BLOCK: 1 MiB costs 10 % more than 2 MiB in calls and in waiting for Python's lock; 4 MiB gains nothing more.
- what a block's change and sum are computed in (spare) is a thread's and not a block's: 0.16 s less of 2.27, since it
  stays in the core's cache from one block to the next (this and the next on cores with AVX-512).
- writing by whoever did the work: 0.15 s less than by the thread that hashes.
- threads: two on two cores; a third one only takes turns with them. More than MOST_THREADS were not tried.
- the kernel's own copy (copy_file_range) of what stays the same takes 1.4 times as long as reading and
  writing it, because it must be read for its hash anyway. Where the file system can share the blocks, it does.
- asking for a file's room before it is written (fallocate) spares ext4 5 % of the processor time, and no time on the
  clock that could be told; it is left out, since file systems differ in what it costs.
- telling the kernel early to write (START_WRITING) leaves 0.01 s of the final fsync's 0.2 s; left to the end
  altogether, the flush takes 0.7 s.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.storage.c_library import c_function
from lora_export.storage.hashes import ALGORITHMS, Hash
from lora_export.storage.positional_io import read_at, write_at

BLOCK = 2 << 20  # bytes
AHEAD = 2  # blocks that may wait for their turn to be hashed while every thread works on another
MOST_THREADS = 8
START_WRITING = 16 << 20  # bytes after which the kernel is told to begin
_FICLONERANGE = 0x4020940D  # <linux/fs.h>
_SYNC_FILE_RANGE_WRITE = 2  # <fcntl.h>
_CANNOT_SHARE = {errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM}

Bytes = NDArray[np.uint8]
Memory = Callable[[int], Bytes]  # so many bytes, of any content
Work = Callable[[Bytes, Bytes, Bytes], Any]  # (source, target, spare): fills the target's bytes, returns what it found


@dataclass(frozen=True, eq=False)
class Block:
    """Bytes [start, stop) of the source, which become the bytes [place, end) of the target."""

    start: int
    stop: int
    place: int
    end: int
    work: Work | None = None  # None: they stay what they are
    shared: bool = False  # the target has them already


@dataclass(frozen=True)
class Hashes:
    """The hashes of both files, up to where the transfer is."""

    name: str
    source: Hash = field(init=False)
    target: Hash = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", ALGORITHMS[self.name]())
        object.__setattr__(self, "target", ALGORITHMS[self.name]())

    def for_next_source(self) -> Hashes:
        """The same target's, which goes on, and another source's."""
        others = Hashes(self.name)
        object.__setattr__(others, "target", self.target)
        return others


@dataclass(frozen=True, eq=False)
class _Buffers:
    """The memory that one block lies in, from when it is read until it is hashed."""

    source: Bytes
    target: Bytes

    @classmethod
    def of(cls, room: int, memory: Memory) -> _Buffers:
        whole = memory(2 * room)  # one allocation: from 4 MiB on NumPy asks for huge pages
        return cls(whole[:room], whole[room:])

    def result(self, block: Block) -> Bytes:
        """The block's bytes of the target."""
        return self.source[: block.stop - block.start] if block.work is None else self.target[: block.end - block.place]


def memory(count: int) -> Bytes:
    """Bytes in the process's ordinary memory."""
    return np.empty(count, np.uint8)


def default_threads() -> int:
    """As many threads as this process has cores, up to where more were not measured."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_THREADS)


def transfer(
    source: Path,
    target_fd: int,
    blocks: Iterable[Block],
    hashes: Hashes,
    *,
    room: int = BLOCK,
    threads: int | None = None,
    memory: Memory = memory,
) -> Iterator[tuple[Block, Any]]:
    """Carry `blocks` over, in any order; yield each, in theirs, with what its work returned.

    `room` is the size of the largest block, in bytes of the source or the target or what its work needs
    half of in `spare`; `memory` is where blocks are worked on. The hashes take in what the blocks hold, in their order.
    Raises InputRefused where the source ends too early, and whatever a block's work raises.
    """
    threads = threads or default_threads()
    idle = [_Buffers.of(room, memory) for _ in range(threads + AHEAD)]
    spares = [np.empty(2 * room, np.uint8) for _ in range(threads)]  # the one given back last is the warm one
    waiting: deque[tuple[Block, _Buffers, Future[Any]]] = deque()
    written = kicked = 0
    with source.open("rb") as reader, ThreadPoolExecutor(threads) as pool:

        def take() -> tuple[Block, Any]:
            block, buffers, future = waiting.popleft()
            found = future.result()
            before = buffers.source[: block.stop - block.start]
            hashes.source.update(before)
            hashes.target.update(buffers.result(block))
            idle.append(buffers)
            return block, found

        try:
            for block in blocks:
                if not idle:
                    done, found = take()
                    written = done.end
                    if written - kicked >= START_WRITING:
                        pool.submit(_start_writing, target_fd, kicked, written - kicked)
                        kicked = written
                    yield done, found
                buffers = idle.pop()
                waiting.append(
                    (block, buffers, pool.submit(_make, source, reader.fileno(), target_fd, block, buffers, spares))
                )
            while waiting:
                yield take()
        finally:
            pool.shutdown(cancel_futures=True)  # on a failure, and when nobody listens any more
    _start_writing(target_fd, kicked, 0)


def _make(source: Path, read_fd: int, target_fd: int, block: Block, buffers: _Buffers, spares: list[Bytes]) -> Any:
    found, before = None, buffers.source[: block.stop - block.start]
    read(source, read_fd, before, block.start)
    if block.work is not None:
        spare = spares.pop()
        try:
            found = block.work(before, buffers.result(block), spare)
        finally:
            spares.append(spare)
    if not block.shared:
        write(target_fd, buffers.result(block).data, block.place)
    return found


def read(source: Path, fd: int, into: Bytes, start: int) -> None:
    """Fill `into` from a position of the file. Raises InputRefused where the file ends before."""
    rest = into.data
    while rest:
        done = read_at(fd, rest, start)
        if not done:
            raise InputRefused(f"{source} became shorter while it was being read")
        rest, start = rest[done:], start + done


def write(fd: int, data: memoryview, place: int) -> None:
    """Write all of `data` at a position of the file."""
    rest = data
    while rest:  # a disk that is nearly full takes a part, and complains about the rest
        done = write_at(fd, rest, place)
        rest, place = rest[done:], place + done


def share(read_fd: int, write_fd: int, start: int, place: int, count: int) -> range:
    """Let the target share the source's blocks on the disk, where the file system can (Btrfs, XFS and others).

    Returns the positions in the source that are shared, which begin and end with whole blocks of the file
    system; an empty range where none are.
    """
    try:
        import fcntl

        unit = os.fstatvfs(write_fd).f_bsize
    except (ImportError, AttributeError):  # Windows
        return range(0)
    first = start + -start % unit
    length = (start + count - first) // unit * unit
    if length <= 0 or (place - start) % unit:
        return range(0)
    request = struct.pack("=qQQQ", read_fd, first, length, place + first - start)
    try:
        fcntl.ioctl(write_fd, _FICLONERANGE, request)
    except OSError as error:
        if error.errno not in _CANNOT_SHARE:
            raise
        return range(0)
    return range(first, first + length)


def _start_writing(fd: int, start: int, count: int) -> None:
    """Ask the kernel to begin writing a range to the disk (0: to the end). Only speed depends on it."""
    sync_file_range = c_function("sync_file_range")  # Linux
    if sync_file_range is not None:
        sync_file_range(fd, ctypes.c_int64(start), ctypes.c_int64(count), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))
