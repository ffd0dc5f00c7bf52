"""One job, in the process that does it: the function of its command, and the record of what came of it."""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_export.fleet.steps import FleetJob


@dataclass(frozen=True)
class JobRequest:
    """What a worker needs of a job. It has no weights: those are in files."""

    job: FleetJob
    folder: str  # the current folder, to which paths are relative
    records: str
    made: Mapping[str, str]  # outputs of earlier jobs: as the job names them -> as they were written
    facts: Mapping[str, Any]  # of the record
    before: Mapping[str, Any]  # what the last record has of an output that is this fleet's own
    replaces: bool
    as_command_line: bool  # how messages spell options


def perform(request: JobRequest) -> dict[str, Any]:
    """Do a job, and write and return its record. A refusal and a verdict are results; only Ctrl-C is raised."""
    with contextlib.suppress(OSError):  # on another machine, where all paths are addresses
        os.chdir(request.folder)
    from lora_export.fleet.records import STARTED, FleetRecords
    from lora_export.options.commands import declared_flags
    from lora_export.options.spelling import as_command_line

    records, job = FleetRecords(Path(request.records), reads=True), request.job
    begun, notes = time.perf_counter(), list[str]()
    last = records.read(job.id)  # of a worker that died at this job, where Ray gives it to another one
    is_own = request.replaces or (last.get("outcome") == STARTED and bool(last.get("replaces")))
    request = replace(request, replaces=is_own)
    replaces = is_own or (job.output is not None and not output_exists(job.output))
    records.write(job.id, {"outcome": STARTED, "facts": request.facts, "replaces": replaces})
    with as_command_line(declared_flags) if request.as_command_line else contextlib.nullcontext():
        record = _result(request, notes, records)
    seconds = round(time.perf_counter() - begun, 3)
    when = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    record = {**record, "seconds": seconds, "created": when, "notes": notes, "facts": dict(request.facts)}
    records.write(job.id, record)
    return record


def _result(request: JobRequest, notes: list[str], records: Any) -> dict[str, Any]:
    from lora_export.errors import LoraExportError, OutputFailed
    from lora_export.options.tables import options_from_table

    job = request.job
    values = {key: _as_written(value, request.made) for key, value in job.values.items()}
    try:
        is_replaced = request.replaces and job.output is not None and not _removed_from_store(job.output)
        replaced = {"overwrite": True} if is_replaced else {}
        options = options_from_table(
            job.kind.record, values, job.place, **job.fixed(), **replaced, on_message=notes.append
        )
        result = job.kind.function(**vars(options))
    except LoraExportError as error:
        return _failed(error.exit_code, str(error), request)
    except MemoryError as error:
        return _failed(6, f"there is not enough memory: {error}".rstrip(": "), request)
    except OSError as error:
        return _failed(OutputFailed.exit_code, f"{error.filename or 'a file'}: {error.strerror or error}", request)
    except Exception as error:  # noqa: BLE001 - a bug in one job ends no other
        return {**_failed(1, f"a bug in lora-export: {error!r}", request), "details": traceback.format_exc()}
    proof = getattr(result, "proof", None)
    message = "" if proof is None else proof.verdict.headline
    code = getattr(result, "exit_code", 0)
    if code:
        return _failed(code, message if result.error is None else str(result.error), request)
    output = getattr(result, "output", None)
    paths = [str(path) for path in getattr(result, "files", ()) or (() if output is None else (output,))]
    return {
        "outcome": "done" if proof is None else "same",
        "exit": 0,
        "message": message,
        "output": None if output is None else str(output),
        "written": {path: records.identity_of(path) or {} for path in paths},
    }


def _failed(code: int, message: str, request: JobRequest) -> dict[str, Any]:
    outcome = {2: "refused", 3: "refused", 4: "different", 5: "undecided"}.get(code, "failed")
    return {"outcome": outcome, "exit": code, "message": message, "replaces": request.replaces, **request.before}


def _as_written(value: Any, made: Mapping[str, str]) -> Any:
    if isinstance(value, list):
        return [_as_written(one, made) for one in value]
    return made.get(os.path.normpath(value), value) if isinstance(value, str) else value


def output_exists(output: str) -> bool:
    """Whether something has the name of an output, or this name with the suffix of a kind."""
    from lora_export.artifacts.output_names import KINDS
    from lora_export.storage.store_path import StorePath, place

    path = place(output)
    if isinstance(path, StorePath):
        path.newly()
    names = (path.with_name(path.name + suffix) for suffix in ("", *KINDS))
    return any(each.exists() if isinstance(each, StorePath) else os.path.lexists(each) for each in names)


def _removed_from_store(output: str) -> bool:
    """Whether an output is in a store, which replaces none; if it is whole, it is deleted."""
    from lora_export.storage.manifest import MANIFEST
    from lora_export.storage.store_path import StorePath, place

    path = place(output)
    if not isinstance(path, StorePath):
        return False
    whole = path.newly().is_file() or (path / MANIFEST).is_file()
    for each in [path, *path.rglob("*")] if whole else []:
        each.unlink(missing_ok=True)
    return True
