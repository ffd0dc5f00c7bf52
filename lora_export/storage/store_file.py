"""Objects of a store as opened files: read by ranges with reading ahead, written as they are computed."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from lora_export.errors import OutputFailed
from lora_export.storage.object_store import Bucket, ObjectInfo, Upload
from lora_export.storage.system_calls import descriptor_of, forget_descriptor

CHUNK = 4 << 20  # bytes of one request
CHUNKS_AHEAD = 4  # chunks that are requested before they are needed, once an object is read in its order
KEPT = CHUNKS_AHEAD + 6  # chunks in memory: threads of a transfer are up to 10 blocks of 2 MiB apart
KEPT_OF_ONE = CHUNKS_AHEAD + 1  # the same, where one thread reads
REQUESTS_AT_ONCE = 32  # requests of all files that are read ahead
SMALL_READ = 1 << 16  # bytes; most headers are shorter


def stat_of(info: ObjectInfo | None) -> os.stat_result:
    """Size and times; the ETag as the number of the inode, so that another object is another file."""
    if info is None:
        return os.stat_result((stat.S_IFDIR | 0o755, 0, 0, 1, 0, 0, 0, 0, 0, 0))
    number = int.from_bytes(hashlib.sha256(str(info.e_tag).encode()).digest()[:6], "big")
    when = int(info.modified.timestamp())
    return os.stat_result((stat.S_IFREG | 0o644, number, 0, 1, 0, 0, info.size, when, when, when))


class SmallObject(io.BytesIO):
    """A small object, put when it is closed."""

    def __init__(self, bucket: Bucket, key: str):
        super().__init__()
        self._bucket, self._key = bucket, key

    def close(self) -> None:
        try:
            if not self.closed:
                self._bucket.put(self._key, self.getvalue())
        finally:  # what was refused is not put later, when the object is freed
            super().close()


class _NumberedFile(io.RawIOBase):
    """An opened object, with a descriptor for reads or writes at positions."""

    def __init__(self) -> None:
        self._descriptor: int | None = None
        self._lock = threading.Lock()

    def fileno(self) -> int:
        if self._descriptor is None:
            self._descriptor = descriptor_of(self)  # type: ignore[arg-type]
        return self._descriptor

    def close(self) -> None:
        if self._descriptor is not None:
            forget_descriptor(self._descriptor)
        super().close()


_pool = ThreadPoolExecutor(REQUESTS_AT_ONCE, "store")  # threads are started when they are needed


class Chunks:
    """The bytes of an object from `start` to `stop`, in chunks: the next ones are requested where reads go on."""

    def __init__(self, bucket: Bucket, key: str, start: int, stop: int, *, ahead: int, kept: int, chunk: int):
        self.start, self._stop, self._ahead, self._kept, self._size = start, stop, ahead, kept, chunk
        self._bucket, self._key, self._lock = bucket, key, threading.Lock()
        self._chunks: OrderedDict[int, Future[memoryview]] = OrderedDict()

    def read_at(self, buffer: memoryview, position: int) -> int:
        """Fill the first bytes of `buffer` from a position of the object. Returns how many; 0 at the end."""
        if position >= self._stop:
            return 0
        number, offset = divmod(position - self.start, self._size)
        piece = self._content(number)[offset : offset + len(buffer)]
        buffer[: len(piece)] = piece
        return len(piece)

    def _content(self, number: int) -> memoryview:
        chunk = self._chunk(number)
        try:
            return chunk.result()
        except Exception:  # the next read requests it again
            with self._lock:
                if self._chunks.get(number) is chunk:
                    del self._chunks[number]
            raise

    def _chunk(self, number: int) -> Future[memoryview]:
        with self._lock:
            ahead = self._ahead if number - 1 in self._chunks or number in self._chunks else 0
            for each in range(number, number + ahead + 1):
                first = self.start + each * self._size
                if each not in self._chunks and first < self._stop:
                    until = min(first + self._size, self._stop)
                    self._chunks[each] = _pool.submit(self._bucket.read, self._key, first, until)
            found = self._chunks[number]
            while len(self._chunks) > self._kept:
                self._chunks.popitem(last=False)
            return found

    def clear(self) -> None:
        """Drop what was read, and request nothing that has not been requested yet."""
        for chunk in self._chunks.values():
            chunk.cancel()
        self._chunks.clear()


class StoredFile(_NumberedFile):
    """An object that is read, with `kept` chunks in memory. Reads at positions read ahead where they go on."""

    def __init__(self, bucket: Bucket, key: str, status: os.stat_result, kept: int = KEPT):
        super().__init__()
        self._bucket, self._key, self._position, self._status = bucket, key, 0, status
        self._read_to = -1  # where the last read ended
        self._size = status.st_size
        self._chunks = Chunks(bucket, key, 0, self._size, ahead=CHUNKS_AHEAD, kept=kept, chunk=CHUNK)

    def status(self) -> os.stat_result:
        return self._status

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Exactly these bytes, by one request, where they do not follow what was read last; else chunk by chunk."""
        wanted = memoryview(buffer).cast("B")
        if len(wanted) <= CHUNK and self._position != self._read_to:
            content = self._bucket.read(self._key, self._position, self._position + len(wanted))
            wanted[: len(content)] = content
            count = len(content)
        else:
            count = self.read_at(wanted, self._position)
        self._position = self._read_to = self._position + count
        return count

    def read_at(self, buffer: memoryview, position: int) -> int:
        return self._chunks.read_at(buffer, position)

    def close(self) -> None:
        self._chunks.clear()
        super().close()


class UploadedFile(_NumberedFile):
    """An object that is written in blocks, which threads may bring out of order. Leaving by an error removes it."""

    def __init__(self, bucket: Bucket, key: str):
        super().__init__()
        self._upload, self._name = Upload(bucket, key), f"{bucket.address}/{key}"
        self._written, self._position = 0, 0
        self._waiting: dict[int, bytes] = {}  # blocks after one that is missing

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        """Whether the first bytes can be written last."""
        return False

    def write(self, data: Any) -> int:
        content = memoryview(data).cast("B")
        self.write_at(content, self._position)
        self._position += len(content)
        return len(content)

    def write_at(self, data: memoryview, position: int) -> int:
        with self._lock:
            if position != self._written:
                self._waiting[position] = bytes(data)
                return len(data)
            self._send(data)
            while self._written in self._waiting:
                self._send(self._waiting.pop(self._written))
        return len(data)

    def _send(self, data: Any) -> None:
        self._upload.write(data)
        self._written += len(data)

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is not None and not self.closed:
            self._upload.abort()
            super().close()
        super().__exit__(kind, *rest)

    def close(self) -> None:
        if self.closed:
            return
        if self._waiting:
            self._upload.abort()
            super().close()
            raise OutputFailed(f"{self._name}: bytes from {self._written} on were never written")
        try:
            self._upload.close()
        finally:
            super().close()
