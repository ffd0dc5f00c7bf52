"""Paths of objects in stores: `s3://bucket/folder/file` with the operations of `pathlib.Path` that our readers use.

A subclass of Path, so that readers of headers, JSON, indexes and weights take both and know of neither. universal-
pathlib over obstore's fsspec store was weighed: its paths are no `Path` (400 annotations here would change), have no
descriptor for reads at positions, no If-Match, and importing it takes 0.15 s and 187 modules. The operations here are
answered from one listing of the bucket, without a request each. What needs a file of the operating system is refused
by `__fspath__`, with the name of the object.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePath, PurePosixPath
from typing import IO, Any, cast

from lora_export.errors import InputRefused, OutputFailed
from lora_export.storage.object_store import ADDRESS, SCHEME, Bucket, ObjectInfo, Upload, bucket_of
from lora_export.storage.system_calls import descriptor_of, forget_descriptor

CHUNK = 4 << 20  # bytes of one request
AHEAD = 4  # chunks that are requested before they are needed, once an object is read in its order
KEPT = AHEAD + 6  # chunks in memory: threads of a transfer are up to 10 blocks of 2 MiB apart
SMALL_READ = 1 << 16  # bytes; most headers are shorter
_PATTERN = "s3:/", "gs:/", "az:/"


def place(path: str | Path) -> Path:
    """A path, or the address of an object in a store as a path. Asks no store.

    Raises InputRefused for an address that is none, and for one with a user name or a password in it.
    """
    if isinstance(path, Path):
        return path
    if not SCHEME.match(path):
        return Path(path)
    if "@" in path.split("//", 1)[1].split("/")[0]:
        raise InputRefused(
            f"an address such as {path[:5]}BUCKET/KEY must have no user name, key or password in it: they would stay in "
            "histories and logs. Set the credentials in the environment (guide stores)"
        )
    match = ADDRESS.fullmatch(path)
    if match is None or any(part in (".", "..") for part in path.split("/")):
        raise InputRefused(f"{path} is no address of an object: s3://BUCKET/KEY, gs://BUCKET/KEY or az://CONTAINER/KEY")
    return StorePath(path)


def newly_opened(path: str | Path) -> Path:
    """As `place`; of an object, what a command before this one was told is forgotten.

    Raises InputRefused for what is being written, or was not finished (`store_output`).
    """
    found = place(path)
    if isinstance(found, StorePath):
        found.newly()
        for each in (found, found.parent):
            if each.key and (begun := marker_of(each)).newly().is_file():
                raise InputRefused(
                    f"{each} is not whole: a run is writing it, or was stopped. The command that began it goes on with "
                    f"it; to discard it, delete it and {begun.name} beside it"
                )
    return found


def marker_of(target: StorePath) -> StorePath:
    """The object beside an output that exists until the output is whole."""
    return cast(StorePath, target.with_name(f".{target.name}.begun"))


class StorePath(Path, PurePosixPath):
    """An object, or the folder of all objects whose keys begin with it and a slash."""

    __slots__ = ()

    def __new__(cls, *parts: Any) -> StorePath:  # not Path's, which on Windows makes paths of Windows alone
        return PurePath.__new__(cls, *parts)

    def __str__(self) -> str:
        text = super().__str__()
        return text.replace(":/", "://", 1) if text.startswith(_PATTERN) and "://" not in text else text

    def __fspath__(self) -> str:
        raise InputRefused(f"{self} is in a store, and this needs a file or folder on the disk. Copy it there first")

    @property
    def bucket(self) -> Bucket:
        return bucket_of("//".join(self.parts[:2]))

    @property
    def key(self) -> str:
        return "/".join(self.parts[2:])

    def newly(self) -> StorePath:
        """The same, without what the store stated of it and of what is below it before."""
        self.bucket.forget(self.key)
        return self

    # --- What it is ---

    def _info(self) -> ObjectInfo | None:
        return self.bucket.info(self.key)

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:  # noqa: ARG002 - Path's
        info = self._info()
        if info is None and not self.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return _status(info)

    def exists(self, **_: Any) -> bool:
        return self._info() is not None or self.is_dir()

    def is_file(self, **_: Any) -> bool:
        return self._info() is not None

    def is_dir(self, **_: Any) -> bool:
        return self.bucket.has_below(self.key)

    def is_symlink(self) -> bool:
        return False

    def is_absolute(self) -> bool:
        return True

    def absolute(self) -> StorePath:
        return self

    def resolve(self, strict: bool = False) -> StorePath:  # noqa: ARG002 - Path's
        return self

    def expanduser(self) -> StorePath:
        return self

    def samefile(self, other_path: Any) -> bool:
        return self == other_path

    def relative_to(self, *other: Any, **options: Any) -> Path:  # type: ignore[override]
        """The rest of the key, as a relative path of this system."""
        return Path(*super().relative_to(*other, **options).parts)

    # --- Folders ---

    def _descendants(self) -> list[PurePosixPath]:
        """The files below it and their folders, relative to it."""
        files = [PurePosixPath(name) for name in self.bucket.below(self.key)]
        folders = {folder for file in files for folder in file.parents if folder.name}
        return sorted({*files, *folders})

    def iterdir(self) -> Iterator[StorePath]:  # type: ignore[override]
        yield from (self._child(each) for each in self._descendants() if len(each.parts) == 1)

    def glob(self, pattern: str, **_: Any) -> Iterator[StorePath]:  # type: ignore[override]
        depth = len(PurePosixPath(pattern).parts)
        found = (each for each in self._descendants() if len(each.parts) == depth and each.match(pattern))
        yield from map(self._child, found)

    def rglob(self, pattern: str, **_: Any) -> Iterator[StorePath]:  # type: ignore[override]
        yield from (self._child(each) for each in self._descendants() if each.match(pattern))

    def _child(self, relative: PurePosixPath) -> StorePath:
        child: StorePath = self.joinpath(*relative.parts)
        return child

    def mkdir(self, *_: Any, **__: Any) -> None:
        """A store has no folders."""

    def unlink(self, missing_ok: bool = False) -> None:
        if missing_ok or self.is_file():
            self.bucket.delete(self.key)

    # --- Contents ---

    def open_object(self) -> io.BufferedReader:
        """The object for reading."""
        return io.BufferedReader(StoredFile(self), SMALL_READ)

    def open(self, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None, newline: Any = None) -> IO[Any]:  # type: ignore[override]  # noqa: E501
        """As Path does. What is opened for writing is uploaded, and is there when it is closed without an error."""
        if "r" in mode:
            if not self.is_file():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
            opened: Any = self.open_object()
        elif "x" in mode and self.exists():
            raise OutputFailed(f"{self} exists already")
        else:
            opened = UploadedFile(self.bucket.writer(self.key), str(self)) if "b" in mode else _WrittenText(self)
        return opened if "b" in mode else io.TextIOWrapper(opened, encoding, errors, newline)


def _status(info: ObjectInfo | None) -> os.stat_result:
    """Size and times; the ETag as the number of the inode, so that another object is another file."""
    if info is None:
        return os.stat_result((stat.S_IFDIR | 0o755, 0, 0, 1, 0, 0, 0, 0, 0, 0))
    number = int.from_bytes(hashlib.sha256(str(info.e_tag).encode()).digest()[:6], "big")
    when = int(info.modified.timestamp())
    return os.stat_result((stat.S_IFREG | 0o644, number, 0, 1, 0, 0, info.size, when, when, when))


class _WrittenText(io.BytesIO):
    """A small object, put when it is closed."""

    def __init__(self, path: StorePath):
        super().__init__()
        self._path = path

    def close(self) -> None:
        if not self.closed:
            self._path.bucket.put(self._path.key, self.getvalue())
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


_pool = ThreadPoolExecutor(AHEAD, "store")  # threads are started when they are needed


class StoredFile(_NumberedFile):
    """An object that is read. Reads at positions read ahead where they follow each other."""

    def __init__(self, path: StorePath):
        super().__init__()
        self._bucket, self._key, self._position = path.bucket, path.key, 0
        self._status = path.stat()
        self._size = self._status.st_size
        self._chunks: OrderedDict[int, Future[memoryview]] = OrderedDict()

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
        """Exactly these bytes, by one request: for headers and small files. Large reads go chunk by chunk."""
        wanted = memoryview(buffer).cast("B")
        if len(wanted) <= SMALL_READ:
            content = self._bucket.read(self._key, self._position, self._position + len(wanted))
            wanted[: len(content)] = content
            count = len(content)
        else:
            count = self.read_at(wanted, self._position)
        self._position += count
        return count

    def read_at(self, buffer: memoryview, position: int) -> int:
        number, offset = divmod(position, CHUNK)
        if position >= self._size:
            return 0
        piece = self._chunk(number).result()[offset : offset + len(buffer)]
        buffer[: len(piece)] = piece
        return len(piece)

    def _chunk(self, number: int) -> Future[memoryview]:
        with self._lock:
            ahead = AHEAD if number - 1 in self._chunks or number in self._chunks else 0
            for each in range(number, min(number + ahead, (self._size - 1) // CHUNK) + 1):
                if each not in self._chunks:
                    self._chunks[each] = _pool.submit(
                        self._bucket.read, self._key, each * CHUNK, (each + 1) * CHUNK
                    )
            found = self._chunks[number]
            while len(self._chunks) > KEPT:
                self._chunks.popitem(last=False)
            return found

    def close(self) -> None:
        for chunk in self._chunks.values():
            chunk.cancel()
        self._chunks.clear()
        super().close()


class UploadedFile(_NumberedFile):
    """An object that is written in blocks, which threads may bring out of order. Leaving by an error removes it."""

    def __init__(self, upload: Upload, name: str):
        super().__init__()
        self._upload, self._name = upload, name
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
        self._upload.close()
        super().close()




def copy_in_store(source: Path, target: Path) -> bool:
    """Copy an object without reading it. False where both are not in one bucket, or the store cannot.

    Raises InputRefused where it is no longer the object that was planned.
    """
    if not (isinstance(source, StorePath) and isinstance(target, StorePath)) or source.bucket is not target.bucket:
        return False
    is_copied = source.bucket.copy(source.key, target.key)
    source.bucket.refuse_changed(source.key)
    return is_copied
