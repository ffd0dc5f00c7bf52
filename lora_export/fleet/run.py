"""Run what is not done of a fleet: each job as soon as those are done whose outputs it reads."""

from __future__ import annotations

import concurrent.futures
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lora_export.api.memory_needs import jobs_that_fit
from lora_export.artifacts.kind import artifact_kind
from lora_export.callbacks import OnMessage, OnProgress, Progress
from lora_export.errors import EnvironmentLacking
from lora_export.fleet.description import FleetFile
from lora_export.fleet.needs import NeedsOfJobs
from lora_export.fleet.records import GOOD, FleetRecords, Standing
from lora_export.fleet.status import FleetStatus, job_status
from lora_export.fleet.steps import FleetJob
from lora_export.fleet.worker import GRAPHS, JobBatch, JobRequest, perform
from lora_export.options.fleet import FleetOptions
from lora_export.options.spelling import is_command_line
from lora_export.report.fleet import problem_lines
from lora_export.runtime.memory import available_memory
from lora_export.storage import atomic_output
from lora_export.storage.artifact_kinds import ArtifactKind
from lora_export.storage.output_lock import output_lock
from lora_export.workers.engines import TRIES_OF_JOB, Engine, on_ray, processes

MOST_TOGETHER = 16  # with three open files for each; more would save less than 1/16 of the base's bytes
READ_IN_BLOCKS = (ArtifactKind.CHECKPOINT, ArtifactKind.EMBEDDER, ArtifactKind.WEIGHTS)


def run_jobs(fleet: FleetFile, options: FleetOptions) -> FleetStatus:
    """Do what is not done, and return what became of all. A refusal, a verdict or a failure of one job ends no other.

    Raises OutputFailed where another run has the fleet, and EnvironmentLacking without Ray where that was requested.
    """
    begun = time.perf_counter()
    fleet.records.mkdir(parents=True, exist_ok=True)
    with output_lock(fleet.records / ".lock", fleet.records):
        records, needs = FleetRecords(fleet.records, reads=True), NeedsOfJobs(fleet.jobs)
        engine = (
            processes(perform, _at_once(fleet, needs, options))
            if options.ray is None
            else on_ray(perform, options.ray, options.jobs)
        )
        try:
            with engine as opened:
                memory = available_memory() if options.ray is None else None
                most = opened.memory_of_worker if memory is None else memory // opened.workers
                run = _Run(fleet, records, opened, needs, options.on_message, options.on_progress, most)
                run.whole()
            shutil.rmtree(fleet.records / GRAPHS, ignore_errors=True)
        except KeyboardInterrupt:
            atomic_output.published.append(fleet.records)  # what is done stays: the next run goes on
            raise
    jobs = tuple(job_status(job, run.standings[job.id]) for job in fleet.jobs)
    return FleetStatus(str(fleet.path), jobs, round(time.perf_counter() - begun, 1))


def _at_once(fleet: FleetFile, needs: NeedsOfJobs, options: FleetOptions) -> int:
    """How many processes work at the same time: those of `jobs` for which there is memory."""
    return jobs_that_fit(options.jobs, max(needs.memory_of([job]) for job in fleet.jobs), options.on_message)


class RunningJobs(NamedTuple):
    """Jobs that a worker does together."""

    jobs: Mapping[str, FleetJob]  # by id
    standings: Mapping[str, Standing]
    tries: int


@dataclass
class _Run:
    fleet: FleetFile
    records: FleetRecords
    engine: Engine
    needs: NeedsOfJobs
    on_message: OnMessage
    on_progress: OnProgress
    most_memory: int | None  # of a worker, where that is known
    standings: dict[str, Standing] = field(default_factory=dict)
    running: dict[concurrent.futures.Future[Any], RunningJobs] = field(default_factory=dict)
    suspects: list[tuple[FleetJob, int]] = field(default_factory=list)  # that ran when a process died, and the next try
    done: int = 0  # jobs of this run
    begun: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.order = {job.id: number for number, job in enumerate(self.fleet.jobs)}

    def whole(self) -> None:
        """Run until nothing is left. The hashes of inputs are written before the work: it may be interrupted."""
        left = list(self.fleet.jobs)
        try:
            while left or self.running or self.suspects:
                left = self._start(left)
                self.records.write_hashes()
                self._report(len(left))
                if self.running:
                    finished, _ = concurrent.futures.wait(self.running, return_when=concurrent.futures.FIRST_COMPLETED)
                    for future in finished:
                        self._finish(future)
        finally:
            self.records.write_hashes(last=True)

    def _start(self, left: list[FleetJob]) -> list[FleetJob]:
        """Give the engine what it has place for. Returns the jobs that wait for it or for others."""
        if self.suspects:  # one at a time, so that a job that ends its process ends no other job
            if not self.running:
                job, tries = self.suspects.pop()
                self._submit([job], tries)
            return left
        if any(batch.tries > 1 for batch in self.running.values()):
            return left
        waiting, ready = list[FleetJob](), list[FleetJob]()
        jobs_in_order, most = iter(left), self.engine.at_once * MOST_TOGETHER  # of thousands, the first alone
        while len(ready) < most and (one := next(jobs_in_order, None)):
            (waiting if any(name not in self.standings for name in one.after) else ready).append(one)
        for jobs in batches(ready, self.needs, self.engine.workers, self.most_memory):
            if len(self.running) < self.engine.at_once:
                self._submit(jobs, 1)
            else:
                waiting += jobs
        return [*sorted(waiting, key=lambda job: self.order[job.id]), *jobs_in_order]

    def _submit(self, jobs: Sequence[FleetJob], tries: int) -> None:
        """Give jobs to the engine, but for those whose result is known: also a process that died may have left it."""
        standings = {job.id: self.records.standing(job, self.standings) for job in jobs}
        self.standings |= {name: one for name, one in standings.items() if one.is_settled}
        left = {job.id: job for job in jobs if not standings[job.id].is_settled}
        if not left:
            return
        batch = JobBatch(tuple(self._request(job, standings[job.id]) for job in left.values()))
        on_gpu = any("cuda" in (job.values.get("provider"), job.values.get("device")) for job in left.values())
        future = self.engine.submit(batch, self.needs.memory_of(list(left.values())), on_gpu=on_gpu)
        self.running[future] = RunningJobs(left, standings, tries)

    def _request(self, job: FleetJob, standing: Standing) -> JobRequest:
        made = {
            one.facts["options"]["output"]: one.record["output"] for one in map(self.standings.get, job.after) if one
        }
        return JobRequest(
            job=job,
            folder=str(Path.cwd()),
            records=str(self.fleet.records),
            made={os.path.normpath(name): path for name, path in made.items()},
            facts=standing.facts,
            as_command_line=is_command_line(),
        )

    def _finish(self, future: concurrent.futures.Future[Any]) -> None:
        jobs, standings, tries = self.running.pop(future)
        try:
            records = future.result()
        except Exception as error:
            reason = self.engine.died(error)
            if not reason:
                raise
            if self.engine.is_tried_again and tries < TRIES_OF_JOB:
                self.suspects += [(job, tries + 1) for job in jobs.values()]
                return
            if len(jobs) > 1:  # one of them may have ended it
                for job in jobs.values():
                    self._submit([job], tries)
                return
            message, lacking = f"{reason} ({TRIES_OF_JOB} times)", EnvironmentLacking.exit_code
            records = [self.records.read(name) for name in jobs]
            for name, record in zip(jobs, records, strict=True):
                record |= {"outcome": "failed", "exit": lacking, "message": message}
                record["facts"] = dict(standings[name].facts)
                self.records.write(name, record)
        for job, record in zip(jobs.values(), records, strict=True):
            self._take_in(job, record, standings[job.id])

    def _take_in(self, job: FleetJob, record: Mapping[str, Any], standing: Standing) -> None:
        """Know the result of a job."""
        self.standings[job.id] = Standing(record["outcome"], str(record.get("message", "")), record, standing.facts)
        self.done += 1
        if record["outcome"] in GOOD:
            self.needs.learn(job, record["seconds"])
        else:
            self.on_message(*problem_lines({**record, "adapter": job.adapter, "step": job.step}))

    def _report(self, left: int) -> None:
        """Report how many jobs are known, and the rate of this run."""
        rate = 3600 * self.done / max(time.monotonic() - self.begun, 1e-3)
        total = len(self.fleet.jobs)
        running = sum(len(one.jobs) for one in self.running.values())
        known = total - left - running - len(self.suspects)
        detail = f"{rate:,.0f} an hour" if self.done else ""
        self.on_progress(Progress("running", known, total, "jobs", detail))


# --- Which jobs one worker does together: merges into one checkpoint or their proofs, for which it reads this once ---


def batches(
    jobs: Sequence[FleetJob], needs: NeedsOfJobs, workers: int, most_memory: int | None = None
) -> list[list[FleetJob]]:
    """All jobs, those in one list that one worker does together. No worker is left without work for that.

    `most_memory` is what a worker may take, in bytes.
    """
    groups: dict[object, list[FleetJob]] = {}
    for job in jobs:
        groups.setdefault((job.base_path, job.number) if _may_share(job) else job.id, []).append(job)
    found = []
    for own in groups.values():
        size = 1 if len(own) == 1 or not _is_read_in_blocks(own[0], needs) else _size(own, needs, workers, most_memory)
        found += [own[first : first + size] for first in range(0, len(own), size)]
    order = {job.id: number for number, job in enumerate(jobs)}
    return sorted(found, key=lambda own: order[own[0].id])


def _may_share(job: FleetJob) -> bool:
    """Whether a job merges or proves weights on the processor, and runs no model for it."""
    alone = {"calibration", "memory", "base", "watch"} & job.values.keys()
    return bool(job.kind.together) and job.values.get("device", "cpu") == "cpu" and not alone


def _is_read_in_blocks(job: FleetJob, needs: NeedsOfJobs) -> bool:
    base = needs.located(job.base_path)
    return base is not None and artifact_kind(base) in READ_IN_BLOCKS


def _size(jobs: Sequence[FleetJob], needs: NeedsOfJobs, workers: int, most_memory: int | None) -> int:
    """How many of these jobs a worker does together."""
    size = min(MOST_TOGETHER, math.ceil(len(jobs) / workers))
    while size > 1 and most_memory is not None and needs.memory_of(jobs[:size]) > most_memory:
        size -= 1
    return size
