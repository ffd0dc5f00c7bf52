"""Jobs in processes of this machine and on Ray: what a worker's death, Ctrl-C and SIGTERM leave."""

from __future__ import annotations

import json
import multiprocessing.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import lora_export as le
from lora_export.errors import EnvironmentLacking
from lora_export.workers.engines import _Ray, each_result, on_ray, processes
from support.fleets import faults_in, small_fleet

ENGINES = [
    pytest.param((), id="processes", marks=pytest.mark.slow),
    pytest.param(("--ray", "local"), id="ray", marks=pytest.mark.slow),
]
COMMAND = [sys.executable, "-m", "lora_export", "fleet", "run", "fleet.toml", "-j", "2"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # with it, Ray writes a token into the home folder
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    return small_fleet(tmp_path)


def needs_ray(more: tuple[str, ...]) -> None:
    if more:
        pytest.importorskip("ray", reason="Ray is not installed")


def outputs() -> list[str]:
    return sorted(path.name for path in Path("release").iterdir()) if Path("release").exists() else []


def test_processes_do_the_jobs(place: Path) -> None:
    status = le.run_fleet("run", "fleet.toml", jobs=2)
    assert status.exit_code == 0 and outputs() == ["de", "fr"]
    assert {job.outcome for job in status.jobs} == {"done", "same"}


@pytest.mark.parametrize("more", ENGINES)
@pytest.mark.parametrize(("fault", "outcome"), [("kill once", "done"), ("kill", "failed")])
def test_the_job_of_a_dead_worker_is_tried_again(
    more: tuple[str, ...], fault: str, outcome: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_ray(more)
    faults_in(place, monkeypatch, fr=fault)
    ran = subprocess.run([*COMMAND, *more, "--json"], capture_output=True, text=True, check=False)
    document = json.loads(ran.stdout)
    outcomes = [job["outcome"] for job in document["jobs"]]
    assert outcomes == ["done", "same", outcome, "same" if outcome == "done" else "not run"], ran.stderr
    assert ran.returncode == document["exit_code"] == (0 if outcome == "done" else 6)
    assert [name for name in outputs() if not name.startswith(".")] == (["de", "fr"] if outcome == "done" else ["de"])
    assert outcome == "done" or document["jobs"][2]["message"].endswith("(3 times)")


@pytest.mark.parametrize("more", ENGINES)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_interrupted_leaves_whole_outputs_and_goes_on(
    more: tuple[str, ...], number: signal.Signals, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_ray(more)
    faults = faults_in(place, monkeypatch, fr="sleep")
    process = subprocess.Popen([*COMMAND, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (faults / "asleep").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "fleet.records had been written" in told
    assert set(outputs()) <= {"de"}  # no unfinished output, and no lock
    (faults / "fr").unlink()
    ran = subprocess.run([*COMMAND, "--json"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0 and outputs() == ["de", "fr"], ran.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to one process")
def test_ctrl_c_at_the_start_of_a_worker_does_not_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    spawn = multiprocessing.util.spawnv_passfds

    def spawn_and_interrupt(*arguments: Any) -> int:
        child: int = spawn(*arguments)
        os.kill(child, signal.SIGINT)
        return child

    monkeypatch.setattr(multiprocessing.util, "spawnv_passfds", spawn_and_interrupt)
    for perform, request, expected in (
        (signal.getsignal, signal.SIGINT, signal.SIG_IGN),
        (partial(signal.pthread_sigmask, signal.SIG_BLOCK), (), set()),
    ):
        with processes(perform, 1) as engine:
            assert engine.submit(request, 0, on_gpu=False).result(60) == expected  # type: ignore[arg-type]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


def test_without_ray_the_extra_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EnvironmentLacking, match=r'ray="local" needs the package ray .*pip install'):
        le.run_fleet("run", "fleet.toml", ray="local")
    assert not (place / "release").exists()


@pytest.mark.parametrize("error", [ConnectionError("no"), Exception("the node timed out"), ValueError("no address")])
def test_a_cluster_that_does_not_start_is_named(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def init(**_: object) -> None:
        raise error

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init))
    with (
        pytest.raises(EnvironmentLacking, match=f"Ray does not start or answer at auto: {error}"),
        on_ray(print, "auto", 1),
    ):
        pass


class OfRay:
    """What an engine uses of Ray, and the resources that jobs ask for."""

    def __init__(self) -> None:
        self.asked: list[dict[str, object]] = []

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 3.0}

    def nodes(self) -> list[dict[str, object]]:
        """One that ended, one that runs no tasks, and two that do."""
        memory = ((64, 1.0, False), (64, 0.0, True), (8, 4.0, True), (6, 2.0, True))
        return [{"Alive": alive, "Resources": {"memory": float(gib << 30), "CPU": n}} for gib, n, alive in memory]

    def remote(self, **settings: object) -> object:
        self.settings = settings
        return lambda function: self

    def options(self, **settings: object) -> object:
        self.asked.append(settings)
        return SimpleNamespace(remote=lambda request: SimpleNamespace(future=Future))


@pytest.mark.parametrize(
    ("most", "memory", "gpus"), [(None, 9 << 30, 1), ({"memory": 2.0**30, "CPU": 2.0}, 1 << 30, 0)]
)
def test_a_job_asks_ray_for_its_memory_and_a_gpu(most: dict[str, float] | None, memory: int, gpus: int) -> None:
    """A cluster may grow. A local one may not: the job itself then refuses what is missing."""
    ray = OfRay()
    engine = _Ray(ray, print, most)
    request = SimpleNamespace(name="base/fr/1-onnx")
    engine.submit(request, 9 << 30, on_gpu=True)
    assert engine.workers == 3 and engine.memory_of_worker == 3 << 30
    assert ray.settings == {"max_retries": 2, "retry_exceptions": False}
    assert ray.asked == [{"memory": memory, "num_gpus": gpus, "name": "base/fr/1-onnx"}]


@dataclass(frozen=True)
class Named:
    name: str


class Died(Exception):
    pass


class Dying:
    """An engine whose futures end two at a time; a death ends both. Keeps what ran at the same time."""

    def __init__(self, deaths: dict[str, int], *, at_once: int = 2, is_tried_again: bool = True):
        self.deaths, self.at_once, self.is_tried_again = deaths, at_once, is_tried_again
        self.together: list[list[str]] = []
        self._open: list[tuple[str, Future[Any]]] = []

    def submit(self, request: Named, memory: int, *, on_gpu: bool) -> Future[Any]:
        assert memory == 7 and not on_gpu
        future: Future[Any] = Future()
        self._open.append((request.name, future))
        return future

    def died(self, error: BaseException) -> str:
        return "it died" if isinstance(error, Died) else ""

    def end_what_runs(self, *_: Any, **__: Any) -> None:
        running, self._open = self._open, []
        self.together.append([name for name, _ in running])
        is_death = any(self.deaths.get(name, 0) > 0 for name, _ in running)
        for name, future in running:
            self.deaths[name] = self.deaths.get(name, 0) - 1
            future.set_exception(Died()) if is_death else future.set_result(name.upper())


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    from lora_export.workers import engines as tasks

    def run(engine: Dying) -> list[Any]:
        wait = tasks.concurrent.futures.wait

        def ended(running: Any, **options: Any) -> Any:
            engine.end_what_runs()
            return wait(running, **options)

        monkeypatch.setattr(tasks.concurrent.futures, "wait", ended)
        return [(one.name, found) for one, found in each_result(engine, map(Named, "abcd"), 7)]

    return run


def test_as_many_run_as_the_engine_takes(run: Callable[..., list[Any]]) -> None:
    engine = Dying({})
    assert sorted(run(engine)) == [("a", "A"), ("b", "B"), ("c", "C"), ("d", "D")]
    assert engine.together == [["a", "b"], ["c", "d"]]


def test_what_ran_when_a_worker_died_is_tried_again_alone(run: Callable[..., list[Any]]) -> None:
    engine = Dying({"b": 2})
    assert sorted(found for found, _ in run(engine)) == ["a", "b", "c", "d"]
    first, *again, last = engine.together
    assert (first, sorted(again), last) == (["a", "b"], [["a"], ["b"], ["b"]], ["c", "d"])


def test_the_third_death_ends_the_whole(run: Callable[..., list[Any]]) -> None:
    with pytest.raises(EnvironmentLacking, match=r"b: it died \(3 times\)"):
        run(Dying({"b": 3}))


def test_an_engine_that_tries_again_itself_gets_a_request_once(run: Callable[..., list[Any]]) -> None:
    engine = Dying({"b": 1}, is_tried_again=False)
    with pytest.raises(EnvironmentLacking, match="it died"):
        run(engine)
    assert engine.together == [["a", "b"]]


def test_an_error_of_the_work_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    class Faulty(Dying):
        def submit(self, request: Named, memory: int, *, on_gpu: bool) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_exception(KeyError(request.name))
            return future

    with pytest.raises(KeyError, match="a"):
        list(each_result(Faulty({}, at_once=1), [Named("a")], 7))
