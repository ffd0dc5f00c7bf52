"""Outputs that are either whole or absent.

Everything is written into a stage: a hidden folder beside the target, on the same file system. Missing folders above
it are created first. Only when the work has succeeded are the stage's files flushed to the disk and renamed into
place. On any other way out, Ctrl-C and SIGTERM included, the stage and the new folders are removed. The next run on the
same target removes the stage of a run that was killed: a stage without a lock belongs to no live run.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import filecmp
import hashlib
import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Required, TypedDict, Unpack

from lora_export.callbacks import OnMessage, ignore
from lora_export.errors import OutputFailed, first_of, one_line
from lora_export.options.spelling import named
from lora_export.storage.input_files import contains
from lora_export.storage.manifest import OF_THE_OUTPUT, SIGNATURE, SIGNATURE_SUFFIX, read_manifest
from lora_export.storage.output_lock import output_lock
from lora_export.storage.publication import announce, staged_files
from lora_export.storage.store_path import StorePath
from lora_export.storage.system_calls import c_function, deferred_signals

if TYPE_CHECKING:
    from lora_export.options.common import Output

LONGEST_NAME = 255  # bytes, on every file system that matters here
LONGEST_SUFFIX = 32  # bytes; what `_hidden_name` and `data_name` add
DIGITS = 16  # of a content's hash, in the name of a data file
MOST_LISTED = 10  # foreign files that a message names
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # <fcntl.h>, <linux/fs.h>
_CANNOT_FLUSH = {errno.EBADF, errno.EINVAL}  # systems that flush no folder, or nothing that was opened for reading


_expected: dict[Path, int] = {}  # the stages that this process fills, and how many bytes each will have
_signed_alone: dict[Path, list[Path]] = {}  # stage -> what is in it to be signed, and not to be published
published: list[Path] = []  # by this process; after a later Ctrl-C, the message names the last one


class Staging(TypedDict, total=False):
    """How an output is made. See `stage_folder` and `stage_file`."""

    inputs: Required[Iterable[Path]]  # an output is none of them, and not inside of one
    overwrite: bool  # replace an existing target
    required_bytes: int  # that the block will write
    on_message: OnMessage  # receives a line for each leftover of a run that was killed
    sign: str | Path | None  # the key of a signature of the output (`signature.signer`)
    streamed: bool  # it needs no disk where the target is in a store (see `store_output`), unless it replaces a file


def staged(
    options: Output,
    target: Path,
    inputs: Iterable[Path],
    size: int = 0,
    *,
    is_file: bool = False,
    sign: str | Path | None = None,
    streamed: bool = True,
) -> AbstractContextManager[Path]:
    """The stage of what a command writes, `size` bytes, as `stage_file` or `stage_folder` yield it.

    Not `streamed` is what a library writes, or reads before it is published, by the name of a file on the disk.
    """
    return _stage(
        target,
        not is_file,
        inputs=inputs,
        overwrite=options.overwrite,
        required_bytes=size,
        on_message=options.on_message,
        sign=sign,
        streamed=streamed,
    )


def sign_alone(stage: Path, path: Path) -> None:
    """Let a file or folder of a stage be signed with the output and then removed: the target's folder has the same."""
    _signed_alone.setdefault(stage, []).append(path)


def remove(path: Path) -> None:
    """Remove a file, or a folder with what is in it. Nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def stage_folder(target: Path, **options: Unpack[Staging]) -> AbstractContextManager[Path]:
    """Yield an empty folder that becomes `target` when the block succeeds, and is removed when it does not.

    An existing target is replaced in one step: only with `overwrite`, and only if it is an output of this program with
    nothing else in it. Raises OutputFailed before anything is written, or when writing fails.
    """
    return _stage(target, True, **options)


def stage_file(target: Path, **options: Unpack[Staging]) -> AbstractContextManager[Path]:
    """Yield an empty folder; when the block succeeds, the files in it are moved beside `target`.

    One of them must have the target's name. It is moved last, so that its companions exist where it exists. No
    two files are renamed in one step. So a companion that the target cannot do without needs a name that no other
    content has: `data_name`. Killed between the renames, the run leaves the old target with its old data. Data files
    of former contents are removed after the target is in place, but for those that another graph of the folder names.
    Otherwise as `stage_folder`.
    """
    return _stage(target, False, **options)


def _signer(key: str | Path, target: Path) -> Callable[[Path, Path], None]:
    from lora_export.storage.signature import signer  # few outputs are signed

    return signer(key, target)


@contextlib.contextmanager
def _stage(
    target: Path,
    is_folder: bool,
    *,
    inputs: Iterable[Path],
    overwrite: bool = False,
    required_bytes: int = 0,
    on_message: OnMessage = ignore,
    sign: str | Path | None = None,
    streamed: bool = False,
) -> Iterator[Path]:
    """Check the target, take its lock, remove what dead runs left, yield an empty stage, and publish it."""
    if isinstance(target, StorePath):
        if sign is not None:
            raise OutputFailed(f"{target}: {named('sign', sign)} signs files on the disk. Write there, sign, and copy")
        if streamed and overwrite and target.newly().is_file():  # which stays until the new one is whole
            on_message(f"{target}: made in TMPDIR and then uploaded, because it replaces a file")
            streamed = False
        from lora_export.storage.store_output import staged_in_store  # most outputs are on the disk

        with staged_in_store(
            target, is_folder=is_folder, streamed=streamed, overwrite=overwrite, on_message=on_message
        ) as stage:
            if not streamed:
                refuse_lack_of_space(stage, required_bytes)
            yield stage
        published.append(target)
        return
    with _file_errors(target), contextlib.ExitStack() as to_the_end:
        given, target = target, _absolute(target)
        _check_target(target, inputs, required_bytes)
        _refuse_taken(target, overwrite=overwrite)
        with _folder(target.parent), output_lock(target.parent / _hidden_name(target, "lock"), target):
            _remove_orphans(target, on_message)
            _refuse_taken(target, overwrite=overwrite)  # again: an output that was set aside may be back
            stage = target.parent / _hidden_name(target, f"{os.getpid()}.partial")
            try:
                stage.mkdir()
                _expected[stage] = required_bytes
                if is_folder:
                    refuse_foreign_files(target)
                elif target.is_dir():
                    raise OutputFailed(f"{given} is a folder; name a file")
                sign_files = None if sign is None else _signer(sign, given)
                yield stage
                if sign_files is not None:
                    sign_files(stage, stage / (SIGNATURE if is_folder else f"{target.name}{SIGNATURE_SUFFIX}"))
                    for path in _signed_alone.get(stage, ()):
                        remove(path)
                _flush(stage)
                announce({target: stage} if is_folder else staged_files(stage, target.parent))  # may read all of it
                to_the_end.enter_context(deferred_signals())
                _refuse_taken(target, overwrite=overwrite)  # again: another process may have created it meanwhile
                if is_folder:
                    refuse_foreign_files(target)
                    _swap_in(stage, target)
                else:
                    _publish_files(stage, target, on_message, overwrite=overwrite)
                published.append(target)
            finally:
                _expected.pop(stage, None)
                _signed_alone.pop(stage, None)
                with deferred_signals():
                    shutil.rmtree(stage, ignore_errors=True)


def _publish_files(stage: Path, target: Path, on_message: OnMessage, *, overwrite: bool) -> None:
    """Move the files of a stage beside the target, and remove the data files that it no longer uses."""
    companions = sorted(path.name for path in stage.iterdir() if path.name != target.name)
    stems = "|".join(re.escape(_stem(name)) for name in (target.name, *companions))
    data = re.compile(rf"({stems})\.[0-9a-f]{{{DIGITS}}}\.data")
    beside = [path for path in target.parent.iterdir() if data.fullmatch(path.name)]
    former = {path for path in beside if not path.is_symlink()}  # one of the same name has the same content
    foreign = [name for name in companions if target.parent / name not in former]
    equal = [] if overwrite else _equal_companions(stage, target.parent, foreign)
    for name in equal:
        on_message(f"{one_line(name)} exists already, with the same contents")
    for name in (name for name in companions if name not in equal):
        (stage / name).replace(target.parent / name)
    if companions:
        _flush_folder(target.parent)  # a disk may keep the second of two renames and lose the first
    (stage / target.name).replace(target)
    _flush_folder(target.parent)
    for path in sorted(former - {target.parent / name for name in companions}):
        what = f"{one_line(path.name)}: weights that {one_line(target.name)} does not use"
        if other := _graph_that_names(path):
            on_message(f"left {what}, and {one_line(other.name)} does")
            continue
        path.unlink()
        on_message(f"removed {what}")


def _graph_that_names(data: Path) -> Path | None:
    """A graph that shares a file of weights beside it with the graph for which it was written (`share_with`).

    It may be in the stage of another run, which will publish it.
    """
    found = (sorted(data.parent.glob(pattern)) for pattern in ("*.onnx", ".*.partial/*.onnx"))
    graphs = (path for path in itertools.chain.from_iterable(found) if path.is_file())
    return next((path for path in graphs if contains(path, os.fsencode(data.name))), None)


def _equal_companions(stage: Path, folder: Path, names: Iterable[str]) -> list[str]:
    """The files of the stage that the folder has already. Raises OutputFailed where a file there is another one."""
    equal = []
    for name in names:
        path = folder / name
        if not path.is_symlink() and path.is_file() and filecmp.cmp(stage / name, path, shallow=False):
            equal.append(name)
        elif path.is_symlink() or path.exists():
            raise other_contents(path)
    return equal


def other_contents(path: Path) -> OutputFailed:
    """What is raised for a file beside an output that is there already, and is another one."""
    return OutputFailed(
        f"{path} exists already, with other contents, and may belong to another output. Give the adapter "
        f"another name ({named('adapters', 'NAME=ADAPTER')}), choose another folder, or add "
        f"{named('overwrite', True)} to replace the file"
    )


def data_name(target: str, digest: str) -> str:
    """The name of a file of weights that belongs to `target` alone and has this hash: `<target>.<16 digits>.data`.

    Killed at any moment, a run leaves a graph that refers to its own weights only. The name begins with the whole
    target, not its stem: `model.onnx` and `model.ort` in one folder would share, and remove, one file.
    """
    return f"{_stem(target)}.{digest[:DIGITS]}.data"


def _absolute(target: Path) -> Path:
    """Absolute, with the parent resolved. The final component is never followed."""
    if target.name in ("", ".."):
        raise OutputFailed(f"{target} cannot be written to: name a file or folder in it")
    # Path.resolve raises RuntimeError for links that form a circle.
    return Path(os.path.realpath(target.parent), target.name)


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[None]:
    """Create a folder with those above it for the block, and remove again what is empty where the block fails."""
    created: list[Path] = []
    try:
        for folder in reversed([path, *path.parents]):
            with deferred_signals():
                if not folder.is_dir():
                    folder.mkdir()
                    created.append(folder)
        yield
        for folder in created:
            _flush_folder(folder.parent)
    except BaseException:
        with deferred_signals():
            for folder in reversed(created):
                with contextlib.suppress(OSError):  # another run has put something into it
                    folder.rmdir()
        raise


@contextlib.contextmanager
def _file_errors(target: Path) -> Iterator[None]:
    """Turn a failure of the file system into OutputFailed, which names the output."""
    try:
        yield
    except OSError as error:
        where = _without_stage(error.filename, target) if error.filename else ""
        raise OutputFailed(
            f"{target} could not be written: {error.strerror or error}{where and f' ({where})'}"
        ) from error


def _without_stage(filename: str | bytes, target: Path) -> str:
    """The file that an error is about; within a stage by its name there, or none for what no user knows."""
    path = Path(os.fsdecode(filename))
    stages = [folder for folder in (path, *path.parents) if _is_beside(folder, target, "partial")]
    if path in stages or path.name == _hidden_name(target, "lock"):
        return ""
    return str(path.relative_to(stages[0]) if stages else path)


def _is_beside(path: Path, target: Path, suffixes: str) -> re.Match[str] | None:
    """The suffix as the first group, where a name is that of a run's stage of the target, or of what it set aside."""
    return re.fullmatch(re.escape(_hidden_name(target, "")) + rf"\d+\.({suffixes})", path.name)


# --- targets that are refused -------------------------------------------------------------------


def byte_size(count: int) -> str:
    """A number of bytes with three digits and a unit: `100 KB`, `1.5 GB`."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= size:
            return f"{count / size:,.0f} {unit}" if count >= 100 * size else f"{count / size:.3g} {unit}"
    return f"{count} bytes"


def _check_target(target: Path, inputs: Iterable[Path], required_bytes: int) -> None:
    if len(os.fsencode(target.name)) > LONGEST_NAME:
        raise OutputFailed(f"the output's name is longer than {LONGEST_NAME} bytes")
    above = next(folder for folder in target.parents if os.path.lexists(folder))
    if not above.is_dir():
        raise OutputFailed(f"{above} is not a folder, so nothing can be written into it")
    for path in inputs:
        if not isinstance(path, StorePath):
            _refuse_overlap(target, Path(os.path.realpath(path)))
    refuse_lack_of_space(above, required_bytes, beside=_still_to_come(above) if required_bytes else 0)


def refuse_lack_of_space(folder: Path, required_bytes: int, *, beside: int = 0) -> None:
    """Raise OutputFailed where the disk of a folder has less space. Other outputs will take the bytes `beside`."""
    if isinstance(folder, StorePath):
        return
    free = shutil.disk_usage(folder).free
    if required_bytes + beside > free:
        others = f" beside {byte_size(beside)} of other outputs that are being written" if beside else ""
        raise OutputFailed(f"{folder} has {byte_size(free)} free, {byte_size(required_bytes)} needed{others}")


def _still_to_come(folder: Path) -> int:
    """The bytes that other outputs of this process will have on the disk of a folder, and have not yet."""
    found, device = 0, folder.stat().st_dev
    for stage, expected in list(_expected.items()):
        with contextlib.suppress(OSError):  # it was published meanwhile
            if stage.stat().st_dev == device:
                written = sum(path.stat().st_size for path in stage.rglob("*") if path.is_file())
                found += max(0, expected - written)
    return found


def _refuse_overlap(target: Path, source: Path) -> None:
    # Files and folders are compared, not their names: a file system may take BASE for base, or show base twice.
    if target.exists() and target.samefile(source):
        raise OutputFailed(f"the output {target} is the input {source}")
    if source.is_dir() and any(folder.samefile(source) for folder in target.parents if folder.exists()):
        raise OutputFailed(f"the output {target} is inside the input {source}")
    links = (
        Path(os.path.realpath(path)) for path in source.rglob("*") if path.is_symlink()
    )  # none, where the source is a file
    for path in (source, *links):
        above = path.parents if target.is_dir() else ()
        if path.is_relative_to(target) or any(folder.exists() and folder.samefile(target) for folder in above):
            raise OutputFailed(f"the input {path} is inside the output {target}, which would be replaced")


def _refuse_taken(target: Path, *, overwrite: bool) -> None:
    if target.is_symlink():
        raise OutputFailed(f"{target} is a symbolic link; name the file or folder that it refers to")
    if target.exists() and not overwrite:
        raise OutputFailed(f"{target} exists already; add {named('overwrite', True)} to replace it")


def refuse_foreign_files(target: Path) -> None:
    """Raise OutputFailed where a folder that is to be replaced has files that its manifest does not name."""
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputFailed(f"{target} is a file; the output is a folder")
    known = {*OF_THE_OUTPUT, *read_manifest(target).get("files", {})}
    present = {
        path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_symlink() or not path.is_dir()
    }
    foreign = sorted(present - known)
    if foreign:
        raise OutputFailed(
            f"{target} contains files that no record of lora-export names, so it does not delete them. Remove them, or "
            f"choose another output: {first_of(foreign, MOST_LISTED)}"
        )


# --- names beside the target --------------------------------------------------------------------


def _hidden_name(target: Path, suffix: str) -> str:
    """A hidden name for something that belongs to the target."""
    return f".{_stem(target.name)}.{suffix}"


def _stem(name: str) -> str:
    """A name to which a suffix can be added. A long name is replaced by its hash."""
    encoded = os.fsencode(name)
    # The hash depends on the target alone, so that one run finds what another left.
    return name if len(encoded) + LONGEST_SUFFIX <= LONGEST_NAME else hashlib.sha256(encoded).hexdigest()


def _remove_orphans(target: Path, on_message: OnMessage) -> None:
    """Remove what killed runs left beside the target, and put back an old output that has no successor."""
    # The whole name is compared: the target `out` must not touch a live run that writes `out.v2`.
    beside = ((path, _is_beside(path, target, "partial|old")) for path in target.parent.iterdir())
    left = {path: found[1] for path, found in beside if found}
    stages = {path for path, state in left.items() if state == "partial"}
    for aside in sorted(left.keys() - stages):
        stage = aside.with_suffix(".partial")
        if not target.exists():
            aside.rename(target)
            on_message(f"put {one_line(target.name)} back, which a run that was killed had set aside")
        elif stage not in stages:  # the stage has become the target, so this old output has been replaced
            aside.rename(stage)
            stages.add(stage)
        else:  # neither is the target now
            name = one_line(target.name)
            on_message(
                f"{one_line(str(aside))} is a former {name}, set aside by a run that was killed: keep it or delete it"
            )
            stages.remove(stage)
    for stage in sorted(stages):
        shutil.rmtree(stage)
        on_message(f"removed {one_line(stage.name)}, which a run that was killed had left behind")


# --- flushing and renaming ----------------------------------------------------------------------


def _flush(folder: Path) -> None:
    """Write everything in a folder to the disk, so that no power cut leaves a name without its contents."""
    for path in (*folder.rglob("*"), folder):
        (_flush_folder if path.is_dir() else _flush_file)(path)


def _flush_file(path: Path) -> None:
    try:
        _fsync(path, os.O_RDONLY)
    except OSError as error:
        if error.errno not in _CANNOT_FLUSH:
            raise
        _fsync(path, os.O_RDWR)  # Windows flushes only what was opened for writing


def _flush_folder(folder: Path) -> None:
    """Write a folder's names to the disk, where the system can. Windows cannot, and need not: NTFS has a journal."""
    directory = getattr(os, "O_DIRECTORY", None)
    if directory is None:
        return
    try:
        _fsync(folder, os.O_RDONLY | directory)
    except OSError as error:
        if error.errno not in _CANNOT_FLUSH:
            raise


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap_in(stage: Path, target: Path) -> None:
    """Make the stage the target. The old target, if any, is at the stage's path afterwards."""
    if not target.exists():
        stage.rename(target)
    elif not _exchange(stage, target):
        aside = stage.with_suffix(".old")  # not `.partial`: if this run is killed here, it is the only whole output
        target.rename(aside)
        try:
            stage.rename(target)
        except OSError:
            aside.rename(target)
            raise
        aside.rename(stage)  # from here on, this run or the next may remove it
    _flush_folder(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step. Returns False where the system or the file system cannot."""
    renameat2 = c_function("renameat2")  # Linux
    if renameat2 is None:
        return False
    result: int = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE))
    return result == 0
