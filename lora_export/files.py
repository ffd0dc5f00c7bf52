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
import signal
import stat
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any, BinaryIO, Protocol

from xxhash import xxh3_128

from lora_export.errors import InputRefused, OutputFailed, one_line

MANIFEST = "lora_export.json"

# XXH3 (https://xxhash.com) sees every accident, at the speed of memory. SHA-256 is what sha256sum and model hubs
# show, and what a signature should stand on; on a large model it costs more than the merge.
HASHES: dict[str, Callable[[], Hash]] = {"xxh3_128": xxh3_128, "sha256": hashlib.sha256}
MAX_JSON = 100_000_000  # bytes; the index of the largest models has a tenth
MAX_OBJECTS = 250_000  # in one file; a header has one for each tensor, and each takes a hundred times its bytes here
MAX_DEPTH = 100  # of objects and lists in each other; what walks through them later may recurse
LONGEST_NAME = 255  # bytes, on every file system that matters here
LONGEST_SUFFIX = 32  # bytes; what `_beside` and `data_name` add
DIGITS = 16  # of a content's hash, in the name of a data file
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # <fcntl.h>, <linux/fs.h>

Say = Callable[[str], None]


class Hash(Protocol):
    """What hashlib and xxhash have in common."""

    def update(self, data: Any, /) -> None: ...
    def hexdigest(self) -> str: ...


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
            say(f"removed {shown(path.name)}: weights that {shown(target.name)} does not use")

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


def shown(name: str | Path) -> str:
    """A name within a line of text."""
    return one_line(str(name))


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
            say(f"put {shown(target.name)} back, which a run that was killed had set aside")
        elif stage not in stages:  # it has become the target, so this one has been replaced
            aside.rename(stage)
            stages.add(stage)
        else:  # what is the target now is none of that run's
            former = shown(target.name)
            say(f"{shown(aside)} is a former {former}, set aside by a run that was killed: keep it or delete it")
            stages.remove(stage)
    for stage in sorted(stages):
        shutil.rmtree(stage)
        say(f"removed {shown(stage.name)}, which a run that was killed had left behind")


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


def hash_of(path: Path, name: str) -> str:
    """The hash of a file's bytes, by one of HASHES, as hex."""
    value = HASHES[name]()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            value.update(part)
    return value.hexdigest()


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, as hex."""
    return hash_of(path, "sha256")


def write_manifest(
    folder: Path, facts: Mapping[str, Any], hashes: Mapping[str, Mapping[str, str]] = MappingProxyType({})
) -> None:
    """Record where a folder's contents came from, and what each file holds. Written last.

    `hashes` has, by file, those that are known already ({"sha256": "ba78..."}); the other files are read.
    """
    contents = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            contents[name] = {"bytes": path.stat().st_size, **(hashes.get(name) or {"sha256": sha256(path)})}
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


def damage(folder: Path) -> list[str]:
    """What in a folder is not as its manifest says; reads every file that it names.

    Raises InputRefused where there is no manifest, or one that records no hashes that we know.
    """
    recorded = read_manifest(folder).get("files")
    if not recorded:
        raise InputRefused(f"{folder} has no {MANIFEST} to compare it with")
    found = []
    for name, facts in recorded.items():
        known = [key for key in HASHES if isinstance(facts, dict) and key in facts]
        if not known:
            raise InputRefused(f"{folder / MANIFEST} records no hash of {name} that this version knows")
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is not there")
        elif path.stat().st_size != facts.get("bytes"):
            found.append(f"{name} has {path.stat().st_size} bytes, {facts.get('bytes')} were written")
        elif any(hash_of(path, key) != facts[key] for key in known):
            found.append(f"{name} holds other bytes than were written")
    return found


def parse_json(text: bytes, source: Path | str, *, most: int = MAX_OBJECTS) -> dict[str, Any]:
    """A JSON object from a file that nobody vouches for.

    Raises InputRefused, naming `source`, for what is not JSON, not an object, nested deeply, of more than `most`
    objects, or names a key twice (Python would silently take the last one).
    """
    objects = itertools.count(1)

    def without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if next(objects) > most:
            raise InputRefused(f"{source} holds more than {most:,} objects, which no such file needs")
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


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_flat(value: Any) -> bool:
    return isinstance(value, dict) and not any(isinstance(inner, dict | list) for inner in value.values())


_ACTED_UPON: dict[str, tuple[Callable[[Any], bool], str]] = {
    "architectures": (_are_names, "a list of names"),
    "id2label": (_is_flat, "a table of names"),
    "label2id": (_is_flat, "a table of numbers"),
    "problem_type": (lambda value: isinstance(value, str), "a name"),
}


def read_model_config(path: Path) -> dict[str, Any]:
    """A model's `config.json`. Raises InputRefused where a field that is acted upon is not what transformers writes."""
    config = read_json(path)
    for field, (fits, what) in _ACTED_UPON.items():
        if config.get(field) is not None and not fits(config[field]):
            raise InputRefused(f"{path}: {field} is {config[field]!r}; it must be {what}")
    return config


def must_exist(path: Path, what: str) -> None:
    """Raises InputRefused where there is nothing at an input's path, or it cannot be looked at."""
    try:
        path.stat()
    except FileNotFoundError:
        raise InputRefused(f"there is no {what} at {path}") from None
    except OSError as error:
        raise InputRefused(f"{path}: {error.strerror}") from error


def must_be_regular(path: Path) -> None:
    """Raises InputRefused as `open_regular` does: for a file that a library is going to open by its name."""
    open_regular(path).close()


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
