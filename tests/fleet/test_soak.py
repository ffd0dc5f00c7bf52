"""Fleets and shared merges whose workers are killed at random times, on a store that refuses some of the requests."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pytest

import lora_export as le
from lora_export.storage.manifest import MANIFEST
from support import stores
from support.folder_contents import folder_contents
from support.handmade import peft_adapter

if TYPE_CHECKING:
    from support.stores import Stored

ADAPTERS, ROWS, SHARDS = 6, 20_000, 8
REFUSED = 0.02  # of all requests
MOST_RUNS = 30  # of one round, until everything is done
ENDED = {0, 6, 7, -9}  # done; a worker died too often; the store or a lock; killed itself
NO_JOBS = "ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent"  # titles of Ray's own processes
PORT = 26379  # of the cluster of Ray
PROGRAM = [sys.executable, "-m", "lora_export"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    # A cluster on a busy machine: otherwise it gives itself up.
    monkeypatch.setenv("RAY_agent_register_timeout_ms", "300000")
    monkeypatch.setenv("RAY_health_check_failure_threshold", "100")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # by default 15: beside other programs it would hardly run
    return tmp_path


@dataclass(frozen=True)
class Workers:
    """Where a command's jobs run: its options, and the process below which their processes are."""

    options: tuple[str, ...]
    above: int | None = None  # None: the command itself

    def of(self, command: int) -> list[Any]:
        """The processes that do a job at present."""
        import psutil

        found = []
        for child in psutil.Process(self.above or command).children(recursive=True):
            try:
                title = " ".join(child.cmdline())
            except psutil.Error:
                continue
            if "spawn_main" in title or (title.startswith("ray::") and not title.startswith(NO_JOBS)):
                found.append(child)
        return found


@pytest.fixture(params=["processes", "ray"])
def workers(request: pytest.FixtureRequest, place: Path, stored: Stored) -> Iterator[Workers]:
    """Two processes of a pool, or two workers of a cluster of Ray, which finds the store in its environment."""
    pytest.importorskip("psutil", reason="psutil is not installed")
    if request.param == "processes":
        yield Workers(("-j", "2"))
        return
    pytest.importorskip("ray", reason="Ray is not installed")
    with tempfile.TemporaryDirectory(prefix="ray-") as folder, (place / "ray.log").open("wb") as log:
        cluster = _cluster(folder, log)
        try:
            yield Workers(("--ray", f"127.0.0.1:{PORT}"), cluster.pid)
        finally:
            cluster.terminate()
            cluster.wait(60)


def _cluster(folder: str, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """A cluster of Ray that is up. Where others use the machine, it may take several tries."""
    settings = {
        "--node-ip-address": "127.0.0.1",
        "--port": PORT,
        "--num-cpus": 2,
        "--include-dashboard": "false",
        "--temp-dir": folder,
    }
    line = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    line += [f"{name}={value}" for name, value in settings.items()]
    for _ in range(10):
        cluster = subprocess.Popen(line, stdout=log, stderr=log)
        while cluster.poll() is None:
            if b"Ray runtime started" in Path(log.name).read_bytes():
                return cluster
            time.sleep(0.2)
    raise AssertionError(Path(log.name).read_text())


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int:
    number: int = request.config.getoption("--kills")
    return number


class Killer:
    """Kills workers of a command at random times. Every `whole`th time it kills the command itself."""

    def __init__(self, workers: Workers, kills: int, seed: int, whole: int = 0):
        self.left, self.done, self._workers, self._whole = kills, 0, workers, whole
        self._random = random.Random(seed)

    def run(self, line: list[str]) -> tuple[int, str]:
        """Run a command. Returns its exit code, and its messages."""
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        due = time.monotonic() + self._random.uniform(0.5, 6)
        while process.poll() is None:
            time.sleep(0.02)
            found = self._workers.of(process.pid) if self.left and time.monotonic() >= due else []
            if found:
                is_whole = self._whole > 0 and (self.done + 1) % self._whole == 0
                process.kill() if is_whole else self._random.choice(found).kill()
                self.left, self.done = self.left - 1, self.done + 1
                due = time.monotonic() + self._random.uniform(0.5, 6)
        return process.returncode, process.communicate()[1]


def soaked(killer: Killer, one_round: Callable[[int], list[str]], check: Callable[[int], None]) -> None:
    """Run rounds until all kills are done. Each round is run until it ends with 0; then it is checked."""
    rounds, runs = 0, 0
    while killer.left or not rounds:
        line = one_round(rounds)
        for number in range(MOST_RUNS):
            code, messages = killer.run(line)
            runs += 1
            assert code in ENDED, f"{code}: {messages}"
            if code == 0:
                break
            print(f"round {rounds}, run {number}: {code}: {messages.strip().splitlines()[-1:]}")
        assert code == 0, messages
        check(rounds)
        rounds += 1
    print(f"\n{killer.done} kills, {rounds} rounds, {runs} runs")


def is_whole(stored: Stored, key: str, expected: dict[str, bytes]) -> None:
    """The output has the bytes of a merge that nothing disturbed, and its own record holds."""
    found = stored.files(key)
    assert found.keys() == expected.keys(), key
    assert {name for name in found if found[name] != expected[name]} <= {MANIFEST}, key  # which has places of inputs
    assert le.inspect(str(stored / key), check=True)


@pytest.mark.soak
def test_a_fleet_whose_workers_are_killed_publishes_each_output_once(
    place: Path, stored: Stored, monkeypatch: pytest.MonkeyPatch, workers: Workers, kills: int
) -> None:
    base, _ = stores.model(place, rows=ROWS)
    stored.put("base", base)
    rng, expected = np.random.default_rng(1), dict[str, dict[str, bytes]]()
    for number in range(ADAPTERS):
        pairs = {one: (rng.integers(1, 4, (2, 40)), rng.integers(1, 4, (ROWS, 2))) for one in ("up", "down")}
        folder = peft_adapter(place / "adapters" / f"a{number}", pairs)
        stored.put(f"adapters/a{number}", folder)
        le.merge(base, folder, place / "alone" / f"a{number}")
        expected[f"a{number}"] = folder_contents(place / "alone" / f"a{number}")
    failing, bucket = stores.Failing(monkeypatch, REFUSED, seed=3), stored.address

    def one_round(number: int) -> list[str]:
        text = f'records = "records-{number}"\n[[bases]]\npath = "{bucket}/base"\nadapters = ["{bucket}/adapters/*"]\n'
        text += f'[[steps]]\nstep = "merge"\noutput = "{bucket}/release-{number}/{{adapter}}"\n'
        (place / "fleet.toml").write_text(text + '[[steps]]\nstep = "verify --base"\n')
        return [*PROGRAM, "fleet", "run", "fleet.toml", *workers.options, "--json"]

    def check(number: int) -> None:
        for name, files in expected.items():
            is_whole(stored, f"release-{number}/{name}", files)
        assert not [key for key in stored.objects(f"release-{number}/") if key.endswith(".begun")]
        records = [json.loads(path.read_text()) for path in (place / f"records-{number}").rglob("*verify-base.json")]
        assert [one["outcome"] for one in records] == ["same"] * ADAPTERS
        assert failing.put_twice(MANIFEST) == []

    soaked(Killer(workers, kills, seed=4), one_round, check)
    print(f"{failing.refused} of {failing.requests} requests refused")


@pytest.mark.soak
def test_a_merge_whose_workers_and_caller_are_killed_is_whole(
    place: Path, stored: Stored, monkeypatch: pytest.MonkeyPatch, workers: Workers, kills: int
) -> None:
    base, adapter = stores.model(place, SHARDS, ROWS)
    le.merge(base, adapter, place / "alone")
    stored.put("base", base)
    failing, expected = stores.Failing(monkeypatch, REFUSED, seed=5), folder_contents(place / "alone")

    def one_round(number: int) -> list[str]:
        return [
            *PROGRAM,
            "merge",
            str(stored / "base"),
            "adapter",
            "-o",
            str(stored / f"merged/{number}"),
            *workers.options,
        ]

    def check(number: int) -> None:
        is_whole(stored, f"merged/{number}", expected)
        assert not [key for key in stored.objects("merged/") if key.endswith(".begun")]
        assert failing.put_twice(MANIFEST) == []

    soaked(Killer(workers, kills, seed=6, whole=4), one_round, check)
    print(f"{failing.refused} of {failing.requests} requests refused")
