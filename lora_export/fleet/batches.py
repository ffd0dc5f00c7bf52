"""Which jobs one worker does together: merges into one checkpoint or their proofs, for which it reads this once."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lora_export.artifacts.kind import artifact_kind
from lora_export.fleet.needs import NeedsOfJobs
from lora_export.fleet.steps import FleetJob
from lora_export.storage.artifact_kinds import ArtifactKind

MOST_TOGETHER = 16  # with three open files for each; more would save less than 1/16 of the base's bytes
READ_IN_BLOCKS = (ArtifactKind.CHECKPOINT, ArtifactKind.EMBEDDER, ArtifactKind.WEIGHTS)


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
