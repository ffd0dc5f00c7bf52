"""What is done: a record for each job, which counts while base, adapter, options, version and output fit.

The existence of a file proves nothing. The contents of inputs and outputs are compared by hashes. A file is read again
where its size, its times or its place on the disk are others than when it was hashed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_export.api.load_model import model_paths
from lora_export.artifacts.artifact import Artifact, open_artifact
from lora_export.artifacts.files import files_of_artifact
from lora_export.callbacks import ignore
from lora_export.errors import InputRefused
from lora_export.fleet.steps import OF_THE_RUN, FleetJob, absolute
from lora_export.options.fleet import keys_of
from lora_export.report.files import refuse_other_file
from lora_export.storage import atomic_output, input_files, json_files
from lora_export.storage.artifact_kinds import ArtifactKind
from lora_export.storage.hashes import FAST, file_hash
from lora_export.storage.hub_cache import locate
from lora_export.storage.store_path import StorePath, newly_opened, place, unfinished
from lora_export.version import __version__

RECORD_SCHEMA = "lora-export/fleet-record/1"
STARTED, JOB_NOT_DONE = "started", "not done"
PUBLISHED = "published"  # in a record: what the job was about to publish, as in its "written"
HASHES = "hashes"  # in a record, by output: those of its files, each behind the file's state
StatesAndHashes = Mapping[str, list[Any]]  # by the name of a file
NONE_KNOWN: StatesAndHashes = {}
FORMER = "former"  # in a record: what the job wrote under other names, each output as a record has it in "written"
GOOD = ("done", "same")
# Outcomes that a job has again while nothing changes. `failed` is tried again
SETTLED = (*GOOD, "different", "undecided", "refused")
OUTCOMES = (*SETTLED, "failed")


@dataclass(frozen=True)
class Standing:
    """What is known of a job."""

    outcome: str  # one of SETTLED, "failed", "not done", or "not run" after a job that was not good
    message: str = ""
    record: Mapping[str, Any] = field(default_factory=dict)  # the last one, also where it does not count any more
    facts: Mapping[str, Any] = field(default_factory=dict)  # what a record has to match
    own: Mapping[str, Any] = field(default_factory=dict)  # what exists of its output, where this fleet wrote it

    @property
    def is_settled(self) -> bool:
        return self.outcome in SETTLED or self.outcome == "not run"


class FleetRecords:
    """The records of a fleet, in a folder.

    With `reads`, a file whose hash is not known is read. Without, whatever depends on it is not done.
    """

    def __init__(self, folder: Path, *, reads: bool):
        self.folder, self.reads = folder, reads
        self._hashes_file = folder / "hashes.json"
        self._new: dict[str, list[Any]] = {}  # by the name of a file: what this process knows beyond the file of hashes
        self._has_new_hashes, self._write_again = False, 0.0
        self._published: dict[tuple[int, ...], str] = {}  # inode, size and time of a file in a stage -> its hash
        self.unread: set[str] = set()  # files whose hash is not known, where they are not to be read
        self._contents: dict[str, dict[str, str] | None] = {}  # of this run, by path

    def standing(self, job: FleetJob, others: Mapping[str, Standing]) -> Standing:
        """What is known of a job, by the standings of those `after` which it comes."""
        before = {name: others[name] for name in job.after}
        record = self.read(job.id)
        if bad := [name for name, one in before.items() if one.outcome not in (*GOOD, JOB_NOT_DONE)]:
            return Standing("not run", f"after {bad[0]}: {before[bad[0]].outcome}", record)
        is_open, own = any(one.outcome == JOB_NOT_DONE for one in before.values()), self.own(job, record)
        if (facts := None if is_open else self._facts(job, before.values())) is None:
            return Standing(JOB_NOT_DONE, record=record, own=own)
        written = record.get("written") or {}
        is_known = record.get("facts") == facts and record.get("outcome") in OUTCOMES
        if is_known and written.items() <= own.items() and not _lacks_report(job, record["outcome"]):
            return Standing(record["outcome"], str(record.get("message", "")), record, facts, own)
        return Standing(JOB_NOT_DONE, record=record, facts=facts, own=own)

    def own(self, job: FleetJob, record: Mapping[str, Any]) -> dict[str, Any]:
        """What exists of the output of a job, by path, where each of it is what this fleet wrote; else nothing.

        Of a worker that died at the job, it may also be what that was about to publish. What the record has of
        another `output` that the file named before is not the job's, unless the file names it again.
        """
        found: dict[str, Any] = {}
        for each in (*record.get(FORMER, ()), record):
            found |= self._own_of_one(job, each)
        return found

    def _own_of_one(self, job: FleetJob, record: Mapping[str, Any]) -> dict[str, Any]:
        known = [record.get(key) or {} for key in (PUBLISHED, "written")]
        names = {absolute(place(path)) for each in known for path in each}
        if job.output is not None and names.isdisjoint(map(absolute, job.output_paths())):
            return {}
        hashes = record.get(HASHES, {})
        paths = [path for path in {**known[0], **known[1]} if os.path.lexists(path) or place(path).exists()]
        found = {path: self.identity_of(path, hashes.get(path, {})) for path in paths}
        is_uncertain = PUBLISHED in record or record.get("outcome") in (STARTED, None)  # a kill, or a former output
        for path, one in found.items():
            written = [each[path] for each in known if path in each]
            # A job that began when its own output could not be read has recorded None
            is_own = (
                self._is_known(one, written) or _is_published(path, one, record.get(PUBLISHED, {}).get(path))
                if one
                else self._is_unread(path, is_uncertain and None not in written)
            )
            if not is_own:
                return {}
        return found

    def _is_known(self, found: Mapping[str, Any], known: Iterable[Mapping[str, Any] | None]) -> bool:
        """Whether an output is one of those that were written. A file of it may be missing or damaged by now."""
        return any(
            found == one or (one and "record" in found and found["record"] == one.get("record")) for one in known
        )

    def _is_unread(self, path: str, may_be_foreign: bool) -> bool:
        """Whether an output has no hash yet, or is damaged so that it cannot be read, and is not being written."""
        return not self.reads or not (may_be_foreign or unfinished(place(path)))

    def former(self, record: Mapping[str, Any], written: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What the next record has as FORMER, by the last one and by what the next one has as "written"."""
        last = {"written": {**(record.get(PUBLISHED) or {}), **(record.get("written") or {})}}
        every = [each["written"].items() for each in (*record.get(FORMER, ()), last)]
        left = [{path: one for path, one in each if path not in written} for each in every]
        return [{"written": each} for each in left if each]

    def read(self, job_id: str) -> dict[str, Any]:
        """The record of a job; empty where it has none. Raises InputRefused for a damaged one."""
        path = self._path(job_id)
        return json_files.read_json(path) if path.is_file() else {}

    def write(self, job_id: str, record: Mapping[str, Any]) -> None:
        """Write the record of a job, in one step."""
        path = self._path(job_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, {"schema": RECORD_SCHEMA, **record})

    @functools.cached_property
    def _known(self) -> dict[str, Any]:
        """The file of hashes. A worker rarely needs it: it wrote its outputs itself, and records have the former."""
        return json_files.read_json(self._hashes_file) if self._hashes_file.is_file() else {}

    def write_hashes(self, *, last: bool = False) -> None:
        """Write the hashes of files that were read since the last time: the next run does not read these files.

        The file has those of all adapters. Until the `last` time, writing it takes a twentieth of the time at most.
        """
        if self._has_new_hashes and (last or time.monotonic() >= self._write_again):
            begun = time.monotonic()
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self._hashes_file, self._known | self._new)
            self._has_new_hashes, self._write_again = False, begun + 20 * (time.monotonic() - begun)

    def identity_of(self, path: str | Path, known: StatesAndHashes = NONE_KNOWN) -> dict[str, Any] | None:
        """What an output is: its own record, and the hashes of its files; in a store their sizes and ETags.

        In a store, the record of a graph or a program, which is read on the disk alone, is not part of it.

        `known` is what the record of its job has of the files. Where a hash is not known and files are not to be read,
        there are no hashes. None where the output does not exist or cannot be read, or nothing is known.
        """
        try:
            artifact = open_artifact(opened := path if isinstance(path, Path) else newly_opened(path))
            if _is_read_on_disk_alone(artifact):
                files = files_of_artifact(opened, is_graph=False)
                return {"sizes": {name: _size_of(file) for name, file in files.items()}}
            content = artifact.record.content if artifact.path.exists() else {}
            text = json.dumps(content, sort_keys=True).encode(errors="surrogatepass")
            own = {"record": hashlib.sha256(text).hexdigest()} if content else {}
            if content and isinstance(artifact.path, StorePath):
                return {"sizes": {name: _size_of(file) for name, file in artifact.files.items()}, **own}
            hashes = self._hashes_of(artifact.files, known)
            return ({"hashes": hashes} if hashes else {}) | own or None
        except (InputRefused, OSError):
            return None

    def identity_in_stage(self, path: Path) -> dict[str, Any] | None:
        """What an output is that this process wrote and is about to publish.

        Its files keep inode, size and time under their final names: they are not read again there.
        """
        try:
            artifact = open_artifact(path)
            stated = artifact.record.content.get("files", {}) if artifact.path.exists() else {}
            for name, file in {} if isinstance(path, StorePath) else artifact.files.items():
                digest = stated.get(name, {}).get(FAST) or file_hash(file, FAST)
                self._published[_place_of(file)] = digest
        except (InputRefused, OSError):
            return None
        return self.identity_of(path)

    def states_of(self, path: str) -> dict[str, list[Any]]:
        """What is known of the files of an output, for the record of its job: no other process has to read them."""
        try:
            files = open_artifact(newly_opened(path)).files
        except (InputRefused, OSError):
            return {}
        names = {name: str(file.absolute()) for name, file in files.items()}
        known = {name: self._new.get(file) or self._known.get(file) for name, file in names.items()}
        return {name: one for name, one in known.items() if one}

    def _path(self, job_id: str) -> Path:
        return self.folder / f"{job_id}.json"

    def _facts(self, job: FleetJob, before: Iterable[Standing]) -> dict[str, Any] | None:
        """What the result of a job depends on; None where the hash of a file is not known."""
        known = keys_of(job.kind.record)
        made = {os.path.normpath(one.facts["options"]["output"]): one.record["written"] for one in before}
        read = {path for paths in job.inputs().values() for path in paths if os.path.normpath(path) not in made}
        base = [job.base_path] if job.kind.base else []
        contents = {path: self._contents_of(path) for path in {*base, job.adapter_path, *read}}
        if None in contents.values():
            return None
        facts = {
            "step": job.step,
            "options": {key: one for key, one in job.values.items() if known[key][1].name not in OF_THE_RUN},
            "base": [contents[path] for path in base],
            "adapter": contents[job.adapter_path],
            "inputs": {path: contents[path] for path in sorted(read)},
            "made": made,
            "version": __version__,
            "taken": [str(path) for path in job.reports() if _is_other_file(path)],
        }
        return dict(json.loads(json.dumps(facts, default=str)))  # as a record has it

    def _contents_of(self, path: str) -> dict[str, str] | None:
        """The hash of each file of a path. None where one is not known, and files are not to be read.

        Empty for what is no file, such as a factory of a package, and for what cannot be read: the job will refuse it.
        """
        if path not in self._contents:
            self._contents[path] = {}
            with contextlib.suppress(InputRefused, OSError):
                found = model_paths(locate(path, ignore))  # of FILE.py:FACTORY, the file
                self._contents[path] = self._hashes_of(open_artifact(newly_opened(found[0])).files if found else {})
        return self._contents[path]

    def _hashes_of(self, files: Mapping[str, Path], known: StatesAndHashes = NONE_KNOWN) -> dict[str, str] | None:
        """The hash of each file, by name; None where one is not known."""
        hashes = {name: self._hash_of(file, known.get(name)) for name, file in files.items()}
        found = {name: digest for name, digest in hashes.items() if digest is not None}
        return found if len(found) == len(hashes) else None

    def _hash_of(self, file: Path, known: list[Any] | None = None) -> str | None:
        name, state = str(file.absolute()), _state_of(file)
        published = self._published.get(_place_of(file)) if self._published else None
        for *before, digest in filter(None, (known, self._new.get(name), None if published else self._known.get(name))):
            if before == state:
                return str(digest)
        if published is None and not self.reads:
            self.unread.add(str(file))
            return None
        digest = published or file_hash(file, FAST)
        self._new[name], self._has_new_hashes = [*state, digest], True
        return digest


def _state_of(file: Path) -> list[int]:
    (state,) = input_files.file_states([file])
    return list(state[1:])  # the number of a device changes when it is mounted


def _place_of(file: Path) -> tuple[int, ...]:
    """Inode, size and time of the last write, which a file keeps under another name."""
    state = file.stat()
    return state.st_ino, state.st_size, state.st_mtime_ns


def _is_read_on_disk_alone(artifact: Artifact) -> bool:
    """Whether an output is in a store, and its record in a file of which no range is read there: a graph, a program."""
    is_file = isinstance(artifact.path, StorePath) and artifact.path.is_file()
    return is_file and artifact.kind not in (ArtifactKind.WEIGHTS, ArtifactKind.GGUF)


def _is_published(path: str, found: Mapping[str, Any], stage: Mapping[str, Any] | None) -> bool:
    """Whether an output in a store, known by sizes alone, is what was about to be put there. Reads it.

    Nothing else knows it where a worker died before its record had the sizes.
    """
    hashes = (stage or {}).get("hashes")
    if not hashes or found.keys() != {"sizes"}:
        return False
    try:
        return all(file_hash(place(path).with_name(name), FAST) == digest for name, digest in hashes.items())
    except (InputRefused, OSError):
        return False


def _size_of(file: Path) -> list[int]:
    """The bytes of an object, and a number of its ETag: a worker that woke up late may have put it again."""
    state = file.stat()
    return [state.st_size, state.st_ino]


def _lacks_report(job: FleetJob, outcome: str) -> bool:
    """Whether a proof has a verdict, and a report of it is gone."""
    has_verdict = job.output is None and outcome in ("same", "different", "undecided")
    return has_verdict and not all(path.exists() for path in job.reports())


def _is_other_file(path: Path) -> bool:
    """Whether a file in the place of a report is none. The job is refused until it is gone."""
    try:
        refuse_other_file(path)
    except InputRefused:
        return True
    return False


def _write(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_output.stage_file(path, inputs=[], overwrite=True) as stage:
        json_files.write_json(stage / path.name, content)
