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
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from lora_export.errors import OutputFailed, one_line
from lora_export.storage.manifest import MANIFEST, read_manifest

LONGEST_NAME = 255  # bytes, on every file system that matters here
LONGEST_SUFFIX = 32  # bytes; what `_beside` and `data_name` add
DIGITS = 16  # of a content's hash, in the name of a data file
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # <fcntl.h>, <linux/fs.h>
Say = Callable[[str], None]


finished: list[Path] = []  # what this process has published, so that a Ctrl-C which comes after that is told rightly


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

    def publish(stage: Path, target: Path) -> None:
        _refuse_taken([target], overwrite=overwrite)  # again: somebody else may have been there meanwhile
        _refuse_foreign_files(target)
        _swap_in(stage, target)

    with (
        _translated(target),
        _claimed(target, inputs, overwrite=overwrite, needs=needs, say=say, publish=publish) as stage,
    ):
        _refuse_foreign_files(_absolute(target))
        yield stage


@contextlib.contextmanager
def stage_file(
    target: Path, *, inputs: Iterable[Path], overwrite: bool = False, needs: int = 0, say: Say = _silent
) -> Iterator[Path]:
    """Yield an empty folder; the files put into it land beside `target` when the block succeeds.

    One of them must have the target's name: it is renamed last, so that whoever sees it finds its
    companions too. No two files are renamed in one step, so a companion that the target cannot do without
    needs a name that no other content has, `data_name`: killed between the renames, we leave the old
    target with its old data. Data files of former contents go when the target has come. Otherwise as
    `stage_folder`.
    """

    def publish(stage: Path, target: Path) -> None:
        companions = sorted(path.name for path in stage.iterdir() if path.name != target.name)
        ours = set(_data_files(target))  # of the same name, they are of the same content: nothing would be lost
        foreign = [target.parent / name for name in companions if target.parent / name not in ours]
        _refuse_taken([*foreign, target], overwrite=overwrite)
        for name in companions:
            (stage / name).replace(target.parent / name)
        if companions:
            _flush_folder(target.parent)  # a disk may keep the second of two renames and lose the first
        (stage / target.name).replace(target)
        _flush_folder(target.parent)
        for path in sorted(ours - {target.parent / name for name in companions}):
            path.unlink()
            say(f"removed {one_line(path.name)}: weights that {one_line(target.name)} does not use")

    with (
        _translated(target),
        _claimed(target, inputs, overwrite=overwrite, needs=needs, say=say, publish=publish) as stage,
    ):
        if _absolute(target).is_dir():
            raise OutputFailed(f"{target} is a folder; name a file")
        yield stage


def data_name(target: str, digest: str) -> str:
    """The name of a file of weights that belongs to `target` alone and has this hash: `<target>.<16 digits>.data`.

    Killed at any moment, a run leaves a graph that knows its own weights only. Not the target's stem:
    `model.onnx` and `model.ort` beside it would share, and remove, one file.
    """
    return f"{_stem(target)}.{digest[:DIGITS]}.data"


def _data_files(target: Path) -> list[Path]:
    ours = re.compile(re.escape(_stem(target.name)) + rf"\.[0-9a-f]{{{DIGITS}}}\.data")
    return [path for path in target.parent.iterdir() if ours.fullmatch(path.name) and not path.is_symlink()]


def _absolute(target: Path) -> Path:
    """Absolute, with the parent resolved: the final component is never followed."""
    if target.name in ("", ".."):
        raise OutputFailed(f"{target} cannot be written to: name a file or folder in it")
    return _real(target.parent) / target.name


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises RuntimeError where links go round in a circle


@contextlib.contextmanager
def _claimed(
    target: Path,
    inputs: Iterable[Path],
    *,
    overwrite: bool,
    needs: int,
    say: Say,
    publish: Callable[[Path, Path], None],
) -> Iterator[Path]:
    """Check the target, take its lock, clean up after dead runs, lend out an empty stage, and publish it."""
    target = _absolute(target)
    _check_place(target, inputs, needs)
    _refuse_taken([target], overwrite=overwrite)
    with contextlib.ExitStack() as to_the_end, _locked(target):
        _remove_orphans(target, say)
        _refuse_taken([target], overwrite=overwrite)  # again: an output that was set aside may be back
        stage = target.parent / _beside(target, f"{os.getpid()}.partial")
        try:
            stage.mkdir()
            yield stage
            _flush(stage)
            to_the_end.enter_context(_undisturbed())
            publish(stage, target)
            finished.append(target)
        finally:
            with _undisturbed():
                shutil.rmtree(stage, ignore_errors=True)


def _check_place(target: Path, inputs: Iterable[Path], needs: int) -> None:
    if len(os.fsencode(target.name)) > LONGEST_NAME:
        raise OutputFailed(f"the output's name is longer than {LONGEST_NAME} bytes")
    if not target.parent.is_dir():
        if target.parent.exists():
            raise OutputFailed(f"{target.parent} is not a folder, so nothing can be written into it")
        raise OutputFailed(f"the folder {target.parent} does not exist; create it first")
    for path in inputs:
        _refuse_overlap(target, _real(path))
    free = shutil.disk_usage(target.parent).free
    if needs > free:
        raise OutputFailed(f"{target.parent} has {free / 1e9:.2f} GB free, the output needs {needs / 1e9:.2f} GB")


@contextlib.contextmanager
def _translated(target: Path) -> Iterator[None]:
    """Failures of the file system, told as what they are for the user: this output could not be written."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise OutputFailed(f"{target} could not be written: {error.strerror or error}{where}") from error


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait for the block's end: it is short, and cut in two it would leave something behind."""
    waiting: list[int] = []

    def wait(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the handler's signature
        waiting.append(number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # no other thread may, or is interrupted
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, wait)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for number in waiting[:1]:
            signal.raise_signal(number)


def _refuse_overlap(target: Path, source: Path) -> None:
    # By what files and folders are, not by their names alone: a file system may take BASE for base, or show base twice.
    if target.exists() and target.samefile(source):
        raise OutputFailed(f"the output {target} is the input {source}")
    if source.is_dir() and any(folder.samefile(source) for folder in target.parents):
        raise OutputFailed(f"the output {target} lies inside the input {source}")
    links = (_real(path) for path in source.rglob("*") if path.is_symlink())  # nothing, where it is a file
    for path in (source, *links):
        if path.is_relative_to(target) or _is_within(path, target):
            raise OutputFailed(f"the input {path} lies inside the output {target}, which would be replaced")


def _is_within(path: Path, folder: Path) -> bool:
    return folder.is_dir() and any(parent.exists() and parent.samefile(folder) for parent in path.parents)


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
    present = {
        path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_symlink() or not path.is_dir()
    }
    foreign = sorted(present - known)
    if foreign:
        raise OutputFailed(
            f"{target} holds files that lora-export did not write, and will not delete: {', '.join(foreign[:10])}"
        )


def _beside(target: Path, suffix: str) -> str:
    """A hidden name for something that belongs to the target."""
    return f".{_stem(target.name)}.{suffix}"


def _stem(name: str) -> str:
    """A name to which a suffix can be added; long ones go by their hash."""
    encoded = os.fsencode(name)
    # The hash decides by the target alone, so that one run finds what another left.
    return name if len(encoded) + LONGEST_SUFFIX <= LONGEST_NAME else hashlib.sha256(encoded).hexdigest()


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold the target's lock; a second run ends at once. The kernel frees the lock of a killed run."""
    path = target.parent / _beside(target, "lock")
    descriptor = None
    try:
        with _undisturbed():
            descriptor = _take(path, target)
        yield
    finally:
        if descriptor is not None:
            with _undisturbed():
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
        except OSError:  # a file system without locks
            path.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        if os.fstat(descriptor).st_nlink:
            with contextlib.suppress(OSError):  # on a full disk; the lock holds without a signature
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            return descriptor
        # Between our open and our lock its owner finished and removed it: what we hold has no name any more.
        os.close(descriptor)


def _remove_orphans(target: Path, say: Say) -> None:
    # The whole name is compared: the target `out` must not meddle with a live run that writes `out.v2`.
    ours = re.compile(re.escape(_beside(target, "")) + r"\d+\.(partial|old)")
    left = [path for path in target.parent.iterdir() if ours.fullmatch(path.name)]
    stages = {path for path in left if path.suffix == ".partial"}
    for aside in sorted(set(left) - stages):
        stage = aside.with_suffix(".partial")
        if not target.exists():
            aside.rename(target)
            say(f"put {one_line(target.name)} back, which a run that was killed had set aside")
        elif stage not in stages:  # it has become the target, so this one has been replaced
            aside.rename(stage)
            stages.add(stage)
        else:  # what is the target now is none of that run's
            former = one_line(target.name)
            say(
                f"{one_line(str(aside))} is a former {former}, set aside by a run that was killed: keep it or delete it"
            )
            stages.remove(stage)
    for stage in sorted(stages):
        shutil.rmtree(stage)
        say(f"removed {one_line(stage.name)}, which a run that was killed had left behind")


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
        try:
            stage.rename(target)
        except OSError:
            aside.rename(target)
            raise
        aside.rename(stage)  # from here on it may be removed, by us or by the next run
    _flush_folder(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step. False where the system cannot (no Linux, or an old file system)."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    result: int = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE))
    return result == 0
