"""Copy one file into others in blocks. Several threads read, change and write; one hashes, in order.

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
- Reserving a file's space before it is written (`reserve`) saves ext4 an eighth to a fifth of the processor time of a
  compiled merge's copy (0.55 GB on a busy machine), most of it in the kernel. XFS, Btrfs and tmpfs gain nothing.
- Asking the kernel early to write (START_WRITING) leaves 0.01 s of the final fsync's 0.2 s. Without it, the flush
  takes 0.7 s.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import struct
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.storage.hashes import ALGORITHMS, Hash
from lora_export.storage.shared_source import SharedSource, SourcePiece, joined_pieces
from lora_export.storage.system_calls import c_function, read_at, write_at

BLOCK = 2 << 20  # bytes
AHEAD = 2  # blocks that may wait to be hashed while every thread works on another
MOST_THREADS = 8
START_WRITING = 16 << 20  # bytes after which the kernel is requested to begin writing
_STATFS = 256  # bytes, more than `struct statfs` has; its first field, a long, is the type of the file system
_EXT4 = 0xEF53  # <linux/magic.h>
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
class Copy:
    """One of several targets of a source: its blocks, in the order of the source but for the repeated ones."""

    target_fd: int
    blocks: Iterator[Block]
    hashes: RunningHashes  # all copies of a source have the same `source`


class Passed(NamedTuple):
    """A block that is in its target, with what its work returned; or the error that ended its copy."""

    copy: Copy
    block: Block | None
    found: Any = None
    error: Exception | None = None


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
    copies = [Copy(target_fd, iter(blocks), hashes)]
    every = transfer_together(source, copies, buffer_bytes=buffer_bytes, threads=threads, memory=memory)
    with contextlib.closing(every) as passed:
        for _, block, found, error in passed:
            if block is None:
                assert error is not None
                raise error
            yield block, found


def transfer_together(
    source: Path,
    copies: Sequence[Copy],
    *,
    buffer_bytes: int = BLOCK,
    threads: int | None = None,
    memory: Memory = memory,
) -> Generator[Passed, None, None]:
    """As `transfer`, into several targets in one pass: a byte of the source is read and hashed once.

    Yields the blocks of all copies; those of one in its order. An error ends one copy, and the others go on. Memory is
    that of one copy and a few blocks of the source.
    """
    threads = threads or default_threads()
    with source.open("rb") as reader, ThreadPoolExecutor(threads) as pool:
        run = _Transfer(functools.partial(read, source, reader.fileno()), copies, pool, threads, buffer_bytes, memory)
        try:
            yield from run.whole()
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure, or when the caller stops early
    for copy in run.started.keys() - run.failed:
        _start_writing(copy.target_fd, run.started[copy], 0)


class _Pending(NamedTuple):
    """A block that a thread works on, or that waits for it."""

    copy: Copy
    block: Block
    pieces: Sequence[SourcePiece]
    target: Bytes
    future: Future[tuple[Any, Bytes]]


class _Transfer:
    """Copies of one source on their way, and the memory that they share."""

    def __init__(
        self,
        read_source: Callable[[Bytes, int], None],
        copies: Sequence[Copy],
        pool: ThreadPoolExecutor,
        threads: int,
        buffer_bytes: int,
        memory: Memory,
    ):
        # One allocation for both: from 4 MiB on, NumPy asks for huge pages.
        buffers = [np.split(memory(2 * buffer_bytes), 2) for _ in range(threads + AHEAD)]
        self.source = SharedSource([one for one, _ in buffers], lambda: memory(buffer_bytes), is_shared=len(copies) > 1)
        self.free = [other for _, other in buffers]
        self.scratches = [np.empty(2 * buffer_bytes, np.uint8) for _ in range(threads)]  # the last one is in the cache
        self.read_source, self.copies, self.pool = read_source, copies, pool
        self.coming: dict[Copy, Block] = {}  # the next block of each copy
        self.pending: deque[_Pending] = deque()
        self.started = dict.fromkeys(copies, 0)  # bytes of each target that the kernel was requested to write
        self.failed: set[Copy] = set()

    def whole(self) -> Iterator[Passed]:
        """All blocks: the next one is that which begins first in the source."""
        for copy in self.copies:
            yield from self.take_next(copy)
        while self.coming:
            copy = min(self.coming, key=lambda one: (self.coming[one].start, -self.coming[one].stop))
            if not self.free:
                yield from self.finish_first()
            if copy not in self.failed:
                self.submit(copy, self.coming[copy])
            yield from self.take_next(copy)
            self.source.forget_before(min((block.start for block in self.coming.values()), default=0))
        while self.pending:
            yield from self.finish_first()

    def take_next(self, copy: Copy) -> Iterator[Passed]:
        """Find the next block of a copy."""
        self.coming.pop(copy, None)
        try:
            if copy not in self.failed and (block := next(copy.blocks, None)) is not None:
                self.coming[copy] = block
        except Exception as error:  # noqa: BLE001 - it ends this copy alone
            yield from self.end(copy, error)

    def submit(self, copy: Copy, block: Block) -> None:
        """Give a block to a thread."""
        pieces, target = self.source.pieces_of(block.start, block.stop, repeated=block.repeated), self.free.pop()
        future = self.pool.submit(_copy, self.read_source, copy.target_fd, block, pieces, target, self.scratches)
        self.pending.append(_Pending(copy, block, pieces, target, future))

    def finish_first(self) -> Iterator[Passed]:
        """Wait for the first block, and take its bytes into the hashes."""
        copy, block, pieces, target, future = self.pending.popleft()
        try:
            found, after = future.result()
        except Exception as error:  # noqa: BLE001 - it ends this copy alone
            yield from self.end(copy, error)
        for piece in pieces:
            piece.add_to(copy.hashes.source)
        is_whole = copy not in self.failed
        if is_whole:
            copy.hashes.target.update(after)
            self.start_writing(copy, block.target_stop)
        self.source.release(pieces)
        self.free.append(target)
        if is_whole:
            yield Passed(copy, block, found)

    def start_writing(self, copy: Copy, position: int) -> None:
        """Ask the kernel to begin with what was written of a target."""
        count = position - self.started[copy]
        if self.coming and count >= START_WRITING:  # at the end, `transfer_together` does it for all
            self.pool.submit(_start_writing, copy.target_fd, self.started[copy], count)
            self.started[copy] = position

    def end(self, copy: Copy, error: Exception) -> Iterator[Passed]:
        """Leave a copy out from now on. Blocks of it may still be pending."""
        if copy not in self.failed:
            self.failed.add(copy)
            yield Passed(copy, None, error=error)


def _copy(
    read_source: Callable[[Bytes, int], None],
    target_fd: int,
    block: Block,
    pieces: Sequence[SourcePiece],
    target: Bytes,
    scratches: list[Bytes],
) -> tuple[Any, Bytes]:
    """What the work of a block returned, and the block's bytes of the target."""
    for piece in pieces:
        piece.read(read_source)
    found, before = None, joined_pieces(pieces, block.start, block.stop)
    after = before if block.work is None else target[: block.target_stop - block.target_start]
    if block.work is not None:
        scratch = scratches.pop()
        try:
            found = block.work(before, after, scratch)
        finally:
            scratches.append(scratch)
    if not block.shared:
        write(target_fd, after.data, block.target_start)
    return found, after


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


def reserve(write_fd: int, count: int) -> None:
    """Ask ext4 to allocate the first `count` bytes of a file that will have as many.

    Other file systems are left alone: none gained time, Btrfs would not compress the file, and FAT would write it
    twice. To try whether the target can share blocks would change it.
    """
    fallocate, fstatfs = c_function("fallocate"), c_function("fstatfs")  # of Linux
    if fallocate is None or fstatfs is None:
        return
    status = ctypes.create_string_buffer(_STATFS)
    if fstatfs(write_fd, status) == 0 and ctypes.c_long.from_buffer(status).value == _EXT4:
        fallocate(write_fd, 0, ctypes.c_int64(0), ctypes.c_int64(count))  # what fails here fails when it is written


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
