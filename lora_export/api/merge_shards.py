"""The files of one merge as jobs: workers write the shards, and this process the index and the manifest.

Each worker reads the adapters and the headers of the base again, and makes the plan again: no weights pass between
processes. It writes nothing unless the hash of all that determines a shard is the one that this process has computed.
This process alone holds the lock of the output, records in a store which shards are whole, and on the disk gives them
their names. A worker that was taken for dead, and goes on while another one does its job, changes nothing any more.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import shutil
import uuid
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_export.api.memory_needs import jobs_that_fit, memory_to_merge
from lora_export.api.merge_base import merge_of, opened_base, plan_over
from lora_export.api.merge_request import MergeRequest, read_adapters
from lora_export.callbacks import ignore, in_bytes
from lora_export.errors import InputRefused, LoraExportError, MatchError, OutputFailed, WrongUsage
from lora_export.lora import Adapter
from lora_export.options.commands import declared_flags
from lora_export.options.spelling import as_command_line, is_command_line, named
from lora_export.plan import Plan
from lora_export.storage.store_output import begun_at, written_by_worker
from lora_export.storage.store_path import StorePath
from lora_export.weights.apply_step import Backend
from lora_export.weights.checkpoint import Checkpoint
from lora_export.weights.merge import CheckpointMerge
from lora_export.weights.written_file import WrittenFile, made_before, record_made, written_with
from lora_export.workers.engines import THREADS, each_result, on_ray, processes

UNFINISHED = ".unfinished"  # a folder of the stage, for shards on the disk that are not whole


@dataclass(frozen=True)
class ShardRequest:
    """What a worker needs to write one shard. It has no weights."""

    merge: bytes = field(repr=False)  # the request of the whole, pickled; its adapters are the paths
    folder: str  # the current folder, to which paths are relative
    stage: Path
    shard: str
    digest: str  # see `CheckpointMerge.digest`
    run: str  # that of the output in a store (see `written_by_worker`)
    as_command_line: bool  # how messages spell options

    @property
    def name(self) -> str:
        return self.shard


# --- In this process ---


def note_on_one_file(request: MergeRequest, base: Checkpoint) -> str:
    """Why this process writes the merge by itself, whatever the number of processes; else empty.

    Raises WrongUsage where the files of the merge cannot be written by several workers.
    """
    shared = named("ray", request.ray) if request.ray is not None else named("jobs", request.jobs)
    if len(base.shards) < 2:
        one_file = f"{base.path} has its weights in one file, which one process writes"
        if request.ray is None:
            return f"{one_file}: {shared} changes nothing"
        raise WrongUsage(f"{one_file}. Leave {shared} out, or split the base")
    if any(isinstance(each, Adapter) for each in request.located):
        raise WrongUsage(f"{shared}: each worker reads the adapters. Give their paths, and not adapters in memory")
    if any(not adapter.sha256 for adapter in request.adapters):
        raise WrongUsage(f"{shared}: an adapter has no hash by which workers could know it. Convert it first")
    return ""


def make_shards(
    request: MergeRequest, steps: Plan, base: Checkpoint, stage: Path, settings: Mapping[str, Any], size: int
) -> dict[str, WrittenFile]:
    """Let workers write the shards of a merge into its stage. Returns what `CheckpointMerge.into` takes as `made`.

    `size` is what the whole writes, in bytes, for the progress. Shards that a stopped run has made in a store are not
    made again. A shard whose worker dies is tried again. Raises what a worker raises, EnvironmentLacking where one dies
    again and again, and OutputFailed where a shard changes or a worker does not see the stage.
    """
    maker = _maker(request, steps, base, settings)
    progress = in_bytes(request.on_progress, "merging", size)
    merge = pickle.dumps(replace(request, adapters=(), on_message=ignore, on_progress=ignore))
    folder, spelling = str(Path.cwd()), is_command_line()
    begun = begun_at(stage)
    run = "" if begun is None else begun.run
    requests = [ShardRequest(merge, folder, stage, name, maker.digest(name), run, spelling) for name in base.shards]
    made = {one.shard: found for one in requests if (found := made_before(stage / one.shard, one.digest))}
    for found in made.values():
        progress(found.file.size)
    left = [one for one in requests if one.shard not in made]
    (stage / UNFINISHED).mkdir()
    with contextlib.closing(_outcomes(request, left)) as outcomes:  # no worker is left when the stage is removed
        for one, outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
            made[one.shard] = _seen(stage / one.shard, one.digest, outcome)
            progress(made[one.shard].file.size)
    if not isinstance(stage, StorePath):
        ended = (stage / UNFINISHED).replace(stage / f"{UNFINISHED}.ended")  # no worker finds it any more
        shutil.rmtree(ended)  # with what workers that died have left
    return made


def _outcomes(
    request: MergeRequest, shards: Sequence[ShardRequest]
) -> Generator[tuple[ShardRequest, dict[str, Any] | Exception], None, None]:
    """What `write_shard` returns of each, in the order in which they end."""
    if not shards:
        return
    memory = memory_to_merge(request.sources)
    if request.ray is not None:
        engine = on_ray(write_shard, request.ray, request.jobs)
    else:
        most = min(request.jobs, len(shards))
        engine = processes(write_shard, jobs_that_fit(most, memory, request.on_message))
    with engine as opened:
        yield from each_result(opened, shards, memory)


def _maker(request: MergeRequest, steps: Plan, base: Checkpoint, settings: Mapping[str, Any]) -> CheckpointMerge:
    threads = os.environ.get(THREADS[0], "")  # of a worker: its share of the cores
    backend = Backend(threads=int(threads) if threads.isdecimal() and int(threads) else None)
    return merge_of(request, steps, base, backend, settings)


def _seen(path: Path, digest: str, facts: Mapping[str, Any]) -> WrittenFile:
    """The shard that a worker has written, as this process sees it."""
    if isinstance(path, StorePath):
        path.newly()
    else:
        (path.parent / UNFINISHED / facts["part"] / path.name).replace(path)
    return record_made(path, digest, written_with(path, facts))


# --- In a worker ---


def write_shard(request: ShardRequest) -> dict[str, Any] | Exception:
    """Write one shard. Returns the facts of `WrittenFile`, or the error that ends the merge."""
    with contextlib.suppress(OSError):  # on another machine, where all paths are addresses
        os.chdir(request.folder)
    spelling = as_command_line(declared_flags) if request.as_command_line else contextlib.nullcontext()
    try:
        with spelling:
            return _written(request)
    except MatchError as error:
        return InputRefused(error.lines)  # which can be pickled
    except (LoraExportError, OSError, MemoryError) as error:
        return error


def _written(request: ShardRequest) -> dict[str, Any]:
    maker, stage = _planned(request.merge, request.folder), request.stage
    if maker.digest(request.shard) != request.digest:
        raise InputRefused(
            f"{request.shard}: a worker sees another base, adapter or version of lora-export than the process that "
            "began the merge"
        )
    if isinstance(stage, StorePath):
        with written_by_worker(stage, request.shard, request.run) as path:
            path.unlink(missing_ok=True)  # of a worker that died after its upload
            return maker.write_file(path, request.shard).facts
    if not (stage / UNFINISHED).is_dir():
        raise OutputFailed(
            f"a worker does not see the folder {stage.parent}, or was taken for dead. All machines need the folder, or "
            "an output in a store"
        )
    part = stage / UNFINISHED / uuid.uuid4().hex  # a worker that died may have left its own
    part.mkdir()
    return maker.write_file(part / request.shard, request.shard).facts | {"part": part.name}


@functools.lru_cache(1)
def _planned(merge: bytes, _folder: str) -> CheckpointMerge:
    """The plan of a merge that began in a folder, made once for all shards that this process writes."""
    request: MergeRequest = pickle.loads(merge)  # noqa: S301 - of the process that started this one
    request = replace(request, adapters=read_adapters(request, request.located, request.reading))
    base = opened_base(request)
    return _maker(request, plan_over(base, request), base, request.combined.settings)
