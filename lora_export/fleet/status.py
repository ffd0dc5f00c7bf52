"""The state of a fleet: the outcome of each adapter and step, and the exit code that follows from all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_export.errors import Different, InputRefused, Undecided
from lora_export.fleet.description import FleetFile
from lora_export.fleet.records import JOB_NOT_DONE, FleetRecords, Standing
from lora_export.fleet.steps import FleetJob
from lora_export.report.json_document import as_dict

# The exit code of a fleet is that of the first of these that it has; then of a failure; then of what is not done.
WORST_FIRST = {"different": Different.exit_code, "undecided": Undecided.exit_code, "refused": InputRefused.exit_code}


@dataclass(frozen=True)
class JobStatus:
    """What became of a step of an adapter."""

    base: str
    adapter: str
    step: str
    number: int  # of the step in the file, from 1
    outcome: str  # done, same, different, undecided, refused, failed, not done, not run
    message: str  # the verdict, or why there is none
    exit_code: int  # of the command
    seconds: float | None
    created: str
    output: str


@dataclass(frozen=True)
class FleetStatus:
    """What became of all adapters of a fleet."""

    file: str
    jobs: tuple[JobStatus, ...]
    seconds: float = 0.0  # of the run

    @property
    def counts(self) -> Mapping[str, int]:
        """Outcome -> number of jobs."""
        return Counter(job.outcome for job in self.jobs)

    @property
    def exit_code(self) -> int:
        """0 where everything is done, and every verdict is `same`. What is not done is undecided."""
        codes = [code for outcome, code in WORST_FIRST.items() if outcome in self.counts]
        codes += [job.exit_code for job in self.jobs if job.outcome == "failed"]
        return next(iter(codes), Undecided.exit_code if JOB_NOT_DONE in self.counts else 0)

    def as_document(self) -> dict[str, Any]:
        """The status as the JSON document that the command line prints."""
        return {**as_dict(self), "counts": dict(self.counts), "exit_code": self.exit_code}


def status_of(fleet: FleetFile) -> FleetStatus:
    """The state of a fleet by its records. Reads inputs whose hash is not known, and writes nothing."""
    records, standings = FleetRecords(fleet.records, reads=True), dict[str, Standing]()
    for job in fleet.jobs:
        standings[job.id] = records.standing(job, standings)
    return FleetStatus(str(fleet.path), tuple(job_status(job, standings[job.id]) for job in fleet.jobs))


def job_status(job: FleetJob, standing: Standing) -> JobStatus:
    """What a standing tells of a job. An earlier record of what is not done does not count."""
    record = standing.record if standing.outcome not in (JOB_NOT_DONE, "not run") else {}
    message = standing.message
    if standing.outcome == JOB_NOT_DONE and standing.record:
        message = "base, adapter, options, version or output are others than those of the last run"
    return JobStatus(
        *(job.base, job.adapter, job.step, job.number, standing.outcome, message),
        *(int(record.get("exit", 0)), record.get("seconds"), str(record.get("created", ""))),
        str(record.get("output") or ""),
    )
