"""What a run would do, by headers: what does not fit, what is done, bytes, memory and time. Writes nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lora_export import formats
from lora_export.artifacts.kind import artifact_kind
from lora_export.callbacks import ignore
from lora_export.errors import InputRefused, LoraExportError, MatchError
from lora_export.fleet.description import FleetFile
from lora_export.fleet.needs import JobNeeds, NeedsOfJobs
from lora_export.fleet.records import GOOD, FleetRecords, Standing
from lora_export.fleet.steps import FLEET_STEPS, FleetJob
from lora_export.fleet.worker import output_exists
from lora_export.formats.adapter_files import by_headers
from lora_export.options.combining import Applied
from lora_export.options.declaring import options_of
from lora_export.options.fleet import entries_of, options_from_table
from lora_export.options.merge import MergeOptions
from lora_export.report.json_document import as_dict
from lora_export.storage.artifact_kinds import ArtifactKind
from lora_export.storage.hub_cache import locate

MERGED_INTO = (ArtifactKind.CHECKPOINT, ArtifactKind.EMBEDDER, ArtifactKind.PIPELINE, ArtifactKind.WEIGHTS,
               ArtifactKind.GGUF, ArtifactKind.GRAPH)  # fmt: skip


@dataclass(frozen=True)
class StepPlan:
    """A step of all adapters: how many jobs it has and what those need that are not done."""

    step: str
    jobs: int
    done: int
    needs: JobNeeds


@dataclass(frozen=True)
class JobProblem:
    """Why a job would be refused."""

    base: str
    adapter: str
    step: str
    text: str


@dataclass(frozen=True)
class FleetPlan:
    """What a run would do."""

    file: str
    adapters: int
    steps: tuple[StepPlan, ...]
    problems: tuple[JobProblem, ...]
    unread: int  # files whose hash is not known: what depends on them counts as not done

    @property
    def exit_code(self) -> int:
        """That of a refused input where a job would be refused."""
        return InputRefused.exit_code if self.problems else 0

    def as_document(self) -> dict[str, Any]:
        """The plan as the JSON document that the command line prints."""
        return {**as_dict(self), "exit_code": self.exit_code}


def plan_of(fleet: FleetFile) -> FleetPlan:
    """The plan of a run. Reads headers, and of adapters small tensors too; what has no known hash is not done."""
    records, needs, standings = FleetRecords(fleet.records, reads=False), NeedsOfJobs(), dict[str, Standing]()
    for job in fleet.jobs:
        standings[job.id] = records.standing(job, standings)
        if standings[job.id].outcome in GOOD:
            needs.learn(job, standings[job.id].record["seconds"])
    problems = [problem for own in _by_adapter(fleet.jobs) for problem in _problems(own, standings)]
    unread = len(records.unread) if fleet.records.exists() else 0  # before the first run nothing is known anyway
    steps = []
    for number in dict.fromkeys(job.number for job in fleet.jobs):
        jobs = [job for job in fleet.jobs if job.number == number]
        left = [job for job in jobs if not standings[job.id].is_settled]
        steps.append(StepPlan(jobs[0].step, len(jobs), len(jobs) - len(left), JobNeeds.together(map(needs.of, left))))
    return FleetPlan(str(fleet.path), len(_by_adapter(fleet.jobs)), tuple(steps), tuple(problems), unread)


def _by_adapter(jobs: tuple[FleetJob, ...]) -> list[list[FleetJob]]:
    found: dict[tuple[str, str], list[FleetJob]] = {}
    for job in jobs:
        found.setdefault((job.base, job.adapter), []).append(job)
    return list(found.values())


def _problems(jobs: list[FleetJob], standings: dict[str, Standing]) -> Iterator[JobProblem]:
    """Why jobs of one adapter would be refused: it does not fit, or the place of an output is taken."""
    shown = set()
    for job in jobs:
        if standings[job.id].is_settled:
            if standings[job.id].outcome == "refused":
                yield JobProblem(job.base, job.adapter, job.step, standings[job.id].message)
            continue
        is_taken = job.output is not None and output_exists(job) and not job.values.get("overwrite")
        if is_taken and not standings[job.id].own:
            text = f"{job.output} exists, and this fleet did not write it. Remove it, or state `overwrite = true`"
            yield JobProblem(job.base, job.adapter, job.step, text)
        text = _misfit(job)
        if text and text not in shown:
            shown.add(text)
            yield JobProblem(job.base, job.adapter, job.step, text)


def _misfit(job: FleetJob) -> str:
    """Why the adapter does not fit the base; empty where headers show no reason."""
    try:
        options: Any = options_from_table(job.kind.record, job.values, job.place, **job.fixed())
        with by_headers(), entries_of(job.kind.record):
            if job.step == "onnx":
                from lora_export.api.onnx import checked_request  # ONNX takes time to import

                checked_request(options, locate(job.base_path, ignore))
            if job.step == "merge":
                FLEET_STEPS["merge"].function(**vars(options) | {"dry_run": True})
            elif isinstance(options, Applied) and artifact_kind(locate(job.base_path, ignore)) in MERGED_INTO:
                _plan_alone(job, options)
            else:
                _load_adapter(job, options)
    except LoraExportError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return ""


def _load_adapter(job: FleetJob, options: Any) -> None:
    """Read the adapter as the job will. Raises InputRefused."""
    activated = job.step == "verify" or getattr(options, "lora", "") == "nodes"
    formats.load(locate(job.adapter_path, ignore), options=options.reading, activated=activated)


def _plan_alone(job: FleetJob, options: Applied) -> None:
    """Plan the adapter on the base for a step that does not merge. Only misfits count."""
    _load_adapter(job, options)
    same = {one.name: getattr(options, one.name) for one in options_of(Applied)}
    same |= {"combination": options.combination, "reading": options.reading, "dry_run": True}
    merged = MergeOptions(job.base_path, job.adapter_path, os.devnull, **same)
    try:
        FLEET_STEPS["merge"].function(**vars(merged))
    except MatchError:
        raise
    except LoraExportError:  # a merge has conditions of its own
        return
