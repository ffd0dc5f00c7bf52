"""Paths of objects in stores: `s3://bucket/folder/file` with the operations of `pathlib.Path` that our readers use.

A subclass of Path, so that readers of headers, JSON, indexes and weights take both and know of neither. universal-
pathlib over obstore's fsspec store was weighed: its paths are no `Path` (400 annotations here would change), have no
descriptor for reads at positions, no If-Match, and importing it takes 0.15 s and 187 modules. The operations here are
answered from one listing of the bucket, without a request each. What needs a file of the operating system is refused
by `__fspath__`, with the name of the object.
"""

from __future__ import annotations

import errno
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePath, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from lora_export.errors import InputRefused, OutputFailed

if TYPE_CHECKING:
    from lora_export.storage.object_store import Bucket, ObjectInfo

ADDRESS = re.compile(r"(?P<bucket>(?:s3|gs|az)://[^/@:\s]+)(?:/(?P<key>.*))?", re.DOTALL)
SCHEME = re.compile(r"(?:s3|gs|az)://", re.IGNORECASE)
OTHER_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)  # as a path it would be a folder of this name
_PATTERN = "s3:/", "gs:/", "az:/"


def place(path: str | Path) -> Path:
    """A path, or the address of an object in a store as a path. Asks no store.

    Raises InputRefused for an address that is none or of another kind, and for one with a user name or a password.
    """
    if isinstance(path, Path):
        return path
    if not isinstance(path, str):
        raise InputRefused(f"a path is a text or a Path, and not of the type {type(path).__name__}")
    if is_hub_address(path):
        raise InputRefused(f"{path}: hf:// is read where a model or an adapter is named, and nowhere else")
    if not SCHEME.match(path):
        if other := OTHER_SCHEME.match(path):  # all of the text may have a password
            raise InputRefused(
                f"an address here begins with s3://, gs:// or az://, of a model or an adapter also with hf://, and not "
                f"with {other[0]}. A file has a path"
            )
        return Path(path)
    if "@" in path.split("//", 1)[1].split("/")[0]:
        raise InputRefused(
            f"an address such as {path[:5]}BUCKET/KEY must have no user name, key or password in it: they would stay "
            "in histories and logs. Set the credentials in the environment (guide stores)"
        )
    match = ADDRESS.fullmatch(path)
    if match is None or any(part in (".", "..") for part in path.split("/")):
        raise InputRefused(f"{path} is no address of an object: s3://BUCKET/KEY, gs://BUCKET/KEY or az://CONTAINER/KEY")
    return StorePath(path)


def is_hub_address(path: str | Path) -> bool:
    """Whether this is an address of the Hugging Face Hub (see `hub_cache.locate`)."""
    return isinstance(path, str) and path[:5].lower() == "hf://"


def newly_opened(path: str | Path) -> Path:
    """As `place`, without what the store stated of an object to a command before this one.

    Raises InputRefused for what is being written, or was not finished (`store_output`).
    """
    found = place(path)
    if isinstance(found, StorePath):
        found.newly().is_file()  # the first request, so that the message on a store's failure names this object
        if output := unfinished(found):
            raise InputRefused(
                f"{output} is not whole: a run is writing it, or was stopped. The command that began it goes on with "
                f"it; to discard it, delete it and {marker_of(output).name} beside it"
            )
    return found


def unfinished(path: Path) -> StorePath | None:
    """The output, a path in a store or its folder, that is being written or was not finished; None where none is."""
    outputs = (each for each in (path, path.parent) if isinstance(each, StorePath) and each.key)
    return next(filter(is_begun, outputs), None)


def is_begun(target: StorePath) -> bool:
    """Whether an output is being written, or was stopped. Its run empties the object beside it, and then deletes it."""
    mark = marker_of(target).newly()
    return mark.is_file() and mark.stat().st_size > 0


def marker_of(target: StorePath) -> StorePath:
    """The object beside an output that exists until the output is whole."""
    return target.with_name(f".{target.name}.begun")


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
        from lora_export.storage.object_store import bucket_of  # most paths are on the disk

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
        from lora_export.storage.store_file import stat_of

        return stat_of(info)

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
        return isinstance(other_path, StorePath) and self == other_path

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

    def open_object(self, kept: int | None = None) -> io.BufferedReader:
        """The object for reading, of which so many chunks are in memory; None: as many as several threads need."""
        from lora_export.storage.store_file import KEPT, SMALL_READ, StoredFile

        opened = StoredFile(self.bucket, self.key, self.stat(), KEPT if kept is None else kept)
        return io.BufferedReader(opened, SMALL_READ)

    def open(  # type: ignore[override]
        self,
        mode: str = "r",
        buffering: int = -1,  # noqa: ARG002 - Path's
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> IO[Any]:
        """As Path does. What is opened for writing is uploaded, and is there when it is closed without an error."""
        if "r" in mode:
            if not self.is_file():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
            opened: Any = self.open_object()
        elif "x" in mode and self.exists():
            raise OutputFailed(f"{self} exists already")
        else:
            from lora_export.storage.store_file import SmallObject, UploadedFile

            opened = (UploadedFile if "b" in mode else SmallObject)(self.bucket, self.key)
        return opened if "b" in mode else io.TextIOWrapper(opened, encoding, errors, newline)


def copy_in_store(source: Path, target: Path) -> bool:
    """Copy an object without reading it. False where both are not in one bucket, or the store cannot.

    Raises InputRefused where it is no longer the object that was planned, and OutputFailed where the store refuses.
    """
    if not (isinstance(source, StorePath) and isinstance(target, StorePath)) or source.bucket is not target.bucket:
        return False
    is_copied = source.bucket.copy(source.key, target.key)
    source.bucket.refuse_changed(source.key)
    return is_copied
