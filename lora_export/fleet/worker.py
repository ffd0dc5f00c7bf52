"""Jobs in the process that does them: the functions of their commands, and the records of what came of them."""

from __future__ import annotations

import contextlib
import filecmp
import functools
import os
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.errors import OutputFailed
from lora_export.fleet.records import FORMER, HASHES, PUBLISHED, STARTED, FleetRecords
from lora_export.fleet.steps import FleetJob, absolute
from lora_export.storage.atomic_output import refuse_foreign_files
from lora_export.storage.manifest import MANIFEST
from lora_export.storage.publication import watched
from lora_export.storage.signature import signature_of
from lora_export.storage.store_path import StorePath, place

if TYPE_CHECKING:
    from lora_export.verification.proof_session import ProofSession

GRAPHS = ".graphs"  # a folder beside the records: bases that were exported in this run


@dataclass(frozen=True)
class JobRequest:
    """What a worker needs of a job. It has no weights: those are in files."""

    job: FleetJob
    folder: str  # the current folder, to which paths are relative
    records: str
    made: Mapping[str, str]  # outputs of earlier jobs: as the job names them -> as they were written
    facts: Mapping[str, Any]  # of the record
    as_command_line: bool  # how messages spell commands
    own: Mapping[str, Any] = field(default_factory=dict)  # what exists of its output, and this fleet wrote

    @property
    def name(self) -> str:
        return self.job.id


@dataclass(frozen=True)
class JobBatch:
    """What one worker does: one job, or merges into one base in one pass over it."""

    requests: tuple[JobRequest, ...]

    @property
    def name(self) -> str:
        """What a cluster shows of it."""
        first, *others = (request.job.id for request in self.requests)
        return f"{first} and {len(others)} more" if others else first


@functools.cache
def session_of_process() -> ProofSession:
    """What the proofs of this process have in common: it does many jobs, and most are of one base."""
    from lora_export.verification.proof_session import ProofSession

    return ProofSession()


def perform(batch: JobBatch) -> list[dict[str, Any]]:
    """Do jobs, and write and return their records. Refusals and verdicts are results; only Ctrl-C is raised."""
    with contextlib.suppress(OSError):  # on another machine, where all paths are addresses
        os.chdir(batch.requests[0].folder)
    from lora_export.options.commands import declared_flags
    from lora_export.options.fleet import entries_of
    from lora_export.options.spelling import as_command_line

    records = FleetRecords(Path(batch.requests[0].records), reads=True)
    begun, notes = time.perf_counter(), [list[str]() for _ in batch.requests]
    attempt = uuid.uuid4().hex
    requests = [_started(request, records, attempt) for request in batch.requests]
    door = as_command_line(declared_flags) if requests[0].as_command_line else contextlib.nullcontext()
    spelling = entries_of(requests[0].job.kind.record)
    with door, spelling, watched(functools.partial(_record_published, requests, records, attempt)):
        results = _results(requests, notes)
        found = [_record_of(*each, records) for each in zip(requests, results, strict=True)]
    seconds = round((time.perf_counter() - begun) / len(requests), 3)
    when = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    for request, record, own in zip(requests, found, notes, strict=True):
        record |= {"seconds": seconds, "created": when, "notes": own, "facts": dict(request.facts)}
        if "written" not in record:
            record.update(_own(request, records))
        record[HASHES] = {path: records.states_of(path) for path in record["written"]}
        last = records.read(request.job.id)
        if last.get("attempt") == attempt:  # this worker was not taken for dead meanwhile
            records.write(request.job.id, {**record, FORMER: records.former(last, record["written"])})
    return found


def _started(request: JobRequest, records: FleetRecords, attempt: str) -> JobRequest:
    """The request, after the record that its job has begun.

    The last record may be of a worker that died at this job, where Ray gives it to another one.
    """
    own = _own(request, records)
    former = records.former(records.read(request.job.id), own["written"])
    started = {"outcome": STARTED, "facts": request.facts, "attempt": attempt, **own, FORMER: former}
    records.write(request.job.id, started)
    return replace(request, own=own["written"])


def _own(request: JobRequest, records: FleetRecords) -> dict[str, Any]:
    """What a record has of an output that is there and that no job has made again."""
    last = records.read(request.job.id)
    own = records.own(request.job, last)
    return {"written": own, **({"output": last["output"]} if own and "output" in last else {})}


def _record_published(
    requests: Sequence[JobRequest], records: FleetRecords, attempt: str, contents: Mapping[Path, Path]
) -> None:
    """Record what a job is about to publish: after a kill, nothing else in its place is the fleet's own.

    Raises OutputFailed, which prevents it, where another worker has the job.
    """
    for request in requests:
        names = {absolute(path): path for path in request.job.output_paths()}
        goal = next((names[path] for path in map(absolute, contents) if path in names), None)
        if goal is None:  # a report, or a graph that other jobs of this run share
            continue
        record = records.read(request.job.id)
        if record.get("attempt") != attempt:
            raise OutputFailed(f"{goal}: this worker was taken for dead, and another one has the job")
        if not request.job.values.get("overwrite") and not isinstance(goal, StorePath):  # a store replaces nothing
            for path, each in contents.items():
                _refuse_foreign(goal.with_name(path.name), each, request.own)
        found = {
            str(goal.with_name(path.name)): records.identity_in_stage(each) or {} for path, each in contents.items()
        }
        records.write(request.job.id, {**record, PUBLISHED: found})


def _refuse_foreign(path: Path, content: Path, own: Mapping[str, Any]) -> None:
    """Raise OutputFailed for an output that exists, with another content, and that the fleet wrote under no name."""
    if not os.path.lexists(path) or absolute(path) in {absolute(place(each)) for each in own}:
        return
    is_equal = path.is_file() and not path.is_symlink() and filecmp.cmp(content, path, shallow=False)
    if not (is_equal and content.is_file()):
        raise OutputFailed(f"{path} exists, and this fleet did not write it. Remove it, or state `overwrite = true`")


def _results(requests: Sequence[JobRequest], notes: Sequence[list[str]]) -> list[Any]:
    """What the functions of the jobs return, or the errors that they raise."""
    options = [_attempted(_options, *each) for each in zip(requests, notes, strict=True)]
    good = [one for one in options if not isinstance(one, Exception)]
    if len(requests) == 1:
        function = requests[0].job.kind.function
        return [_attempted(function, **vars(one)) for one in good] or options
    made = _attempted(requests[0].job.kind.done_together, good)
    results = iter([made] * len(good) if isinstance(made, Exception) else made)
    return [one if isinstance(one, Exception) else next(results) for one in options]


def _attempted(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """What a function returns, or the error that it raises: a bug in one job ends no other."""
    try:
        return function(*arguments, **keywords)
    except Exception as error:  # noqa: BLE001
        return error


def _options(request: JobRequest, notes: list[str]) -> Any:
    """The record of options of a job. What is in a store where it is to be written is removed."""
    from lora_export.options.fleet import options_from_table

    job = request.job
    values = {key: _as_written(value, request.made) for key, value in job.values.items()}
    more: dict[str, Any] = {"overwrite": True} if request.own and not _removed_from_store(request) else {}
    if job.step == "onnx":
        more["graphs"] = Path(request.records) / GRAPHS
    if job.kind.has_session:
        more["session"] = session_of_process()
    return options_from_table(job.kind.record, values, job.place, **job.fixed(), **more, on_message=notes.append)


def _record_of(request: JobRequest, result: Any, records: FleetRecords) -> dict[str, Any]:
    """The record of what a job returned or raised. The signature of a file is part of what it wrote."""
    from lora_export.errors import LoraExportError

    if isinstance(result, LoraExportError):
        return _failed(result.exit_code, str(result))
    if isinstance(result, MemoryError):
        return _failed(6, f"there is not enough memory: {result}".rstrip(": "))
    if isinstance(result, OSError):
        why = f"{result.filename or 'a file'}: {result.strerror or result}"
        return _failed(OutputFailed.exit_code, why)
    if isinstance(result, Exception):
        details = "".join(traceback.format_exception(result))
        return {**_failed(1, f"a bug in lora-export: {result!r}"), "details": details}
    proof = getattr(result, "proof", None)
    message = "" if proof is None else proof.verdict.headline
    code = getattr(result, "exit_code", 0)
    if code:
        return _failed(code, message if result.error is None else str(result.error))
    output = getattr(result, "output", None)
    is_folder = output is not None and output.is_dir()
    files = () if is_folder else getattr(result, "files", ())
    paths = [str(path) for path in files or (() if output is None else (output,))]
    if "sign" in request.job.values and output is not None and not is_folder:
        paths.append(str(signature_of(output)))
    written = {path: records.identity_of(path) or {} for path in paths}
    published = records.read(request.job.id).get(PUBLISHED) or {}
    for path, one in written.items():
        is_by_hashes = "hashes" in published.get(path, {}) and "sizes" not in one  # not through the disk to a store
        if is_by_hashes and one != published[path]:
            return _failed(OutputFailed.exit_code, f"{path}: something changed its files as soon as they were written")
    return {
        "outcome": "done" if proof is None else "same",
        "exit": 0,
        "message": message,
        "output": None if output is None else str(output),
        "written": written,
    }


def _failed(code: int, message: str) -> dict[str, Any]:
    outcome = {2: "refused", 3: "refused", 4: "different", 5: "undecided"}.get(code, "failed")
    return {"outcome": outcome, "exit": code, "message": message}


def _as_written(value: Any, made: Mapping[str, str]) -> Any:
    if isinstance(value, list):
        return [_as_written(one, made) for one in value]
    return made.get(os.path.normpath(value), value) if isinstance(value, str) else value


def output_exists(job: FleetJob) -> bool:
    """Whether something has the name of a job's output, or this name with a suffix that its command may add."""
    paths = job.output_paths()
    return any(each.newly().exists() if isinstance(each, StorePath) else os.path.lexists(each) for each in paths)


def _removed_from_store(request: JobRequest) -> bool:
    """Whether an output is in a store, which replaces none; what the fleet wrote of it is deleted.

    Raises OutputFailed, and deletes nothing, where a folder has other files.
    """
    own = [path for path in map(place, request.own) if isinstance(path, StorePath)]
    folders = [path for path in own if not path.newly().is_file()]
    for folder in folders:
        refuse_foreign_files(folder)
    for folder in folders:
        inside = [each for each in folder.rglob("*") if each != folder / MANIFEST]  # which is deleted last
        for each in (*inside, folder / MANIFEST):
            each.unlink(missing_ok=True)
    for path in own:
        path.unlink()
    return bool(own)
