"""An output in a store is whole, or is refused: one writer, the manifest last, what was stopped goes on."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING, Any

import pytest

from lora_export.errors import InputRefused, OutputFailed
from lora_export.storage import store_output
from lora_export.storage.atomic_output import stage_file, stage_folder
from lora_export.storage.manifest import MANIFEST, damage, write_manifest
from lora_export.storage.object_store import Bucket, Upload, bucket_of
from lora_export.storage.store_output import Begun, begun_at, written_by_worker
from lora_export.storage.store_path import copy_in_store, newly_opened
from support import stores

if TYPE_CHECKING:
    from support.stores import Stored

MARK = "out/.m.begun"
PARTS = stores.PART // 4 + 1  # of texts of four bytes, which make an upload in parts


def fill(stage: Path) -> None:
    """Two files and a manifest."""
    for name in ("b", "sub/a"):
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / name).write_bytes(name.encode())
    write_manifest(stage, {})


@pytest.mark.parametrize("streamed", [True, False])
def test_a_folder_is_there_when_its_manifest_is(stored: Stored, streamed: bool) -> None:
    with stage_folder(stored / "out/m", inputs=[], streamed=streamed) as stage:
        fill(stage)
        assert f"out/m/{MANIFEST}" not in stored.objects() and MARK in stored.objects()
        with pytest.raises(InputRefused, match="is not whole: a run is writing it, or was stopped"):
            newly_opened(str(stored / "out/m"))
        with pytest.raises(InputRefused, match="is not whole"):
            newly_opened(str(stored / "out/m/b"))
    assert list(stored.objects()) == ["out/m/b", f"out/m/{MANIFEST}", "out/m/sub/a"]
    assert json.loads(stored.get(f"out/m/{MANIFEST}"))["files"].keys() == {"b", "sub/a"}
    assert newly_opened(str(stored / "out/m")).is_dir()


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("is_folder", [True, False])
def test_after_an_error_nothing_is_left(stored: Stored, streamed: bool, is_folder: bool) -> None:
    stage_output = stage_folder if is_folder else stage_file
    with pytest.raises(InputRefused), stage_output(stored / "out/m", inputs=[], streamed=streamed) as stage:
        fill(stage) if is_folder else (stage / "m").write_bytes(b"1")
        raise InputRefused("too little is left")
    assert stored.objects() == {} and stored.uploads() == []


@pytest.mark.parametrize("before", [None, b"of an earlier run"])
@pytest.mark.parametrize("streamed", [True, False])
def test_what_was_put_and_answered_with_an_error_is_this_runs(
    streamed: bool, before: bytes | None, stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    if before is not None:
        stored.put("out/m", before)
    server = stores.Failing(monkeypatch, 0, seed=0)
    with stage_file(stored / "out/m", inputs=[], streamed=streamed, overwrite=before is not None) as stage:
        server.unconfirmed = f"/{stored.name}/out/m"
        (stage / "m").write_bytes(b"whole")
    assert server.unconfirmed == "" and stored.files("out") == {"m": b"whole"}
    assert (stored / "out/m").bucket.put_here["out/m"] == stored.objects()["out/m"]["ETag"]


@pytest.mark.parametrize("name", [".m.begun", f"m/{MANIFEST}"])
def test_a_put_that_is_answered_with_500_is_its_own(name: str, stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    server = stores.Failing(monkeypatch, 0, seed=0)
    server.unconfirmed = f"/{stored.name}/out/{name}"
    with stage_folder(stored / "out/m", inputs=[], streamed=True) as stage:
        (stage / "b").write_bytes(b"whole")
        write_manifest(stage, {})
    assert server.unconfirmed == "" and stored.files("out").keys() == {"m/b", f"m/{MANIFEST}"}


def test_a_second_writer_is_refused(stored: Stored) -> None:
    with stage_folder(stored / "out/m", inputs=[], streamed=True) as stage:
        fill(stage)
        with pytest.raises(OutputFailed) as refused, stage_folder(stored / "out/m", inputs=[], streamed=True):
            pass
        assert str(refused.value).startswith(f"another run (process {os.getpid()} on {platform.node()}) is writing")
    assert len(stored.objects()) == 3


def test_a_run_that_ends_while_another_begins_keeps_its_output(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    stored.put("out/m/b", b"whole")
    stored.put(MARK, begun(process=1, host="elsewhere", run="r"))
    look = store_output.is_begun

    def end(target: Path) -> bool:
        found = look(target)
        stored.delete(MARK)
        return found

    monkeypatch.setattr(store_output, "is_begun", end)
    with pytest.raises(OutputFailed, match="exists already"), stage_folder(stored / "out/m", inputs=[], streamed=True):
        pass
    assert {key: stored.get(key) for key in stored.objects()} == {"out/m/b": b"whole"}


def test_of_two_that_begin_at_once_one_is_refused(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_output, "_info", lambda _: None)  # the other's object is not there yet when it is asked
    stored.put(MARK, b"{}")
    with pytest.raises(OutputFailed, match="another run is writing"), stage_folder(stored / "out/m", inputs=[]):
        pass
    assert stored.objects().keys() == {MARK}


def begun(**facts: Any) -> bytes:
    return json.dumps({"host": platform.node(), "finished": {}, **facts}).encode()


def test_what_a_killed_run_left_is_removed_and_written_again(stored: Stored) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    stored.put(MARK, begun(process=gone.pid))
    stored.put("out/m/half", b"of a shard")
    with stage_folder(stored / "out/m", inputs=[], streamed=True) as stage:
        fill(stage)
    assert list(stored.objects()) == ["out/m/b", f"out/m/{MANIFEST}", "out/m/sub/a"]


def test_what_a_run_left_that_was_killed_at_its_end_is_whole(stored: Stored) -> None:
    with stage_folder(stored / "out/m", inputs=[], streamed=True) as stage:
        fill(stage)
    stored.put(MARK, b"")
    assert newly_opened(str(stored / "out/m")).is_dir()
    with pytest.raises(OutputFailed, match="exists already"), stage_folder(stored / "out/m", inputs=[]):
        pass
    assert list(stored.objects()) == ["out/m/b", f"out/m/{MANIFEST}", "out/m/sub/a"]


def test_a_run_on_another_machine_is_alive_until_its_lease_ends(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored.put(MARK, begun(process=1, host="elsewhere"))
    with pytest.raises(OutputFailed, match="process 1 on elsewhere"), stage_folder(stored / "out/m", inputs=[]):
        pass
    monkeypatch.setattr(store_output, "LEASE", -store_output.LEASE)
    with stage_folder(stored / "out/m", inputs=[]) as stage:
        fill(stage)
    assert MARK not in stored.objects()


@pytest.mark.parametrize("by_worker", [True, False])
def test_what_is_put_again_while_it_is_read_is_read_again(
    by_worker: bool, stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, changes = Bucket.read, list[str]()

    def renewed(bucket: Bucket, key: str, start: int, stop: int) -> memoryview:
        if key == MARK and not changes:
            changes.append(key)
            stored.put(MARK, begun(process=1, host="elsewhere", run="r", finished={"c": {}}))
        return read(bucket, key, start, stop)

    monkeypatch.setattr(Bucket, "read", renewed)
    stored.put(MARK, begun(process=1, host="elsewhere", run="r"))
    if by_worker:
        with written_by_worker(stored / "out/m", "b", "r") as path:
            path.write_bytes(b"1")
        assert stored.get("out/m/b") == b"1"
    else:
        with pytest.raises(OutputFailed, match="process 1 on elsewhere"), stage_folder(stored / "out/m", inputs=[]):
            pass
    assert changes == [MARK]


def test_a_run_that_lost_its_output_publishes_nothing(stored: Stored) -> None:
    refused = pytest.raises(OutputFailed, match="another run is writing")
    with refused, stage_folder(stored / "out/m", inputs=[], streamed=True) as stage:
        fill(stage)
        stored.put(MARK, begun(process=1, host="elsewhere"))
    assert MARK in stored.objects() and f"out/m/{MANIFEST}" not in stored.objects()


def test_a_run_that_slept_changes_nothing(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(change: Callable[[], Any]) -> None:
        with pytest.raises(OutputFailed, match="another run is writing"):
            change()

    def whole() -> None:
        with stage_folder(stored / "out/m", inputs=[], streamed=True) as stage:
            file = (stage / "b").open("xb")
            file.write(b"late")
            awake = time.time() + store_output.TRUSTED
            monkeypatch.setattr(store_output, "time", SimpleNamespace(time=lambda: awake))
            stored.put(MARK, begun(process=1, host="elsewhere"))
            stored.put("out/m/b", b"of the other")
            for change in (file.close, (stage / "b").newly().unlink, lambda: (stage / "b").write_bytes(b"late")):
                refuse(change)
            refuse(lambda: (stage / "b").write_text("late"))
            refuse(lambda: copy_in_store(stored / MARK, stored / "out/m/b"))

    refuse(whole)
    assert stored.objects().keys() == {MARK, "out/m/b"} and stored.uploads() == []
    assert stored.get("out/m/b") == b"of the other"


def test_a_run_that_slept_after_its_last_upload_puts_no_manifest(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = Bucket.upload

    def sleep_after(bucket: Bucket, key: str, path: Any) -> None:
        upload(bucket, key, path)
        if key == "out/m/sub/a":
            awake = time.time() + store_output.TRUSTED
            monkeypatch.setattr(store_output, "time", SimpleNamespace(time=lambda: awake))
            stored.put(MARK, begun(process=1, host="elsewhere"))

    monkeypatch.setattr(Bucket, "upload", sleep_after)
    refused = pytest.raises(OutputFailed, match="another run is writing")
    with refused, stage_folder(stored / "out/m", inputs=[], streamed=False) as stage:
        fill(stage)
    assert stored.objects().keys() == {MARK, "out/m/b", "out/m/sub/a"}


def test_a_run_that_slept_removes_nothing_of_the_next_one(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ["out/m/b", f"out/m/{MANIFEST}", "out/m/sub/a"]
    with (
        pytest.raises(InputRefused, match="too little"),
        stage_folder(stored / "out/m", inputs=[], streamed=True) as late,
    ):
        (late / "b").write_bytes(b"late")
        with monkeypatch.context() as meanwhile:
            meanwhile.setattr(store_output, "_is_alive", lambda *_: False)
            meanwhile.setattr(store_output, "_streamed", {})
            with stage_folder(stored / "out/m", inputs=[], streamed=True) as stage:
                fill(stage)
        assert sorted(stored.objects()) == files
        awake = time.time() + store_output.TRUSTED
        monkeypatch.setattr(store_output, "time", SimpleNamespace(time=lambda: awake))
        raise InputRefused("too little is left")
    assert sorted(stored.objects()) == files


# A process that makes the outputs of other runs, each in a copy of itself: when one has its files, and at its end.
OTHERS = f"""
import json, os, sys
import obstore
from lora_export.storage import object_store, store_output
from lora_export.storage.atomic_output import stage_file, stage_folder
from lora_export.storage.manifest import write_manifest
from lora_export.storage.store_path import place
object_store.UPLOADED_PART = {stores.PART}
store_output._is_alive = lambda *_: False
def run(kind, address, content, small):
    target = place(address)
    with (stage_folder if kind == "folder" else stage_file)(target, inputs=[], streamed=True) as stage:
        (stage / "b" if kind == "folder" else target).write_bytes(content.encode())
        if kind == "folder":
            store_output.begun_at(stage).add("b", "its recipe", {{}})
        for name in small:
            (stage / name).write_bytes(b"of the other")
        print(flush=True)
        sys.stdin.readline()
        if kind == "folder":
            write_manifest(stage, {{"by": "the other"}})
for words in map(json.loads, sys.stdin):
    if not os.fork():
        run(*words)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@functools.cache
def others() -> tuple[IO[str], IO[str]]:
    """The streams of that process. It finds the store by the environment of the first test."""
    process = subprocess.Popen([sys.executable, "-c", OTHERS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    return process.stdin, process.stdout


# where a run sleeps that has seen that it has the output, and before it changes this object; whether it streams
FROZEN = {
    "manifest": ("folder", f"out/m/{MANIFEST}", True),
    "end": ("folder", MARK, True),
    "file": ("file", "out/m", True),
    "file from the disk": ("file", "out/m", False),
}


def frozen_run(
    stored: Stored,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    frozen: str,
    content: str,
    times: int = 1,
    *,
    is_awake_before: bool,
    begins: str = "",
    small: tuple[str, ...] = (),
) -> Callable[[], int]:
    """Let this process freeze before it changes an object, once another one is there, until another run has its output.

    Returns what ends the other run, where that has not ended before, and gives its exit code.
    """
    check, codes, is_begun = Bucket.refuse_fenced, list[int](), False
    requests, answers = others()

    def end() -> None:
        print(file=requests, flush=True)
        codes.append(int(answers.readline()))

    def freeze(bucket: Bucket, key: str) -> None:
        nonlocal is_begun
        check(bucket, key)
        if key != frozen or is_begun or (begins and begins not in stored.objects()):
            return
        is_begun = True
        print(json.dumps([kind, str(stored / "out/m"), content * times, small]), file=requests, flush=True)
        assert answers.readline() == "\n"
        if not is_awake_before:
            end()
        awake = time.time() + store_output.TRUSTED
        monkeypatch.setattr(store_output, "time", SimpleNamespace(time=lambda: awake))

    def ended() -> int:
        if is_awake_before:
            end()
        return codes[0]

    monkeypatch.setattr(Bucket, "refuse_fenced", freeze)
    return ended


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(
    ("content", "times", "streamed", "is_awake_before"),
    [  # with equal contents all four; of the rest as few as have each two values together
        *(("late", PARTS, streamed, is_awake) for streamed in (True, False) for is_awake in (True, False)),
        ("new!", PARTS, True, False),
        ("new!", PARTS, False, True),
        ("new!", 1, True, True),
        ("new!", 1, False, False),
    ],
)
def test_a_file_that_is_put_too_late_without_a_condition_is_withdrawn(
    content: str, times: int, streamed: bool, is_awake_before: bool, stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = frozen_run(stored, monkeypatch, "folder", "out/m/b", content, times, is_awake_before=is_awake_before)
    with (
        pytest.raises(OutputFailed, match=r"[Aa]nother run"),
        stage_folder(stored / "out/m", inputs=[], streamed=streamed) as stage,
    ):
        (stage / "b").write_bytes(b"late" * times)
    is_same = content == "late" and (stored.tags_contents or not is_awake_before)
    stays, code = is_same or (streamed and times > 1 and not stored.keeps_parts), other()
    if stays or not is_awake_before:
        assert code == 0 and damage((stored / "out/m").newly()) == ([] if stays else ["b is missing"])
    else:  # the other one saw it, and publishes nothing
        assert code != 0 and stored.files("out/m") == {}
    assert stored.uploads() == [] and MARK not in stored.objects()


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(
    ("small", "late", "code"),
    [((), "c", 0), (("d",), "c", 0), (("d",), "d", 1)],
    ids=["no other file", "another file", "the same file"],
)
def test_a_late_file_is_in_no_output_of_the_next_run(
    small: tuple[str, ...], late: str, code: int, streamed: bool, stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run has not recorded a file of this name when the late one is put."""
    frozen = f"out/m/{late}"
    other = frozen_run(stored, monkeypatch, "folder", frozen, "b", is_awake_before=True, small=small)
    with (
        pytest.raises(OutputFailed, match="another run"),
        stage_folder(stored / "out/m", inputs=[], streamed=streamed) as stage,
    ):
        (stage / late).write_bytes(b"late")
    assert other() == code
    if code == 0:
        assert list(stored.files("out/m")) == ["b", *small, MANIFEST] and damage((stored / "out/m").newly()) == []
    else:  # it saw that, and what it has recorded stays for the next one
        assert stored.objects().keys() == {MARK, "out/m/b"}


def sealed_by_another(stored: Stored, sealed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run has taken over and sealed these files, and this one awakes."""
    stored.put(MARK, begun(process=1, host="elsewhere", run="r", sealed=sealed))
    awake = time.time() + store_output.TRUSTED
    monkeypatch.setattr(store_output, "time", SimpleNamespace(time=lambda: awake))


def refused_as_late(stored: Stored) -> None:
    late = pytest.raises(OutputFailed, match="another run")
    with late, stage_folder(stored / "out/m", inputs=[], streamed=True) as stage:
        (stage / "c").write_bytes(b"late")


@pytest.mark.parametrize(("content", "stays"), [("late", True), ("new!", False), (None, False)])
def test_a_late_file_that_the_next_run_did_not_see_is_withdrawn(
    content: str | None, stays: bool, stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = Bucket.refuse_fenced

    def freeze(bucket: Bucket, key: str) -> None:
        check(bucket, key)
        if key == "out/m/c":
            sealed = {}
            if content is not None:
                stored.put(key, content.encode())
                sealed = {"c": stored.objects()[key]["ETag"]}
            sealed_by_another(stored, sealed, monkeypatch)

    monkeypatch.setattr(Bucket, "refuse_fenced", freeze)
    refused_as_late(stored)
    assert ("out/m/c" in stored.objects()) is (stays and stored.tags_contents)


def test_what_another_run_put_in_place_of_a_late_file_stays(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_late, key = Bucket.refuse_late, "out/m/c"

    def freeze(bucket: Bucket, put: str) -> None:
        if put == key:
            stored.put(key, b"new!")
            sealed_by_another(stored, {"c": stored.objects()[key]["ETag"]}, monkeypatch)
        refuse_late(bucket, put)

    monkeypatch.setattr(Bucket, "refuse_late", freeze)
    refused_as_late(stored)
    assert stored.get(key) == b"new!"


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(("content", "times"), [("late", PARTS), ("new!", PARTS), ("late", 1)])
def test_a_worker_that_puts_its_file_too_late_replaces_none(
    content: str, times: int, stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, check = stored / "out/m/b", Bucket.refuse_fenced

    def freeze(bucket: Bucket, key: str) -> None:
        check(bucket, key)
        if key == path.key:
            monkeypatch.setattr(Bucket, "refuse_fenced", check)
            upload = Upload(bucket_of.__wrapped__(bucket.address), key)  # in another process
            upload.write(memoryview(content.encode() * times))
            upload.close()
            finished = {"b": {"e_tag": stored.objects()[key]["ETag"]}}
            stored.put(MARK, begun(process=1, host="elsewhere", run="r", finished=finished))

    stored.put(MARK, begun(process=1, host="elsewhere", run="r"))
    monkeypatch.setattr(Bucket, "refuse_fenced", freeze)
    late = pytest.raises(OutputFailed, match=r"was taken for dead, and another one has made|[Aa]nother run has put it")
    with written_by_worker(stored / "out/m", "b", "r") as target, late:
        target.write_bytes(b"late" * times)
    assert (path.key in stored.objects()) == (content == "late" or not stored.keeps_parts)


@pytest.mark.parametrize("is_awake_before", [True, False], ids=["meanwhile", "afterwards"])
@pytest.mark.parametrize(
    ("where", "content"),
    [*((where, "of the other") for where in FROZEN), ("file", "late"), ("file from the disk", "late")],
)
def test_a_run_that_freezes_after_its_last_check_publishes_nothing(
    where: str, content: str, is_awake_before: bool, stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, frozen, streamed = FROZEN[where]
    begins = f"out/m/{MANIFEST}" if where == "end" else ""
    other = frozen_run(stored, monkeypatch, kind, frozen, content, is_awake_before=is_awake_before, begins=begins)
    stage_output = stage_folder if kind == "folder" else stage_file
    with (
        pytest.raises(OutputFailed, match="another run"),
        stage_output(stored / "out/m", inputs=[], streamed=streamed) as stage,
    ):
        fill(stage) if kind == "folder" else (stage / "m").write_bytes(b"late")
    assert (MARK in stored.objects()) == is_awake_before
    assert other() == 0
    files = {"out/m/b" if kind == "folder" else "out/m": content.encode()}
    found = {key: stored.get(key) for key in stored.objects() if not key.endswith(MANIFEST)}
    assert found == files
    if kind == "folder":
        assert json.loads(stored.get(f"out/m/{MANIFEST}"))["by"] == "the other"


def test_no_renewal_comes_after_the_end(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_output, "RENEWED", 0.001)
    raised, renewals, renewing, write = list[Any](), set[threading.Thread](), threading.Event(), Begun._write

    def watched(begun: Begun, *args: Any, **options: bool) -> None:
        if threading.current_thread() is not threading.main_thread():
            renewals.add(threading.current_thread())
            renewing.set()
        write(begun, *args, **options)

    monkeypatch.setattr(threading, "excepthook", raised.append)
    monkeypatch.setattr(Begun, "_write", watched)
    with stage_folder(stored / "out/m", inputs=[], streamed=True) as stage:
        assert renewing.wait(10)
        fill(stage)
    (renewal,) = renewals
    renewal.join(10)
    assert not renewal.is_alive() and raised == []
    assert not [name for name in stored.objects() if name.endswith(".begun")]


@pytest.mark.parametrize("error", [None, InputRefused("too little is left")])
def test_a_run_that_freezes_leaves_the_object_of_the_next(
    error: InputRefused | None, stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, of_the_other = Begun._write, begun(process=1, host="elsewhere")

    def freeze_after(itself: Any, mode: Any = None, *, is_ended: bool = False, **more: bool) -> None:
        write(itself, mode, is_ended=is_ended, **more)
        if is_ended:
            awake = time.time() + store_output.TIME_TO_DELETE
            monkeypatch.setattr(store_output, "time", SimpleNamespace(time=lambda: awake))
            stored.put(MARK, of_the_other)

    monkeypatch.setattr(Begun, "_write", freeze_after)
    refused = contextlib.nullcontext() if error is None else pytest.raises(InputRefused)
    with refused, stage_folder(stored / "out/m", inputs=[], streamed=True) as stage:
        fill(stage)
        if error is not None:
            raise error
    assert stored.get(MARK) == of_the_other


@pytest.mark.parametrize("is_deleted", [True, False])
def test_an_object_that_was_emptied_is_taken_over(
    is_deleted: bool, stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept = list[float]()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if is_deleted:
            stored.delete(MARK)

    clock = SimpleNamespace(time=time.time, sleep=sleep, monotonic=lambda: sum(slept))
    monkeypatch.setattr(store_output, "time", clock)
    stored.put(MARK, b"")
    with stage_folder(stored / "out/m", inputs=[], streamed=True) as stage:
        fill(stage)
    assert sum(slept) == pytest.approx(0.1 if is_deleted else store_output.TIME_TO_DELETE, abs=0.1)
    assert MARK not in stored.objects() and damage((stored / "out/m").newly()) == []


@pytest.mark.parametrize(("error", "is_alive"), [(PermissionError, True), (ProcessLookupError, False)])
def test_a_process_of_another_user_is_alive(
    error: type[Exception], is_alive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: Any) -> None:
        raise error

    monkeypatch.setattr(os, "kill", kill)
    stated = {"process": 1, "host": platform.node()}
    assert store_output._is_alive(stated, timedelta(0)) is is_alive


def test_a_number_that_is_no_process_is_not_alive() -> None:
    assert not store_output._is_alive({"process": 2**70, "host": platform.node()}, timedelta(0))


def test_the_manifest_is_put_where_there_is_none(stored: Stored) -> None:
    refused = pytest.raises(OutputFailed, match=r"another run has put its lora_export\.json")
    with refused, stage_folder(stored / "out/m", inputs=[], streamed=True) as stage:
        fill(stage)
        stored.put(f"out/m/{MANIFEST}", b"{}")
    assert stored.objects() == {}


@pytest.mark.parametrize("is_changed", [True, False])
def test_whole_files_stay_after_a_stop_and_are_used_once(stored: Stored, is_changed: bool) -> None:
    for round_number in range(2):
        with pytest.raises(KeyboardInterrupt), stage_folder(stored / "out/m", inputs=[], streamed=True) as stage:
            own = begun_at(stage)
            assert own is not None and own.whole("b", "recipe") == (None if round_number == 0 else [1])
            if round_number == 0:
                fill(stage)
                own.add("b", "recipe", [1])
            raise KeyboardInterrupt
        assert list(stored.objects()) == [MARK, "out/m/b"]
    if is_changed:
        stored.put("out/m/b", b"changed since")
    with stage_folder(stored / "out/m", inputs=[], streamed=True) as stage:
        own = begun_at(stage)
        assert own is not None and own.whole("b", "recipe" if is_changed else "another recipe") is None
        (stage / "c").write_bytes(b"c")
        write_manifest(stage, {})
    assert begun_at(stage) is None and list(stored.objects()) == ["out/m/c", f"out/m/{MANIFEST}"]


@pytest.mark.parametrize(
    ("key", "options", "reason"),
    [
        ("there", {}, "exists already. Name another address"),
        ("there/file", {}, "exists already"),
        ("", {}, "is a bucket. Name a folder in it"),
        ("new", {"overwrite": True}, "a store replaces no output in one step"),
        ("new", {"sign": "key.pem"}, "signs files on the disk"),
    ],
)
def test_an_output_is_refused_before_the_work(stored: Stored, key: str, options: Any, reason: str) -> None:
    stored.put("there/file", b"1")
    with pytest.raises(OutputFailed, match=reason), stage_folder(stored / key, inputs=[], **options):
        raise AssertionError("the work began")
    assert stored.objects().keys() == {"there/file"}


@pytest.mark.parametrize("streamed", [True, False])
def test_one_file_is_replaced_with_overwrite_alone(stored: Stored, streamed: bool) -> None:
    stored.put("report.json", b"old")
    target, lines = stored / "report.json", list[str]()
    with pytest.raises(OutputFailed, match="exists already"), stage_file(target, inputs=[], streamed=streamed):
        pass
    replaced: dict[str, Any] = {"overwrite": True, "streamed": streamed, "on_message": lines.append}
    with pytest.raises(ZeroDivisionError), stage_file(target, inputs=[], **replaced) as stage:
        (stage / "report.json").write_bytes(b"half")
        raise ZeroDivisionError
    assert stored.get("report.json") == b"old"
    with stage_file(target, inputs=[], **replaced) as stage:
        (stage / "report.json").write_bytes(b"new")
    assert stored.get("report.json") == b"new"
    assert stored.objects().keys() == {"report.json"} and any("made in TMPDIR" in line for line in lines) is streamed


def test_files_beside_each_other_have_their_own_records(stored: Stored) -> None:
    one, other = (stored / f"out/{name}.safetensors" for name in ("one", "other"))
    with stage_file(one, inputs=[], streamed=True), stage_file(other, inputs=[], streamed=True):
        for path in (one, other):
            found = begun_at(path)
            assert found is not None and found.target == path
            path.write_bytes(b"x")
    assert begun_at(one) is None and begun_at(other) is None
