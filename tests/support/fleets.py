"""What tests of fleets share: a small fleet, an engine in this process, and faults in other processes."""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lora_export as le
from lora_export.fleet import run
from lora_export.fleet.status import FleetStatus
from lora_export.fleet.worker import JobBatch, perform
from support.handmade import base_file, peft_adapter

PAIRS = {"de": ([[1, 0, 3]], [[2], [10]]), "fr": ([[1, 2, 3]], [[1], [10]])}
BASES = '[[bases]]\npath = "base"\nadapters = ["adapters/*"]\n'
MERGE = '[[steps]]\nstep = "merge"\noutput = "release/{adapter}"\n'
VERIFY = '[[steps]]\nstep = "verify --base"\n'
FLEET = BASES + MERGE + VERIFY
JOBS = ["base/de/1-merge", "base/de/2-verify-base", "base/fr/1-merge", "base/fr/2-verify-base"]
# In a process that imports a module: a merge that `faults/NAME` names is killed or sleeps when it has written all but
# the output's name, and a shard when it is written.
HOOK = """
import os, pathlib, signal, sys, time
class Hook:
    def find_spec(self, name, path, target=None):
        if name == "lora_export.api.{module}":
            sys.meta_path.remove(self)
            import lora_export.weights.merge as module
            merge, faults = module.CheckpointMerge.{function}, pathlib.Path(os.environ["FAULTS"])
            def faulty(self, *arguments, **options):
                found = yield from merge(self, *arguments, **options)
                fault = faults / {name}
                kind = fault.read_text() if fault.exists() else ""
                if kind == "kill once":
                    fault.unlink()
                if kind.startswith("kill"):
                    os.kill(os.getpid(), signal.SIGKILL)
                if kind == "sleep":
                    (faults / "asleep").write_text(str(os.getpid()))
                    [time.sleep(0.1) for _ in range(900)]
                return found
            module.CheckpointMerge.{function} = faulty
sys.meta_path.insert(0, Hook())
"""
OF_MERGES = HOOK.format(module="merge_checkpoint", function="into", name="self.plan.adapters[0].name")
OF_SHARDS = HOOK.format(module="merge_shards", function="_write_shard", name="arguments[0].name")


def small_fleet(folder: Path, text: str = FLEET) -> Path:
    """A base of one weight, two adapters, and FLEET.toml; returns the folder."""
    (folder / "base").mkdir()
    base_file(
        folder / "base" / "model.safetensors", {"up.weight": np.arange(6).reshape(2, 3)}, metadata={"format": "pt"}
    )
    (folder / "base" / "config.json").write_text('{"model_type": "x"}')
    for name, pair in PAIRS.items():
        peft_adapter(folder / "adapters" / name, {"up": pair})
    (folder / "fleet.toml").write_text(text)
    return folder


class Here:
    """An engine that does a job at once, in this process. It says that it has so many workers."""

    at_once, is_tried_again = 1, True

    def __init__(self, workers: int = 2) -> None:
        self.ran: list[str] = []
        self.sizes: list[int] = []  # of batches
        self.workers = workers

    def submit(self, batch: JobBatch, memory: int, *, on_gpu: bool) -> Future[list[dict[str, Any]]]:
        self.ran += [request.job.id for request in batch.requests]
        self.sizes.append(len(batch.requests))
        future: Future[list[dict[str, Any]]] = Future()
        future.set_result(perform(batch))
        return future

    def died(self, error: BaseException) -> str:
        return ""


def stay_here(monkeypatch: pytest.MonkeyPatch, engine: Here | None = None) -> Here:
    """Let jobs run in this process."""
    engine = engine or Here()
    monkeypatch.setattr(run, "processes", lambda *_: contextlib.nullcontext(engine))
    return engine


def run_here(monkeypatch: pytest.MonkeyPatch, engine: Here | None = None) -> tuple[FleetStatus, list[str]]:
    """Run fleet.toml of the current folder in this process: its status, and the jobs that ran."""
    engine = stay_here(monkeypatch, engine)
    status = le.run_fleet("run", "fleet.toml")
    assert isinstance(status, FleetStatus)
    return status, engine.ran


def faults_in(folder: Path, monkeypatch: pytest.MonkeyPatch, hook: str = OF_MERGES, **kinds: str) -> Path:
    """Let processes that are started from now on have these faults: adapter -> kill, kill once or sleep."""
    (folder / "hook").mkdir()
    (folder / "faults").mkdir()
    (folder / "hook" / "sitecustomize.py").write_text(hook)
    for name, kind in kinds.items():
        (folder / "faults" / name).write_text(kind)
    paths = [str(folder / "hook"), str(Path(le.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("FAULTS", str(folder / "faults"))
    return folder / "faults"
