"""Copy one file into another in blocks. Several threads read, change and write; one hashes, in order.

A block is small enough to stay in a core's cache while it is read, changed, written and hashed. So memory sees every
byte once on its way in and once on its way out. What was measured (2 cores of an AMD EPYC with AVX2, ext4, 2.2 GB of
bf16, every linear layer changed at rank 16; by hand, with sketches of this module; `make bench` times the whole):

- BLOCK: 1 MiB costs 10 % more than 2 MiB in calls and in waiting for Python's lock; 4 MiB gains nothing more.
- Scratch memory belongs to a thread, not to a block: 0.16 s less of 2.27, because it stays in the core's cache from
  one block to the next (this and the next on cores with AVX-512).
- The thread that changed a block also writes it: 0.15 s less than if the thread that hashes wrote it.
- Two threads on two cores; a third one only takes turns with them. More than MOST_THREADS were not tried.
- The kernel's own copy (copy_file_range) of unchanged ranges takes 1.4 times as long as reading and writing them,
  because they must be read for their hash anyway. Where the file system can share blocks, it does.
- Reserving a file's space before it is written (fallocate) saves ext4 5 % of the processor time, and no measurable
  time on the clock. It is left out, because file systems differ in what it costs.
- Asking the kernel early to write (START_WRITING) leaves 0.01 s of the final fsync's 0.2 s. Without it, the flush
  takes 0.7 s.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.storage.hashes import ALGORITHMS, Hash
from lora_export.storage.system_calls import c_function, read_at, write_at

BLOCK = 2 << 20  # bytes
AHEAD = 2  # blocks that may wait to be hashed while every thread works on another
MOST_THREADS = 8
START_WRITING = 16 << 20  # bytes after which the kernel is requested to begin writing
_FICLONERANGE = 0x4020940D  # <linux/fs.h>
_SYNC_FILE_RANGE_WRITE = 2  # <fcntl.h>
_CANNOT_SHARE = {errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM}

Bytes = NDArray[np.uint8]
Memory = Callable[[int], Bytes]  # allocates so many bytes, of any content
# (source, target, scratch): fills the target's bytes, may use the scratch bytes, returns what it found
Work = Callable[[Bytes, Bytes, Bytes], Any]


@dataclass(frozen=True, eq=False)
class Block:
    """Bytes [start, stop) of the source, which become the bytes [target_start, target_stop) of the target."""

    start: int
    stop: int
    target_start: int
    target_stop: int
    work: Work | None = None  # None: the bytes are copied unchanged
    shared: bool = False  # the target has the bytes already
    repeated: bool = False  # the source's bytes were in another block already, and in its hash


class RunningHashes:
    """The hashes of source and target, up to where the copy is."""

    def __init__(self, algorithm: str, target: Hash | None = None):
        self.algorithm, self.source = algorithm, ALGORITHMS[algorithm]()
        self.target = ALGORITHMS[algorithm]() if target is None else target

    def for_next_source(self) -> RunningHashes:
        """Hashes for another source of the same target. The target's hash goes on."""
        return RunningHashes(self.algorithm, self.target)


@dataclass(frozen=True, eq=False)
class _Buffers:
    """The memory of one block, from when it is read until it is hashed."""

    source: Bytes
    target: Bytes

    def before(self, block: Block) -> Bytes:
        """The block's bytes of the source."""
        return self.source[: block.stop - block.start]

    def after(self, block: Block) -> Bytes:
        """The block's bytes of the target."""
        if block.work is None:
            return self.before(block)
        return self.target[: block.target_stop - block.target_start]


def memory(count: int) -> Bytes:
    """Allocate bytes in the process's ordinary memory."""
    return np.empty(count, np.uint8)


def default_threads() -> int:
    """As many threads as this process has cores, at most MOST_THREADS."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_THREADS)


def transfer(
    source: Path,
    target_fd: int,
    blocks: Iterable[Block],
    hashes: RunningHashes,
    *,
    buffer_bytes: int = BLOCK,
    threads: int | None = None,
    memory: Memory = memory,
) -> Iterator[tuple[Block, Any]]:
    """Copy `blocks` from the source to the target. Yields each block, in order, with what its work returned.

    `buffer_bytes` is the size of the largest block, in the source, in the target, or half of the scratch bytes that
    its work needs. `memory` allocates the blocks' buffers. The hashes take in the blocks' bytes in order. Raises
    InputRefused where the source ends too early, and whatever a block's work raises.
    """
    threads = threads or default_threads()
    # One allocation for both: from 4 MiB on, NumPy asks for huge pages.
    free = [_Buffers(*np.split(memory(2 * buffer_bytes), 2)) for _ in range(threads + AHEAD)]
    scratches = [np.empty(2 * buffer_bytes, np.uint8) for _ in range(threads)]  # the last one returned is in the cache
    pending: deque[tuple[Block, _Buffers, Future[Any]]] = deque()
    started = 0  # bytes of the target that the kernel was requested to write
    with source.open("rb") as reader, ThreadPoolExecutor(threads) as pool:

        def finish_first() -> tuple[Block, Any]:
            block, buffers, future = pending.popleft()
            found = future.result()
            if not block.repeated:
                hashes.source.update(buffers.before(block))
            hashes.target.update(buffers.after(block))
            free.append(buffers)
            return block, found

        try:
            for block in blocks:
                if not free:
                    done, found = finish_first()
                    if done.target_stop - started >= START_WRITING:
                        pool.submit(_start_writing, target_fd, started, done.target_stop - started)
                        started = done.target_stop
                    yield done, found
                buffers = free.pop()
                future = pool.submit(_copy, source, reader.fileno(), target_fd, block, buffers, scratches)
                pending.append((block, buffers, future))
            while pending:
                yield finish_first()
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure, or when the caller stops early
    _start_writing(target_fd, started, 0)


def _copy(source: Path, read_fd: int, target_fd: int, block: Block, buffers: _Buffers, scratches: list[Bytes]) -> Any:
    found, before, after = None, buffers.before(block), buffers.after(block)
    read(source, read_fd, before, block.start)
    if block.work is not None:
        scratch = scratches.pop()
        try:
            found = block.work(before, after, scratch)
        finally:
            scratches.append(scratch)
    if not block.shared:
        write(target_fd, after.data, block.target_start)
    return found


def read(source: Path, fd: int, buffer: Bytes, position: int) -> None:
    """Fill a buffer from a position of the file. Raises InputRefused where the file ends before."""
    rest = buffer.data
    while rest:
        count = read_at(fd, rest, position)
        if not count:
            raise InputRefused(f"{source} became shorter while it was being read")
        rest, position = rest[count:], position + count


def write(fd: int, data: memoryview, position: int) -> None:
    """Write all of `data` at a position of the file."""
    while data:  # a nearly full disk takes a part, and reports an error for the rest
        count = write_at(fd, data, position)
        data, position = data[count:], position + count


def share(read_fd: int, write_fd: int, start: int, target_start: int, count: int) -> range:
    """Let the target share the source's blocks on the disk, where the file system can (Btrfs, XFS and others).

    Returns the positions in the source that are shared, which begin and end with whole blocks of the file system. The
    range is empty where nothing is shared.
    """
    if read_fd < 0 or write_fd < 0:  # one of them is in a store
        return range(0)
    try:
        import fcntl

        unit = os.fstatvfs(write_fd).f_bsize
    except (ImportError, AttributeError):  # Windows
        return range(0)
    first = start + -start % unit
    length = (start + count - first) // unit * unit
    if length <= 0 or (target_start - start) % unit:
        return range(0)
    request = struct.pack("=qQQQ", read_fd, first, length, target_start + first - start)
    try:
        fcntl.ioctl(write_fd, _FICLONERANGE, request)
    except OSError as error:
        if error.errno not in _CANNOT_SHARE:
            raise
        return range(0)
    return range(first, first + length)


def _start_writing(fd: int, start: int, count: int) -> None:
    """Ask the kernel to begin writing a range to the disk (count 0: to the end). This affects speed only."""
    sync_file_range = c_function("sync_file_range")  # Linux
    if sync_file_range is not None:
        sync_file_range(fd, ctypes.c_int64(start), ctypes.c_int64(count), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))
