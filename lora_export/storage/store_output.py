"""Outputs in a store, which has no rename: an object beside the output exists until all of it is there.

That object, `.NAME.begun`, is put only where there is none, so it is the lock too. It names the owner, which renews it,
and the files that are whole. Readers refuse an output beside which it is (`store_path.newly_opened`). The manifest is
the last object that is put, and only where there is none: that of a run that lost the output comes too late, or is
replaced by the run that has it. A run that slept for longer than its lease may have lost the output: it renews the
lease before it changes an object, and once more when its manifest is there. After
an error everything is removed; a run that was stopped, or whose store failed, leaves its whole files, and the next one
goes on.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Container, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from lora_export.callbacks import OnMessage
from lora_export.errors import EnvironmentLacking, InputRefused, OutputFailed, count_that_are
from lora_export.options.spelling import named
from lora_export.storage import json_files
from lora_export.storage.manifest import MANIFEST, is_recorded, read_manifest
from lora_export.storage.object_store import DEADLINE, Fence, ObjectChanged, ObjectInfo
from lora_export.storage.publication import announce, staged_files
from lora_export.storage.store_path import StorePath, is_begun, marker_of
from lora_export.storage.system_calls import deferred_signals

READS = 5  # of an object that changes meanwhile
RENEWED, LEASE = 30, timedelta(minutes=5)  # seconds between signs of life; how long the last one counts
# Seconds in which the object that a run has emptied is still that run's, which deletes it within half of them
TIME_TO_DELETE = 10
# Seconds for which the last one is proof enough: a request that begins then ends, by its deadline, within the lease
TRUSTED = 2 * RENEWED
assert timedelta(seconds=TRUSTED) + DEADLINE < LEASE


class Begun:
    """The object beside an output that is being written. It belongs to this process until it is deleted."""

    def __init__(self, target: StorePath, home: StorePath, on_message: OnMessage, *, streamed: bool):
        self.target, self._object = target, marker_of(target).newly()
        self.home = home
        self.run = uuid.uuid4().hex  # names this run for its workers
        self.used: set[str] = set()  # the whole files that belong to this output
        self.streamed, self.uploaded = streamed, list[StorePath]()
        self.sealed: dict[str, str | None] | None = None  # the ETags of all files, by name, when the last one is put
        self._lock, self._ended, self._lost, self._renewed = threading.RLock(), threading.Event(), False, 0.0
        info, stated = _stated(self._object)
        until = time.monotonic() + TIME_TO_DELETE
        while info and not info.size and time.monotonic() < until:
            time.sleep(TIME_TO_DELETE / 100)
            info, stated = _stated(self._object)
        if info and _is_alive(stated, datetime.now(UTC) - info.modified):
            raise self._taken(stated)
        self._version: dict[str, str] = {}
        for key in [key for key in target.bucket.put_here if key.startswith(f"{target.key}/")]:
            del target.bucket.put_here[key]  # of an output that was here before
        self.finished: dict[str, Any] = stated.get("finished", {}) if info else {}
        self.is_resumed = info is not None and info.size > 0  # an empty one is of a run that ended
        if info is None or info.e_tag:
            self._write("create" if info is None else info.version)
        if "e_tag" not in self._version:  # nothing tells whose object it is
            if info is None:
                self._object.unlink()
            raise OutputFailed(
                f"{target}: the store gives no ETags, so two runs could write one output. Write to a disk, and copy it"
            )
        if info:
            on_message(f"{target}: {count_that_are(len(self.finished), 'file')} whole, from a run that was stopped")
        threading.Thread(target=self._renew, daemon=True).start()

    def _taken(self, stated: dict[str, Any]) -> OutputFailed:
        owner = f" (process {stated['process']} on {stated['host']})" if {"process", "host"} <= stated.keys() else ""
        return OutputFailed(f"another run{owner} is writing {self.target}")

    def _write(self, mode: Any = None, *, is_stopped: bool = False, is_ended: bool = False) -> None:
        """Put the object, where it is still the one that this process put. Raises OutputFailed where it is not."""
        owner = {} if is_stopped else {"process": os.getpid(), "host": platform.node(), "run": self.run}
        with self._lock:
            now, bucket, key = time.time(), self._object.bucket, self._object.key
            try:
                sealed = {} if is_stopped or self.sealed is None else {"sealed": self.sealed}
                stated = {**owner, "finished": self.finished, **sealed}
                content = b"" if is_ended else json.dumps(stated).encode()
                bucket.put_once(key, content, self._version if mode is None else mode)
            except ObjectChanged:
                self._lost = True
                raise self._taken({}) from None
            info = _info(self._object)
            assert info is not None
            self._version, self._renewed = info.version, now  # by the clock that goes on in a machine that sleeps

    def _renew(self) -> None:
        while not self._ended.wait(RENEWED):
            # The next write of the main thread reports an error.
            with self._lock, contextlib.suppress(OutputFailed, EnvironmentLacking):
                if not self._ended.is_set():
                    self._write()

    def name_of(self, path: Path) -> str:
        """The name of a file of this output, in its home."""
        return path.relative_to(self.home).as_posix()

    def whole(self, name: str, recipe: str) -> Any | None:
        """The facts of a file that an earlier run made by the same recipe, and nothing changed since.

        None where there is none. What is in its place is removed then.
        """
        found = self.finished.get(name)
        info = _info(self.home / name)
        if not isinstance(found, dict) or info is None or [recipe, info.e_tag] != [found["recipe"], found["e_tag"]]:
            self.finished.pop(name, None)
            (self.home / name).unlink()
            return None
        self.used.add(name)
        return found["facts"]

    def add(self, name: str, recipe: str, facts: Any) -> None:
        """Record that a file is whole, and what is known of it."""
        info = _info(self.home / name)
        assert info is not None
        self.finished[name] = {"recipe": recipe, "e_tag": info.e_tag, "facts": facts}
        self.used.add(name)
        self._write()

    def _written(self) -> list[StorePath]:
        """The objects of this output that are there."""
        if not self.streamed:
            return self.uploaded
        return [path for path in (self.target.newly(), *self.target.rglob("*")) if path.is_file()]

    def remove_unfinished(self) -> None:
        """Remove objects of a run that was killed, of which it did not record that they are whole."""
        for path in self._written():
            if self.name_of(path) not in self.finished:
                path.unlink()

    def refuse_lost(self) -> None:
        """Raise OutputFailed where another run has taken this output over."""
        self._write()

    def refuse_overdue(self) -> None:
        """The same, where the last renewal is so old that another run may have done that."""
        if self._lost or not 0 <= time.time() - self._renewed < TRUSTED:
            self._write()

    def _own(self) -> dict[str, str | None]:
        """The ETags of the files that this run has put in its folder, or that were whole and are used, by name."""
        below, put = f"{self.target.key}/", self.target.bucket.put_here.items()
        own = {key.removeprefix(below): e_tag for key, e_tag in put if key.startswith(below)}
        return own | {name: self.finished[name]["e_tag"] for name in self.used}

    def refuse_replaced(self) -> None:
        """Raise OutputFailed where a file is another object by now: a run that slept, or a worker, has put it."""
        self.target.newly().bucket.below(self.target.key)  # what is known of all of them, in one request
        for name, e_tag in sorted(self._own().items()):
            info = _info(self.home / name)
            if info is None or info.e_tag != e_tag:
                self.finished.pop(name, None)
                self.used.discard(name)
                raise self._replaced(name)

    def _replaced(self, name: str) -> OutputFailed:
        path = self.home / name
        return OutputFailed(f"{path} was replaced while the others were written. Run it again: the others stay")

    def seal(self, listed: Container[str]) -> None:
        """State which files the output has, and remove what else is in its folder: a run that slept has put it.

        What such a run puts from now on is unlike what is stated, and it withdraws that. `listed` are the files of the
        manifest. Raises OutputFailed where one of them is not this run's, or a file of this run was replaced.
        """
        own = self.sealed = self._own()
        self._write()
        self.refuse_replaced()
        for name in self.target.bucket.below(self.target.key).keys() - own.keys() - self.finished.keys() - {MANIFEST}:
            if name in listed:
                raise self._replaced(name)
            (self.target / name).unlink()

    def discard(self, *, is_stopped: bool) -> None:
        """Remove what is not whole; where no run is to go on with it, everything.

        Raises OutputFailed, and removes nothing, where another run has taken this output over.
        """
        self._end_renewals()
        self.refuse_overdue()
        kept = {self.home / name for name in self.finished} if is_stopped else set()
        for path in self._written():
            if path not in kept:
                path.unlink()
        self._write(is_stopped=True) if kept else self._delete()

    def end(self) -> None:
        """The output is whole. Raises OutputFailed, and deletes nothing, where another run has taken it over."""
        for name in self.finished.keys() - self.used:
            (self.home / name).unlink(missing_ok=True)
        self.leave()

    def leave(self) -> None:
        """Leave the output as it is."""
        self._end_renewals()
        self._delete()

    def _delete(self) -> None:
        """Delete the object, where it is still this run's: obstore has no condition for that, so it is emptied before.

        Raises OutputFailed where it is not. One that slept in between leaves it empty.
        """
        self._write(is_ended=True)
        if 0 <= time.time() - self._renewed < TIME_TO_DELETE / 2:
            self._object.unlink()

    def _end_renewals(self) -> None:
        with self._lock:  # one that has begun puts the object, and ends before it is deleted
            self._ended.set()


def _is_alive(stated: dict[str, Any], age: timedelta) -> bool:
    if "process" not in stated or age > LEASE:
        return False
    if stated.get("host") != platform.node() or not hasattr(os, "kill") or os.name == "nt":
        return True
    try:
        os.kill(stated["process"], 0)
    except PermissionError:
        return True  # it is another user's
    except (ProcessLookupError, TypeError, OverflowError):
        return False
    return True


_streamed: dict[Path, Begun] = {}  # by output


def begun_at(path: Path) -> Begun | None:
    """The output in a store to which a file belongs that is being written; None on the disk."""
    return next((_streamed[each] for each in (path, *path.parents) if each in _streamed), None)


def _exists(target: StorePath) -> OutputFailed:
    return OutputFailed(f"{target} exists already. Name another address, or delete what is there")


@contextlib.contextmanager
def staged_in_store(
    target: StorePath, *, is_folder: bool, streamed: bool, overwrite: bool, on_message: OnMessage
) -> Iterator[Path]:
    """Yield the folder that an output in a store is written into.

    `streamed`: that is the output's own place in the store, and nothing is on the disk. Else it is a folder on the disk
    that is uploaded when the block succeeds. Raises OutputFailed before anything is written where the output exists, or
    another run writes it.
    """
    if not target.key:
        raise OutputFailed(f"{target} is a bucket. Name a folder in it")
    if overwrite and is_folder:
        raise OutputFailed(
            f"{target}: a store replaces no output in one step. Leave {named('overwrite', True)} out and name another "
            "address, or delete what is there"
        )
    begun = None
    try:
        target.newly()
        if not overwrite and target.exists() and not is_begun(target):
            marker_of(target).unlink()  # of a run that was killed when it had emptied it
            raise _exists(target)
        home = target if is_folder else target.parent
        begun = Begun(target, home, on_message, streamed=streamed)
        if not (overwrite or begun.is_resumed) and target.newly().exists():  # a run ended between both looks
            ended, begun = begun, None
            ended.leave()
            raise _exists(target)
        begun.remove_unfinished()
        manifest = (target / MANIFEST).key
        with contextlib.ExitStack() as stack:
            stack.callback(target.bucket.held.pop, manifest, None)
            stack.enter_context(_fenced(target, target, begun.refuse_overdue))
            if streamed:
                stage: Path = home
                if is_folder:
                    target.bucket.held[manifest] = None
                _streamed[target] = begun
                stack.callback(_streamed.pop, target, None)
            else:
                import tempfile  # most outputs are on the disk, beside their stage

                stage = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lora-export-")))
            with _reads_of_own(begun) if streamed else contextlib.nullcontext():
                yield stage
            announce(
                staged_files(stage, home) if not (streamed or is_folder) else {target: target if streamed else stage}
            )
            begun.refuse_lost()
            if not streamed:
                _upload(stage, begun, overwrite=overwrite)
            begun.seal(_listed(target.bucket.held.get(manifest)))
            with deferred_signals():
                begun.refuse_overdue()
                target.bucket.release(manifest, replaces=begun.is_resumed)
                begun.end()
    except BaseException as error:
        if begun is not None:
            is_stopped = not isinstance(error, Exception) or isinstance(error, OutputFailed | EnvironmentLacking)
            with deferred_signals(), contextlib.suppress(OutputFailed, EnvironmentLacking):
                begun.discard(is_stopped=is_stopped)
        if isinstance(error, ObjectChanged):
            raise OutputFailed(f"{target}: another run has put its {MANIFEST} meanwhile") from None
        raise


@contextlib.contextmanager
def _reads_of_own(begun: Begun) -> Iterator[None]:
    """Raise OutputFailed for InputRefused where what changed is a file of the output, which is read for its hash."""
    try:
        yield
    except InputRefused:
        with contextlib.suppress(EnvironmentLacking):
            begun.refuse_replaced()
        raise


def _listed(manifest: bytes | None) -> Container[str]:
    """The files that a manifest names."""
    files: dict[str, Any] = json.loads(manifest).get("files", {}) if manifest else {}
    return files


@contextlib.contextmanager
def _fenced(path: StorePath, target: StorePath, refuse: Callable[[], None]) -> Iterator[None]:
    """Let a fence precede each change of an object of an output, and of those below it."""
    path.bucket.fences[path.key] = Fence(refuse, functools.partial(_withdraw, target))
    try:
        yield
    finally:
        path.bucket.fences.pop(path.key, None)


@contextlib.contextmanager
def written_by_worker(target: StorePath, name: str, run: str) -> Iterator[StorePath]:
    """Yield the path of a file of the output that another process has begun, whose `Begun.run` is given.

    The file changes only while that run has the output, and has no such file from another worker: a worker that was
    taken for dead changes nothing when it wakes up. Raises OutputFailed then.
    """
    path = target / name

    def refuse_late() -> None:
        _, stated = _stated(marker_of(target))
        if stated.get("run") != run or name in stated.get("finished", {}):
            raise OutputFailed(f"{path}: this worker was taken for dead, and another one has made the file")

    with _fenced(path, target, refuse_late):
        yield path.newly()


def _withdraw(target: StorePath, key: str) -> None:
    """Delete a file of an output that was put too late, unless the run that has the output has put the same.

    Until that run has stated all its files (`Begun.seal`), the file stays, and that run removes what it did not put.
    What it replaced is lost. A missing file is an error to every reader, and other bytes would be none. A single file
    stays: nothing beside it records what it was.
    """
    if key == target.key:
        return
    name, bucket = key.removeprefix(f"{target.key}/"), target.bucket
    bucket.held.pop((target / MANIFEST).key, None)  # the store's own counts
    _, stated = _stated(marker_of(target))
    info = _info((target / name).newly())  # which may be another one by now
    recorded = stated.get("finished", {}).get(name)
    if "sealed" in stated:
        is_same = info is not None and info.e_tag == stated["sealed"].get(name)
    elif recorded is not None:
        is_same = info is not None and info.e_tag == recorded["e_tag"]
    else:  # that run may still have to put its own, in place of this one
        files = read_manifest(target.newly()).get("files", {})
        is_same = bool(stated) or is_recorded(target / name, files.get(name))
    if not is_same:
        bucket.delete(key, is_late=True)


def _upload(stage: Path, begun: Begun, *, overwrite: bool) -> None:
    """Upload the files of a stage, the output's own file last. A manifest is held until all are there."""
    last = begun.target.name
    files = sorted((path for path in stage.rglob("*") if path.is_file()), key=lambda path: (path.name == last, path))
    for path in files:
        goal = begun.home.joinpath(*path.relative_to(stage).parts)
        if not overwrite and goal.newly().exists():
            raise OutputFailed(f"{goal} exists already, and may belong to another output. Name another address")
        if goal == begun.target / MANIFEST:
            goal.bucket.held[goal.key] = path.read_bytes()
            continue
        begun.refuse_overdue()
        goal.bucket.upload(goal.key, path)
        begun.uploaded.append(goal)


def _stated(mark: StorePath) -> tuple[ObjectInfo | None, dict[str, Any]]:
    """What the object beside an output states. Its run may put it again between the two requests."""
    for more in reversed(range(READS)):
        info = _info(mark.newly())
        try:
            return info, json_files.read_json(mark) if info and info.size else {}
        except InputRefused:
            if not more:
                raise
    raise AssertionError("the last try returns or raises")


def _info(path: StorePath) -> ObjectInfo | None:
    return path.bucket.info(path.key)
