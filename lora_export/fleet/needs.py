"""What a job reads, writes and needs, by headers. Times are those of earlier jobs, or else measured once.

Measured on a Llama of 1.1 billion parameters (2.2 GB) with two cores: a merge takes 2.5 s, `verify` against the base
4.4 s, an export with its proof 125 s, a proof against the model 140 s.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_export.api.memory_needs import (
    OF_AUDIT,
    PROGRAM,
    STREAMED,
    count_floats,
    memory_beside,
    memory_of_model,
    memory_to_export,
    memory_to_verify,
)
from lora_export.artifacts.artifact import open_artifact
from lora_export.callbacks import ignore
from lora_export.errors import InputRefused
from lora_export.fleet.steps import FleetJob
from lora_export.options.fleet import VERIFY_WEIGHTS
from lora_export.storage.artifact_kinds import claimed_kind
from lora_export.storage.hub_cache import locate
from lora_export.storage.object_store import OF_UPLOAD
from lora_export.storage.store_path import StorePath, place

START_SECONDS = {
    "merge": 0.3,
    "convert": 0.5,
    VERIFY_WEIGHTS: 0.5,
    "onnx": 8.0,
    "torchscript": 8.0,
    "verify": 8.0,
}  # seconds
SECONDS_FOR_BYTE = {"merge": 2.5 / 2.2e9, VERIFY_WEIGHTS: 4.4 / 2.2e9}  # of the base
SECONDS_FOR_PARAMETER = {"onnx": 125 / 1.1e9, "torchscript": 125 / 1.1e9, "verify": 140 / 1.1e9}


@dataclass(frozen=True)
class JobNeeds:
    """Of one job: bytes of memory, bytes that it reads and writes, seconds."""

    memory: int
    read: int
    written: int
    seconds: float

    @classmethod
    def together(cls, needs: Iterable[JobNeeds]) -> JobNeeds:
        """The largest memory, and the sums of the rest."""
        all_needs = list(needs)
        return cls(
            max((one.memory for one in all_needs), default=0),
            sum(one.read for one in all_needs),
            sum(one.written for one in all_needs),
            sum(one.seconds for one in all_needs),
        )


class NeedsOfJobs:
    """The needs of jobs. The headers of a base are read once.

    `jobs` are all that one worker may do, one after the other.
    """

    def __init__(self, jobs: Iterable[FleetJob] = ()) -> None:
        self._jobs = tuple(jobs)
        self._located: dict[str, Path | None] = {}
        self._sizes: dict[str, tuple[int, int]] = {}  # path -> bytes, parameters
        self._memory: dict[tuple[str, ...], int] = {}
        self._taken: dict[tuple[str, str], list[float]] = {}  # base, step -> seconds of jobs that are done

    def located(self, path: str) -> Path | None:
        """Where a model or an adapter is, looked up once; None where it is nowhere: the job itself is refused."""
        if path not in self._located:
            self._located[path] = None
            with contextlib.suppress(InputRefused):
                self._located[path] = locate(path, ignore)
        return self._located[path]

    def learn(self, job: FleetJob, seconds: float) -> None:
        """Take in how long a job took: the next ones of this base and step take as long."""
        self._taken.setdefault((job.base, job.step), []).append(seconds)

    def of(self, job: FleetJob) -> JobNeeds:
        """What a job needs; figures that headers do not tell are 0, and the memory is that of the program."""
        size, parameters = self._size(job.base_path)
        adapter, _ = self._size(job.adapter_path)
        written = {"merge": size, "convert": adapter, "onnx": 4 * parameters, "torchscript": 4 * parameters}
        read = adapter if job.step == "convert" else size + adapter
        if job.step == VERIFY_WEIGHTS:
            read += size  # the merged weights
        taken = self._taken.get((job.base, job.step))
        seconds = START_SECONDS[job.step]
        seconds += SECONDS_FOR_BYTE.get(job.step, 0) * size + SECONDS_FOR_PARAMETER.get(job.step, 0) * parameters
        return JobNeeds(
            self._memory_of(job), read, written.get(job.step, 0), sum(taken) / len(taken) if taken else seconds
        )

    def memory_of(self, jobs: Sequence[FleetJob]) -> int:
        """The bytes of memory that a worker needs for these jobs together."""
        first, *others = jobs
        uploads = sum(isinstance(place(job.output), StorePath) for job in others if job.output is not None)
        beside = memory_beside(self._size(job.adapter_path)[0] for job in others)
        beside += len(others) * OF_AUDIT if first.step == VERIFY_WEIGHTS else 0
        kept = 0 if first.kind.has_session else self._kept  # its own proof replaces what is kept
        return self.of(first).memory + kept + beside + uploads * OF_UPLOAD

    @functools.cached_property
    def _kept(self) -> int:
        """The bytes that a worker has after a proof: the program, and the model for further ones."""
        return max((PROGRAM + self._of_model(job) for job in self._jobs if job.kind.has_session), default=0)

    def _of_model(self, job: FleetJob) -> int:
        named = _model_of(job)
        return memory_of_model(str(self.located(named) or named), _dtype_of(job))

    def _memory_of(self, job: FleetJob) -> int:
        if job.step not in SECONDS_FOR_PARAMETER:
            return STREAMED
        dtype, named = _dtype_of(job), _model_of(job)
        candidate = str(job.values.get("candidate", ""))
        key = (named, job.step, dtype, Path(candidate).suffix)
        if key not in self._memory:
            kind = claimed_kind(candidate)
            of_checkpoint = kind is None or kind.is_checkpoint
            model = str(self.located(named) or named)
            needed = (
                memory_to_verify(model, dtype, of_checkpoint, of_checkpoint)
                if job.step == "verify"
                else memory_to_export(model, dtype)
            )
            self._memory[key] = needed or PROGRAM
        return self._memory[key]

    def _size(self, path: str) -> tuple[int, int]:
        if path not in self._sizes:
            located, self._sizes[path] = self.located(path), (0, 0)
            with contextlib.suppress(InputRefused, OSError):
                if located is not None and located.exists():
                    files = open_artifact(located).files.values()
                    self._sizes[path] = sum(file.stat().st_size for file in files), count_floats(located)
        return self._sizes[path]


def _model_of(job: FleetJob) -> str:
    return str(job.values.get("model", job.base_path))  # a proof may name another model


def _dtype_of(job: FleetJob) -> str:
    return str(job.values.get("dtype", "float32"))
