"""The shards of one merge as jobs: the same bytes and figures as alone, whatever dies, stops or disagrees."""

from __future__ import annotations

import functools
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import lora_export as le
from lora_export.api import merge_shards
from lora_export.api.merge_shards import ShardRequest, write_shard
from lora_export.errors import EnvironmentLacking, InputRefused, LoraExportError, OutputFailed, WrongUsage
from lora_export.storage import object_store
from lora_export.storage.object_store import Bucket, Upload
from lora_export.storage.store_path import StorePath
from lora_export.weights.merge import CheckpointMerge
from support import stores
from support.fleets import OF_SHARDS, faults_in
from support.folder_contents import folder_contents
from support.handmade import base_file, peft_adapter
from support.slow import slow

if TYPE_CHECKING:
    from support.stores import Stored

SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
PROCESSES: dict[str, Any] = {"jobs": 2}
RAY: dict[str, Any] = {"jobs": 2, "ray": "local"}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base of three shards, an adapter, and their merge by one process."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # with it, Ray writes a token into the home folder
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.chdir(tmp_path)
    stores.model(tmp_path)
    return tmp_path


def alone(place: Path, **options: Any) -> tuple[dict[str, bytes], Any]:
    report = le.merge(place / "base", place / "adapter", place / "alone", **options).report
    assert report is not None
    return folder_contents(place / "alone"), replace(report, seconds=0)


def in_this_process(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[ShardRequest], ShardRequest] = lambda one: one
) -> None:
    """Let requests reach the worker's function changed, without a process: only what can be pickled passes."""

    def passed(value: Any) -> Any:
        return pickle.loads(pickle.dumps(value))  # noqa: S301

    monkeypatch.setattr(
        merge_shards, "_outcomes", lambda _, shards: ((one, passed(write_shard(passed(change(one))))) for one in shards)
    )


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("engine", [PROCESSES, slow(RAY)])
def test_the_files_and_figures_are_those_of_one_process(place: Path, engine: dict[str, Any]) -> None:
    told: list[Any] = []
    options: dict[str, Any] = {"weights": [0.5], "dtype": "float32", "hashing": "sha256"}
    report = le.merge("base", "fr=adapter", "out", **options, **engine, on_progress=told.append).report
    expected, figures = alone(place, **options)
    assert report is not None and replace(report, seconds=0, spellings={}) == replace(figures, spellings={})
    written = folder_contents(place / "out")
    assert written.keys() == expected.keys() and all(written[name] == expected[name] for name in SHARDS)
    assert b'"fr"' in written["lora_export.json"] and hidden(place) == []
    assert told[-1].done == told[-1].total > 0


@pytest.mark.parametrize(("engine", "is_here"), [(PROCESSES, True), slow(PROCESSES, False), slow(RAY, False)])
def test_the_same_in_a_store_by_its_own_copy(
    place: Path, stored: Stored, monkeypatch: pytest.MonkeyPatch, engine: dict[str, Any], is_here: bool
) -> None:
    if is_here:
        in_this_process(monkeypatch)
    for name in ("base", "adapter"):
        stored.put(name, place / name)
    report = le.merge(str(stored / "base"), str(stored / "adapter"), str(stored / "out/m"), **engine).report
    expected, figures = alone(place)
    assert stored.files("out/m") == expected and report is not None and replace(report, seconds=0) == figures
    assert not [key for key in stored.objects("out/") if key.endswith(".begun")]


def test_what_a_stopped_run_made_is_not_made_again(
    place: Path, stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_this_process(monkeypatch)
    address = str(stored / "out/m")

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        le.merge(place / "base", place / "adapter", address, jobs=2, on_progress=stop)
    (first,) = stored.objects("out/m/").values()
    le.merge(place / "base", place / "adapter", address, jobs=2)
    assert stored.files("out/m") == alone(place)[0]
    assert stored.objects("out/m/")[first["Key"]]["LastModified"] == first["LastModified"]


def command(*more: str) -> list[str]:
    return [sys.executable, "-m", "lora_export", "merge", "base", "adapter", "-o", "out", *more]


@pytest.mark.slow
@pytest.mark.parametrize("engine", [("-j", "2"), ("--ray", "local", "-j", "2")], ids=["processes", "ray"])
@pytest.mark.parametrize(("fault", "code"), [("kill once", 0), ("kill", 6)])
def test_the_shard_of_a_dead_worker_is_made_again(
    place: Path, monkeypatch: pytest.MonkeyPatch, engine: tuple[str, ...], fault: str, code: int
) -> None:
    faults_in(place, monkeypatch, OF_SHARDS, **{SHARDS[1]: fault})
    ran = subprocess.run(command(*engine), capture_output=True, text=True, check=False)
    assert ran.returncode == code, ran.stderr
    assert (folder_contents(place / "out") == alone(place)[0]) if code == 0 else "(3 times)" in ran.stderr
    assert (place / "out").exists() == (code == 0) and hidden(place) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_the_process_that_began(
    place: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    faults = faults_in(place, monkeypatch, OF_SHARDS, **{SHARDS[1]: "sleep"})
    process = subprocess.Popen(command("-j", "2"), stderr=subprocess.PIPE, text=True)
    while not (faults / "asleep").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(number)
    process.communicate(timeout=60)
    worker, until = int((faults / "asleep").read_text()), time.monotonic() + 20
    while _is_alive(worker) and time.monotonic() < until:
        time.sleep(0.1)
    assert not _is_alive(worker) and not (place / "out").exists()
    assert bool(hidden(place)) == (number is signal.SIGKILL)
    (faults / SHARDS[1]).unlink()
    le.merge("base", "adapter", "out", jobs=2)
    assert folder_contents(place / "out") == alone(place)[0] and hidden(place) == []


def _is_alive(process: int) -> bool:
    status = Path(f"/proc/{process}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_an_error_of_a_worker_is_that_of_one_process(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_this_process(monkeypatch)
    weights = np.full((96, 40), 3, np.float32)
    weights[5] = np.inf
    base_file(place / "base" / SHARDS[1], {"down.weight": weights}, metadata={"format": "pt"})
    with pytest.raises(InputRefused) as expected:
        alone(place)
    with pytest.raises(InputRefused) as refused:
        le.merge("base", "adapter", "out", jobs=2)
    assert str(refused.value) == str(expected.value) and "not finite" in str(refused.value)
    assert not (place / "out").exists() and hidden(place) == []


def test_a_worker_that_sees_something_else_writes_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge_shards._planned.cache_clear()
    in_this_process(monkeypatch)
    read = merge_shards.read_adapters

    def other(*arguments: Any, **options: Any) -> Any:
        return [replace(adapter, sha256="0" * 64) for adapter in read(*arguments, **options)]

    monkeypatch.setattr(merge_shards, "read_adapters", other)
    with pytest.raises(InputRefused, match=rf"{SHARDS[0]}: a worker sees another base, adapter or version"):
        le.merge("base", "adapter", "out", jobs=2)
    assert not (place / "out").exists()


def test_a_worker_that_does_not_see_the_folder_writes_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_this_process(monkeypatch, lambda one: replace(one, stage=place / "elsewhere" / "stage"))
    with pytest.raises(OutputFailed, match=r"a worker does not see the folder .*elsewhere, or was taken for dead"):
        le.merge("base", "adapter", "out", jobs=2)
    assert not (place / "elsewhere").exists() and not (place / "out").exists()


def test_a_shard_that_is_replaced_before_the_manifest_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, stored: Stored
) -> None:
    def replaced(one: ShardRequest) -> ShardRequest:
        if one.shard == SHARDS[2]:
            stored.put(f"out/m/{SHARDS[0]}", b"by a worker that was taken for dead")
        return one

    in_this_process(monkeypatch, replaced)
    with pytest.raises(OutputFailed, match=f"{SHARDS[0]} was replaced while the others were written"):
        le.merge("base", "adapter", str(stored / "out/m"), jobs=2)
    assert sorted(stored.objects("out/m/")) == [f"out/m/{name}" for name in SHARDS[1:]]


class Late:
    """A worker of the first shard that sleeps at a call, in a thread, and whose shard has other bytes in the end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: type, name: str):
        self.answer: Any = None
        self._asleep, self._woken, called = threading.Event(), threading.Event(), getattr(owner, name)
        self._thread = threading.Thread(target=self._work)

        def asleep(itself: Any, *arguments: Any, **options: Any) -> Any:
            if threading.current_thread() is not self._thread:
                return called(itself, *arguments, **options)
            self._asleep.set()
            assert self._woken.wait(60)
            if name == "close":
                itself.write(memoryview(b"late"))
            found = called(itself, *arguments, **options)
            if name == "write":
                with arguments[0].open("r+b") as file:
                    file.write(b"late")
            return found

        monkeypatch.setattr(owner, name, asleep)
        of_all, of_late = object_store.bucket_of, functools.cache(object_store.bucket_of.__wrapped__)

        def bucket_of(address: str) -> Bucket:  # a worker is another process
            return (of_late if threading.current_thread() is self._thread else of_all)(address)

        monkeypatch.setattr(object_store, "bucket_of", bucket_of)

    def _work(self) -> None:
        self.answer = write_shard(self.request)

    def begin(self, request: ShardRequest) -> None:
        self.request = request
        self._thread.start()
        assert self._asleep.wait(60)

    def wake(self) -> Any:
        self._woken.set()
        self._thread.join(60)
        return self.answer


@pytest.mark.parametrize("is_published", [False, True])
@pytest.mark.parametrize(("owner", "call"), [(StorePath, "unlink"), (Upload, "close"), (CheckpointMerge, "write_file")])
def test_a_worker_that_was_taken_for_dead_changes_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch, stored: Stored, is_published: bool, owner: type, call: str
) -> None:
    late, answers = Late(monkeypatch, owner, call), list[Any]()

    def change(one: ShardRequest) -> ShardRequest:
        if one.shard == SHARDS[0]:
            late.begin(one)
        if one.shard == SHARDS[2] and not is_published:
            answers.append(late.wake())
        return one

    in_this_process(monkeypatch, change)
    is_on_disk = owner is CheckpointMerge
    le.merge("base", "adapter", "out" if is_on_disk else str(stored / "out/m"), jobs=2)
    answers += [late.wake()] if is_published else []
    assert (folder_contents(place / "out") if is_on_disk else stored.files("out/m")) == alone(place)[0]
    if is_on_disk:
        assert hidden(place) == [] and (is_published == isinstance(answers[0], OSError))
    else:
        assert "was taken for dead, and another one has made the file" in str(answers[0])
        assert stored.objects().keys() == {f"out/m/{name}" for name in folder_contents(place / "alone")}


def test_the_time_is_that_of_the_workers_too(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_this_process(monkeypatch)
    clock = iter([10.0, 17.0])  # before the first shard, after the manifest
    monkeypatch.setattr("lora_export.api.merge_checkpoint.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    report = le.merge("base", "adapter", "out", jobs=2).report
    assert report is not None and report.seconds == 7


def test_a_residual_is_kept_of_a_shared_merge(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_this_process(monkeypatch)
    le.merge("base", "adapter", "out", jobs=2, keep_residual="out.residual")
    le.unmerge("out", "adapter", "again", base_from="out.residual")
    restored = folder_contents(place / "again")
    assert all(restored[name] == content for name, content in folder_contents(place / "base").items() if name in SHARDS)


REFUSED: dict[str, tuple[Callable[[Path], dict[str, Any]], type[LoraExportError], str]] = {
    "one file": (
        lambda place: {"base": place / "base" / SHARDS[0], "ray": "local"},
        WrongUsage,
        'in one file, which one process writes. Leave ray="local" out',
    ),
    "keep_quantised": (lambda _: {"keep_quantised": True}, WrongUsage, "jobs= does not go together with keep_quan"),
    "cuda": (lambda _: {"device": "cuda"}, WrongUsage, "workers compute on the processor"),
    "calibration": (lambda _: {"calibration": "x.txt", "ray": "local"}, WrongUsage, "ray= does not go together with"),
    "head": (lambda _: {"only_head": True}, WrongUsage, "jobs= does not go together with only_head=: .* a head alone"),
    "memory": (lambda place: {"adapters": le.load_adapter(place / "adapter")}, WrongUsage, "Give their paths"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_shared_is_refused(place: Path, name: str) -> None:
    more, kind, reason = REFUSED[name]
    options = {"base": "base", "adapters": "adapter", "output": "out", "jobs": 2} | more(place)
    with pytest.raises(kind, match=reason):
        le.merge(**options)
    assert not os.path.lexists(place / "out")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_base_in_one_file_is_merged_by_one_process(place: Path, kind: str) -> None:
    (place / "one").mkdir()
    shutil.copy(place / "base" / SHARDS[0], place / "one/model.safetensors")
    peft_adapter(place / "own", {"up": (np.ones((1, 40)), np.ones((96, 1)))})
    base, suffix = ("one", "") if kind == "folder" else ("one/model.safetensors", ".safetensors")
    lines: list[str] = []
    found = le.merge(base, "own", f"out{suffix}", jobs=8, on_message=lines.append)
    le.merge(base, "own", f"alone{suffix}")
    note = f"{base} has its weights in one file, which one process writes: jobs=8 changes nothing"
    assert found.notes == (note,) and lines == [f"note: {note}"]
    written, expected = (
        folder_contents(place / name) if kind == "folder" else (place / f"{name}{suffix}").read_bytes()
        for name in ("out", "alone")
    )
    assert written == expected


@pytest.mark.parametrize("suffix", [".onnx", ".gguf"])
def test_a_graph_and_a_gguf_file_are_written_by_one_process(place: Path, suffix: str) -> None:
    (place / f"base{suffix}").write_bytes(b"GGUF")
    with pytest.raises(WrongUsage, match=r"jobs= is (for checkpoints|not for a GGUF file)"):
        le.merge(f"base{suffix}", "adapter", f"out{suffix}", jobs=2)


def test_without_ray_the_extra_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EnvironmentLacking, match=r'ray="local" needs the package ray .*pip install'):
        le.merge("base", "adapter", "out", ray="local")
    assert not (place / "out").exists() and hidden(place) == []
