"""Checks that an input is a regular file, before anything reads it."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from io import BufferedReader
from pathlib import Path

from lora_export.errors import InputRefused
from lora_export.storage.store_path import StorePath, copy_in_store

COPIED_AT_ONCE = 1 << 20  # bytes
MOST_NAMES = 1000  # of a folder that are compared with a name that is not there


def must_exist(path: Path, what: str) -> None:
    """Raise InputRefused where an input's path does not exist, or cannot be looked up. `what` names the input."""
    try:
        path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise InputRefused(f"{path} is a symbolic link to {path.readlink()}, which does not exist") from None
        raise InputRefused(f"there is no {what} at {path}{similar_name(path)}") from None
    except OSError as error:
        raise InputRefused(f"{path}: {error.strerror}") from error


def refuse_broken_link(path: Path) -> None:
    """Raise InputRefused for a symbolic link to a path that does not exist, or to itself."""
    if path.is_symlink():
        must_exist(path, "file or folder")


def similar_name(path: Path) -> str:
    """The most similar name in the folder of a path on the disk, as the end of a message; empty where none is."""
    import difflib  # after a mistake alone

    if isinstance(path, StorePath) or path.exists() or not path.parent.is_dir():
        return ""
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        names = [entry.name for entry in itertools.islice(entries, MOST_NAMES)]
        if near := difflib.get_close_matches(path.name, names, n=1, cutoff=0.75):
            return f"; a similar name there is {near[0]}"
    return ""


def must_be_regular(path: Path) -> None:
    """Check a file that a library will open by its name. Raises InputRefused as `open_regular` does."""
    open_regular(path).close()


def open_regular(path: Path) -> BufferedReader:
    """Open an input for reading. Raises InputRefused where it cannot be opened, or is not a regular file."""
    # O_NONBLOCK: a FIFO is refused at once instead of waiting for a writer. Windows has no O_NONBLOCK, cannot open
    # folders, and reads text unless O_BINARY is set. So the type is checked before the file is opened, and again
    # after, because another process may have replaced the file in between.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputRefused(f"{path} is not a regular file")
        if isinstance(path, StorePath):
            return path.open_object()
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            refuse_broken_link(path)
        raise InputRefused(f"{path}: {error.strerror}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or (not status.st_size and _is_generated(descriptor)):
        os.close(descriptor)
        raise InputRefused(f"{path} is not a regular file")
    return os.fdopen(descriptor, "rb")


def _is_generated(descriptor: int) -> bool:
    """Whether a file without a size has contents: those of /proc are made when they are read, perhaps without end."""
    try:
        return bool(os.read(descriptor, 1))
    except OSError:  # there is nothing to read at present, or it cannot be read
        return True


def read_bytes(path: Path, most: int) -> bytes:
    """The bytes of a file. Raises InputRefused beyond `most` of them."""
    with open_regular(path) as file:
        content = file.read(most + 1) if path.stat().st_size <= most else None  # at once, also of a sparse file
    if content is None or len(content) > most:
        raise InputRefused(f"{path} has more than {most:,} bytes, which no such file needs")
    return content


def read_text(path: Path, most: int) -> str:
    """The text of a file in UTF-8, with a mark for each byte that is none. Raises InputRefused beyond `most` bytes."""
    return read_bytes(path, most).decode("utf-8", errors="replace")


def copy_file(source: Path, target: Path) -> None:
    """Copy the contents of a file, on the disk or in a store, to a file that does not exist."""
    if copy_in_store(source, target):
        return
    with source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer, COPIED_AT_ONCE)


def contains(path: Path, text: bytes) -> bool:
    """Whether a file contains these bytes. Not by mmap: the pages that are read would count as the process's memory."""
    end = b""
    with path.open("rb") as file:
        while block := file.read(COPIED_AT_ONCE):
            if text in (both := end + block):
                return True
            end = both[-len(text) :]
    return False


def regular_files(folder: Path) -> list[Path]:
    """List every regular file below a folder, and every link to one, as in a Hugging Face cache; sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def shown_files(folder: Path) -> list[Path]:
    """Those of `regular_files` that are neither hidden nor in a hidden folder."""
    found = ((path, path.relative_to(folder).parts) for path in regular_files(folder))
    return [path for path, parts in found if not any(part[0] == "." for part in parts)]


def files_of(path: Path) -> list[Path]:
    """The regular files below a folder; or the file itself."""
    return regular_files(path) if path.is_dir() else [path]


def file_states(paths: Iterable[Path]) -> list[tuple[int, ...]]:
    """Device, inode, size and times of change: the same where files were neither replaced nor written to."""
    states = [path.stat() for path in paths]
    return [(state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns) for state in states]


@contextlib.contextmanager
def unchanged(path: Path, files: Callable[[], Iterable[Path]]) -> Iterator[None]:
    """Raise InputRefused at the end where `files()`, those of `path`, are not the same as at the beginning."""
    before = file_states(files())
    yield
    try:
        after = file_states(files())
    except (FileNotFoundError, InputRefused):  # they are gone, or no longer what they were
        after = []
    if after != before:
        raise InputRefused(f"{path} changed while it was judged, so nothing is decided. Verify it again")
