"""Output that is either whole or absent.

Everything is written into a stage: a hidden folder beside the target, on the same file system. Only
when the work has succeeded are its files flushed to the disk and renamed into place; on any way out
before that, Ctrl-C and SIGTERM included, the stage is removed. What SIGKILL leaves behind is
recognised by the next run on the same target, because only a live run holds the lock.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from lora_export.errors import InputRefused, OutputFailed

MANIFEST = "lora_export.json"
MAX_JSON = 100_000_000  # bytes; the index of the largest models has a tenth
MAX_OBJECTS = 250_000  # in one file; a header has one for each tensor, and each takes a hundred times its bytes here
MAX_DEPTH = 100  # of objects and lists in each other; what walks through them later may recurse
LONGEST_NAME = 255  # bytes, on every file system that matters here
LONGEST_SUFFIX = 32  # bytes; what `_beside` adds
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # <fcntl.h>, <linux/fs.h>

Say = Callable[[str], None]


def _silent(_: str) -> None:
    """Nobody is listening."""


@contextlib.contextmanager
def stage_folder(
    target: Path, *, inputs: Iterable[Path], overwrite: bool = False, needs: int = 0, say: Say = _silent
) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` when the block succeeds, and vanishes when it does not.

    `needs` is how many bytes will be written; `say` hears of leftovers of runs that were killed.
    An existing target is replaced in one step, and only with `overwrite`, if it is an output of this
    program with nothing else in it. Raises OutputFailed before anything is written, or when writing fails.
    """
    with _translated(target):
        target = _absolute(target)
        with _claimed(target, inputs, overwrite=overwrite, needs=needs, say=say) as stage:
            _refuse_foreign_files(target)
            yield stage
            _flush(stage)
            _refuse_taken([target], overwrite=overwrite)  # again: somebody else may have been there meanwhile
            _refuse_foreign_files(target)
            _swap_in(stage, target)


@contextlib.contextmanager
def stage_file(
    target: Path, *, inputs: Iterable[Path], overwrite: bool = False, needs: int = 0, say: Say = _silent
) -> Iterator[Path]:
    """Yield an empty folder; the files put into it land beside `target` when the block succeeds.

    One of them must have the target's name: it is renamed last, so that whoever sees it finds its
    companions too. Otherwise as `stage_folder`.
    """
    with _translated(target):
        target = _absolute(target)
        with _claimed(target, inputs, overwrite=overwrite, needs=needs, say=say) as stage:
            if target.is_dir():
                raise OutputFailed(f"{target} is a folder; name a file")
            yield stage
            _flush(stage)
            companions = sorted(path.name for path in stage.iterdir() if path.name != target.name)
            places = [target.parent / name for name in (*companions, target.name)]
            _refuse_taken(places, overwrite=overwrite)
            for place in places:
                (stage / place.name).replace(place)
            _flush_folder(target.parent)


def _absolute(target: Path) -> Path:
    """Absolute, with the parent resolved: the final component is never followed."""
    if target.name in ("", ".."):
        raise OutputFailed(f"{target} cannot be written to: name a file or folder in it")
    return target.parent.resolve() / target.name


@contextlib.contextmanager
def _claimed(target: Path, inputs: Iterable[Path], *, overwrite: bool, needs: int, say: Say) -> Iterator[Path]:
    """Check the target, take its lock, clean up after dead runs, and lend out an empty stage."""
    if len(os.fsencode(target.name)) > LONGEST_NAME:
        raise OutputFailed(f"the output's name is longer than {LONGEST_NAME} bytes")
    if not target.parent.is_dir():
        raise OutputFailed(f"the folder {target.parent} does not exist; create it first")
    for path in inputs:
        _refuse_overlap(target, path.resolve())
    _refuse_taken([target], overwrite=overwrite)
    free = shutil.disk_usage(target.parent).free
    if needs > free:
        raise OutputFailed(f"{target.parent} has {free / 1e9:.2f} GB free, the output needs {needs / 1e9:.2f} GB")
    with _locked(target):
        _remove_orphans(target, say)
        stage = target.parent / _beside(target, f"{os.getpid()}.partial")
        stage.mkdir()
        try:
            yield stage
        finally:
            shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def _translated(target: Path) -> Iterator[None]:
    """Failures of the file system, told as what they are for the user: this output could not be written."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise OutputFailed(f"{target} could not be written: {error.strerror or error}{where}") from error


def _refuse_overlap(target: Path, source: Path) -> None:
    if target.exists() and target.samefile(source):
        raise OutputFailed(f"the output {target} is the input {source}")
    if source.is_dir() and target.is_relative_to(source):
        raise OutputFailed(f"the output {target} lies inside the input {source}")
    if source.is_relative_to(target):
        raise OutputFailed(f"the input {source} lies inside the output {target}, which would be replaced")


def _refuse_taken(places: Iterable[Path], *, overwrite: bool) -> None:
    for place in places:
        if place.is_symlink():
            raise OutputFailed(f"{place} is a symbolic link; name the place itself")
        if place.exists() and not overwrite:
            raise OutputFailed(f"{place} exists already; say --overwrite to replace it")


def _refuse_foreign_files(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputFailed(f"{target} is a file; the output is a folder")
    known = {MANIFEST, *read_manifest(target).get("files", {})}
    present = {path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir()}
    foreign = sorted(present - known)
    if foreign:
        raise OutputFailed(
            f"{target} holds files that lora-export did not write, and will not delete: {', '.join(foreign[:10])}"
        )


def _beside(target: Path, suffix: str) -> str:
    """A hidden name for something that belongs to the target; long names go by their hash."""
    name = os.fsencode(target.name)
    # The hash decides by the target alone, so that one run finds what another left.
    stem = target.name if len(name) + LONGEST_SUFFIX <= LONGEST_NAME else hashlib.sha256(name).hexdigest()
    return f".{stem}.{suffix}"


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold the target's lock; a second run ends at once. The kernel frees the lock of a killed run."""
    path = target.parent / _beside(target, "lock")
    descriptor = _take(path, target)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _take(path: Path, target: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(descriptor)
            raise OutputFailed(f"another run (process {owner}) is writing {target}") from None
        if os.fstat(descriptor).st_nlink:
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            return descriptor
        # Between our open and our lock its owner finished and removed it: what we hold has no name any more.
        os.close(descriptor)


def _remove_orphans(target: Path, say: Say) -> None:
    # The whole name is compared: the target `out` must not meddle with a live run that writes `out.v2`.
    ours = re.compile(re.escape(_beside(target, "")) + r"\d+\.(partial|old)")
    for path in target.parent.iterdir():
        found = ours.fullmatch(path.name)
        if found and found[1] == "partial":
            say(f"removed {path.name}, which a run that was killed had left behind")
            shutil.rmtree(path)
        elif found:
            say(f"{path} is a former {target.name}, set aside by a run that was killed: keep it or delete it")


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir():
            _flush_folder(path)
        else:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap_in(stage: Path, target: Path) -> None:
    """Make the stage the target; what the target was before is in the stage's place afterwards, if anywhere."""
    if not target.exists():
        stage.rename(target)
    elif not _exchange(stage, target):
        aside = stage.with_suffix(".old")  # not a stage: if we are killed here, it is the only whole output
        target.rename(aside)
        stage.rename(target)
        shutil.rmtree(aside)
    _flush_folder(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step. False where the system cannot (no Linux, or an old file system)."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    result: int = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE))
    return result == 0


def sha256(path: Path) -> str:
    """The hash of a file's bytes, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Record where a folder's contents came from, and what each file holds. Written last."""
    contents = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    text = json.dumps({**facts, "files": contents}, indent=2) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `write_manifest` recorded; empty where there is none. Raises InputRefused for a damaged one."""
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    manifest = read_json(path)
    if not isinstance(manifest.get("files", {}), dict):
        raise InputRefused(f"{path} is not a manifest")
    return manifest


def parse_json(text: bytes, source: Path | str) -> dict[str, Any]:
    """A JSON object from a file that nobody vouches for.

    Raises InputRefused, naming `source`, for what is not JSON, not an object, nested deeply or beyond number,
    or names a key twice (Python would silently take the last one).
    """
    objects = itertools.count(1)

    def without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if next(objects) > MAX_OBJECTS:
            raise InputRefused(f"{source} holds more than {MAX_OBJECTS:,} objects, which no such file needs")
        table = dict(pairs)
        if len(table) != len(pairs):
            twins = sorted(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise InputRefused(f"{source} names {', '.join(twins)} more than once")
        return table

    try:
        content = json.loads(text, object_pairs_hook=without_twins)
    except (ValueError, RecursionError) as error:
        raise InputRefused(f"{source} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputRefused(f"{source} is not a JSON object")
    if _is_deep(content):
        raise InputRefused(f"{source} nests objects and lists more than {MAX_DEPTH} deep")
    return content


def _is_deep(content: Any) -> bool:
    level = [content]
    for _ in range(MAX_DEPTH):
        inner = (there.values() if isinstance(there, dict) else there for there in level)
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
        if not level:
            return False
    return True


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises InputRefused as `parse_json` and `open_regular` do, and for a huge file."""
    with open_regular(path) as file:
        text = file.read(MAX_JSON + 1)
    if len(text) > MAX_JSON:
        raise InputRefused(f"{path} has more than {MAX_JSON:,} bytes, which no such file needs")
    return parse_json(text, path)


def read_model_config(path: Path) -> dict[str, Any]:
    """A model's `config.json`. Raises InputRefused where a field that is acted upon is not what transformers writes."""
    config = read_json(path)
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise InputRefused(f"{path}: architectures is no list of names")
    for name in ("id2label", "label2id"):
        if not isinstance(config.get(name) or {}, dict):
            raise InputRefused(f"{path}: {name} is no table")
    return config


def must_exist(path: Path, what: str) -> None:
    """Raises InputRefused where there is nothing at an input's path, or it cannot be looked at."""
    try:
        path.stat()
    except FileNotFoundError:
        raise InputRefused(f"there is no {what} at {path}") from None
    except OSError as error:
        raise InputRefused(f"{path}: {error.strerror}") from error


def open_regular(path: Path) -> BinaryIO:
    """Open an input for reading. Raises InputRefused for one that cannot be opened, or is no regular file."""
    try:
        # Non-blocking, so that a FIFO is refused at once instead of waiting for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise InputRefused(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputRefused(f"{path} is not a regular file")
    return os.fdopen(descriptor, "rb")


def regular_files(folder: Path) -> list[Path]:
    """Every file below a folder, links to files (as in a Hugging Face cache) included, FIFOs and devices not."""
    return sorted(path for path in folder.rglob("*") if path.is_file())
