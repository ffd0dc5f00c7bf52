"""Merges into one base are done together, and each has the record that it has alone."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import lora_export as le
from lora_export.fleet import records, run
from lora_export.fleet.description import read_fleet
from lora_export.fleet.needs import NeedsOfJobs
from lora_export.fleet.run import MOST_TOGETHER, batches
from lora_export.fleet.worker import JobBatch, perform
from support.fleets import BASES, JOBS, MERGE, VERIFY, Here, run_here
from support.folder_contents import folder_contents
from support.handmade import peft_adapter

CONVERT = '[[steps]]\nstep = "convert"\nto = "mlx"\noutput = "mlx/{adapter}"\n'
MERGES, PROOFS = JOBS[::2], JOBS[1::2]


@pytest.mark.parametrize(
    ("text", "number", "workers", "memory", "sizes"),
    [
        (BASES + MERGE, 40, 1, None, [16, 16, 8]),
        (BASES + MERGE, 5, 2, None, [3, 2]),  # no worker is left without work
        (BASES + MERGE, 5, 9, None, [1] * 5),
        (BASES + MERGE, 5, 1, 1, [1] * 5),  # bytes of memory
        (BASES + MERGE, 5, 1, 320 << 20, [3, 2]),
        (BASES + MERGE.replace('"release', '"s3://bucket/release'), 5, 1, 320 << 20, [1] * 5),  # parts of each upload
        (BASES + MERGE + 'calibration = "texts.txt"\n', 5, 1, None, [1] * 5),
        (BASES + MERGE + 'device = "cuda"\n', 5, 1, None, [1] * 5),
        (BASES + VERIFY + 'candidate = "m/{adapter}"\n', 40, 1, None, [16, 16, 8]),
        (BASES + VERIFY + 'candidate = "m/{adapter}"\n', 5, 1, 366 << 20, [2, 2, 1]),  # blocks of each proof
        (BASES + VERIFY + 'candidate = "m/{adapter}"\ncalibration = "texts.txt"\n', 5, 1, None, [1] * 5),
        (BASES + CONVERT, 5, 1, None, [1] * 5),
        (BASES + MERGE + MERGE.replace("release", "other"), 3, 1, None, [3, 3]),
        (BASES.replace('"base"', '"base.gguf"') + MERGE, 3, 1, None, [1] * 3),
    ],
)
def test_what_is_done_together(
    text: str, number: int, workers: int, memory: int | None, sizes: list[int], place: Path
) -> None:
    (place / "fleet.toml").write_text(text)
    for each in range(number - 2):
        peft_adapter(place / "adapters" / f"x{each}", {"up": ([[1, 1, 1]], [[1], [1]])})
    jobs = read_fleet(Path("fleet.toml")).jobs
    found = batches(jobs, NeedsOfJobs(), workers, memory)
    assert [len(own) for own in found] == sizes and max(sizes) <= MOST_TOGETHER
    assert sorted(job.id for own in found for job in own) == sorted(job.id for job in jobs)


def test_a_batch_writes_what_single_jobs_write(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch)
    alone, records = folder_contents(place / "release"), recorded(place)
    for name in ("release", "fleet.records"):
        (place / name).rename(place / f"former {name}")
    engine = Here(workers=1)
    status, ran = run_here(monkeypatch, engine)
    assert ran == MERGES + PROOFS and engine.sizes == [2, 2] and status.counts == {"done": 2, "same": 2}
    assert folder_contents(place / "release") == alone and recorded(place) == records
    assert run_here(monkeypatch, Here(workers=1))[1] == []


def recorded(place: Path) -> Mapping[str, Any]:
    """What the records of all jobs contain, without times and places on the disk."""
    found = {path.stem: json.loads(path.read_text()) for path in (place / "fleet.records").rglob("*-*.json")}
    left = ("seconds", "created", "hashes")
    return {name: {key: one for key, one in each.items() if key not in left} for name, each in found.items()}


def test_one_of_a_batch_that_is_refused_ends_no_other(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft_adapter(place / "adapters" / "dd", {"up": ([[1, 2, 3, 4]], [[1], [10]])})
    engine = Here(workers=1)
    status, ran = run_here(monkeypatch, engine)
    assert ran == ["base/dd/1-merge", *MERGES, *PROOFS] and engine.sizes == [3, 2] and status.exit_code == 3
    assert [job.outcome for job in status.jobs] == ["refused", "not run", "done", "same", "done", "same"]
    assert "(2, 3), the adapter was trained on (2, 4)" in status.jobs[0].message


def test_a_batch_on_a_cluster_fits_its_machines(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No machine would ever take a larger one."""
    engine = Here(workers=1)
    engine.memory_of_worker = 1 << 20  # type: ignore[attr-defined]
    monkeypatch.setattr(run, "on_ray", lambda *_: contextlib.nullcontext(engine))
    assert le.run_fleet("run", "fleet.toml", ray="auto").exit_code == 0
    assert engine.sizes == [1] * 4


def test_a_bug_in_one_of_a_batch_ends_no_other(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_export.api import merge_checkpoint as module

    merging = module.merging_into_checkpoint
    monkeypatch.setattr(
        module, "merging_into_checkpoint", lambda one: 1 / 0 if one.adapters[0].name == "de" else merging(one)
    )
    status, _ = run_here(monkeypatch, Here(workers=1))
    assert [job.outcome for job in status.jobs] == ["failed", "not run", "done", "same"] and status.exit_code == 1
    assert status.jobs[0].message == "a bug in lora-export: ZeroDivisionError('division by zero')"


@pytest.mark.parametrize("is_tried_again", [True, False])
def test_of_a_batch_whose_worker_dies_each_job_is_tried_alone(
    is_tried_again: bool, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray gives a batch to other workers by itself (not `is_tried_again`). A job that ends each worker fails alone."""

    class Dying(Here):
        def submit(self, batch: JobBatch, memory: int, *, on_gpu: bool) -> Future[list[dict[str, Any]]]:
            own = [request.job.id for request in batch.requests]
            self.ran += own
            self.sizes.append(len(own))
            future: Future[list[dict[str, Any]]] = Future()
            if JOBS[0] in own:
                future.set_exception(BrokenPipeError())
            else:
                future.set_result(perform(batch))
            return future

        def died(self, error: BaseException) -> str:
            return "killed" if isinstance(error, BrokenPipeError) else ""

    engine = Dying(workers=1)
    engine.is_tried_again = is_tried_again  # type: ignore[misc]
    status, _ = run_here(monkeypatch, engine)
    assert [job.outcome for job in status.jobs] == ["failed", "not run", "done", "same"] and status.exit_code == 6
    assert engine.sizes[0] == 2 and set(engine.sizes[1:]) == {1} and engine.ran.count(MERGES[1]) == 2
    assert engine.ran.count(JOBS[0]) == (3 if is_tried_again else 2)


def test_jobs_that_are_done_are_not_in_a_batch(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch, Here(workers=1))
    for name in ("it", "es"):
        peft_adapter(place / "adapters" / name, {"up": ([[1, 1, 1]], [[1], [1]])})
    assert le.run_fleet("status", "fleet.toml").counts["not done"] == 4
    engine = Here(workers=1)
    _, ran = run_here(monkeypatch, engine)
    assert engine.sizes == [2, 2] and {name.split("/")[1] for name in ran} == {"it", "es"}


def test_what_is_done_after_each_job_does_not_grow_with_the_fleet(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(30):
        shutil.copytree("adapters/de", f"adapters/{number}")
    Path("fleet.toml").write_text(BASES + CONVERT)
    looked_at, written, clock = list[int](), list[str](), itertools.count()

    def counted(jobs: list[Any], *rest: Any) -> list[list[Any]]:
        looked_at.append(len(jobs))
        return batches(jobs, *rest)

    monkeypatch.setattr(run, "batches", counted)
    monkeypatch.setattr(records, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    replaced = records._write
    monkeypatch.setattr(records, "_write", lambda path, new: (written.append(path.name), replaced(path, new)))
    status, ran = run_here(monkeypatch)
    assert status.exit_code == 0 and len(ran) == 32 and max(looked_at) == run.MOST_TOGETHER
    assert 2 <= written.count("hashes.json") <= 4
    hashes = json.loads(Path("fleet.records/hashes.json").read_text())
    assert {str(path) for path in place.rglob("adapters/*/*")} <= hashes.keys()
