"""A residual is what merged weights lack of the base, as a file that an `unmerge` reads.

It is a zip archive of facts, headers, small files, and the differences of each weight file.

It is untrusted input. Members are read as streams, and no more of them than their reader asks for.
"""

from __future__ import annotations

import contextlib
import functools
import json
import struct
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from lora_export import provenance
from lora_export.errors import InputRefused
from lora_export.isolation.limits import MAX_HEADER, MAX_JSON
from lora_export.options.spelling import named
from lora_export.plan import Plan
from lora_export.storage import block_copy, input_files, json_files, safetensors_file
from lora_export.storage.hashes import FAST, file_hash
from lora_export.storage.manifest import MANIFEST, read_manifest
from lora_export.storage.safetensors_file import Entry, TensorFile
from lora_export.weights.checkpoint import CONFIG, Checkpoint
from lora_export.weights.merge_report import OnBytesWritten
from lora_export.weights.residuals.prediction import ChangedTensor, Predictor, changed_tensor, packed_differences

FACTS = "residual.json"
FORMAT = 1
LEVEL = 6  # of zlib; what it compresses is small already
# What zipfile raises: RuntimeError for an encrypted member, NotImplementedError for other ways of compression.
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError, IndexError, struct.error)
FACT_KINDS = {"format": int, "hashing": str, "adapters": list, "settings": dict, "shards": dict, "files": dict}


class _InOrder:
    """What zipfile needs to write without going back, as in a store: one residual has the same bytes everywhere."""

    def __init__(self, file: IO[bytes]):
        self.write, self.flush, self.close = file.write, file.flush, file.close


class ResidualWriter:
    """Writes the members of a new archive, one after another, from its first byte to its last."""

    def __init__(self, path: Path):
        self._files = contextlib.ExitStack()
        file = self._files.enter_context(path.open("xb"))
        self._zip = self._files.enter_context(
            zipfile.ZipFile(_InOrder(file), "w", zipfile.ZIP_DEFLATED, compresslevel=LEVEL)
        )

    def __enter__(self) -> ResidualWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self._files.__exit__(*error)

    @contextlib.contextmanager
    def member(self, name: str) -> Iterator[Callable[[bytes], object]]:
        """Yield a function that appends bytes to a member."""
        with self._zip.open(self._info(name), "w", force_zip64=True) as stream:
            yield stream.write

    def write(self, name: str, data: bytes) -> None:
        self._zip.writestr(self._info(name), data, compresslevel=LEVEL)

    @staticmethod
    def _info(name: str) -> zipfile.ZipInfo:
        info = zipfile.ZipInfo(name)  # without the time: the same residual has the same bytes
        info.compress_type = zipfile.ZIP_DEFLATED
        return info


class Residual:
    """An archive that was checked as far as that is possible without reading the differences."""

    def __init__(self, path: Path, archive: zipfile.ZipFile):
        self.path, self._zip = path, archive
        self.facts = self._read_facts()

    def _read_facts(self) -> Mapping[str, Any]:
        facts = json_files.parse_json(self.read(FACTS, MAX_JSON), f"{FACTS} in {self.path}")
        if facts.get("format") != FORMAT:
            raise InputRefused(
                f"{self.path} is a residual of format {facts.get('format')!r}, made by {facts.get('made_by')}; this "
                f"version reads format {FORMAT}"
            )
        wrong = [key for key, kind in FACT_KINDS.items() if not isinstance(facts.get(key), kind)]
        if not wrong and not all(isinstance(of_file, dict) for of_file in facts["files"].values()):
            wrong = ["files"]
        if wrong:
            raise InputRefused(f"{self.path} is damaged: {FACTS} has no {' and no '.join(wrong)}")
        return facts

    def read(self, name: str, most: int = MAX_JSON) -> bytes:
        """A whole member. Raises InputRefused where it is missing, damaged or larger than `most`."""
        with self.stream(name) as read_up_to:
            data = read_up_to(most + 1)
        if len(data) > most:
            raise InputRefused(f"{self.path}: {name} has more than {most:,} bytes, which no residual needs")
        return data

    def header(self, shard: int) -> bytes:
        """The first bytes of a weight file of the base: the header and its length."""
        return self.read(f"header/{shard}", MAX_HEADER + 8)

    @contextlib.contextmanager
    def stream(self, name: str) -> Iterator[Callable[[int], bytes]]:
        """Yield a function that reads up to so many bytes of a member. Raises InputRefused as `read`."""
        try:
            member = self._zip.open(name)
        except KeyError as error:
            raise InputRefused(f"{self.path} is damaged: it has no {name}") from error
        except DAMAGED as error:
            raise InputRefused(f"{self.path} is damaged: {name}: {error}") from error
        with member:
            yield lambda count: self._read(member, name, count)

    def _read(self, member: IO[bytes], name: str, count: int) -> bytes:
        try:
            return member.read(count)
        except DAMAGED as error:
            raise InputRefused(f"{self.path} is damaged: {name}: {error}") from error


@contextlib.contextmanager
def open_residual(path: Path) -> Iterator[Residual]:
    """Open a residual. Raises InputRefused for a folder, a file that is none, and one of another format."""
    if path.is_dir():
        raise InputRefused(f"{path} is not a residual of a merge ({named('keep_residual')}): it is a folder")
    with input_files.open_regular(path) as file:
        try:
            archive = zipfile.ZipFile(file)
        except DAMAGED as error:
            raise InputRefused(f"{path} is not a residual of a merge ({named('keep_residual')}): {error}") from error
        with archive:
            yield Residual(path, archive)


def facts_as_bytes(facts: Mapping[str, Any]) -> bytes:
    """The facts of a residual as they are stored."""
    return json.dumps({"format": FORMAT, **facts}, indent=1, sort_keys=True).encode()


# --- What the merged weights lack of the base, found after a merge and before it is published ---


def write_residual(
    path: Path,
    plan: Plan,
    base: Checkpoint,
    merged: Path,
    *,
    hashing: str = FAST,
    settings: Mapping[str, Any] | None = None,
    progress: OnBytesWritten = lambda _: None,
) -> None:
    """Write the residual of a merge to the new file `path`.

    `merged` is the folder or file that `merge_checkpoint` wrote for this plan. `settings` are what made the plan, for
    the restoration. Memory is a few blocks, whatever the size of the model.

    Raises InputRefused as `refuse_residual`, and where the base changed meanwhile.
    """
    refuse_residual(plan, base)
    files = {name: merged / name if base.is_folder else merged for name in base.shards}
    opened = {name: safetensors_file.open_file(file) for name, file in files.items()}
    shards = {}
    with ResidualWriter(path) as writer:
        for number, (name, shard) in enumerate(base.shards.items()):
            with shard.path.open("rb") as file:
                writer.write(f"header/{number}", file.read(shard.data_start))
            changed = list(changed_tensors(plan, shard, opened[name]))
            with writer.member(f"data/{number}") as write:
                _write_differences(changed, shard, opened[name], write, progress)
            shards[name] = {
                "number": number,
                "base": {"bytes": shard.size, "hash": file_hash(shard.path, hashing)},
                "merged": {"bytes": opened[name].size, "hash": file_hash(files[name], hashing)},
                "changed": {tensor.base.name: tensor.rows for tensor in changed},
            }
        facts = {
            "made_by": provenance.record([], [], {}, (), {})["made_by"],
            "hashing": hashing,
            "is_folder": base.is_folder,
            "name_prefix": plan.name_prefix,
            "apart": sorted(plan.apart),
            "adapters": provenance.adapter_records(plan.adapters, plan.strengths) if needs_adapters(plan) else [],
            "settings": dict(settings or {}),
            "shards": shards,
            "files": dict(_write_other_files(base, merged, writer, hashing)),
        }
        writer.write(FACTS, facts_as_bytes(facts))
    for shard in base.shards.values():
        if not shard.unchanged():
            raise InputRefused(f"{shard.path} changed while it was being merged")


def needs_adapters(plan: Plan) -> bool:
    """Whether a restoration subtracts anything: not where each weight was replaced, or its change follows from it."""
    return any(step.shift is not None or (step.terms and not step.depends_on_weight) for step in plan.steps)


def refuse_residual(plan: Plan, base: Checkpoint) -> None:
    """Raise InputRefused for a merge that cannot be undone.

    A restoration needs the very same adapters, by their hashes. What the output lacks of the base's weights is in none.
    """
    if base.own_adapters:
        raise InputRefused(
            f"{named('keep_residual')} cannot restore the adapters in the weights of {base.path}, which the output "
            "does not have. Keep the base itself"
        )
    without = [adapter.name for adapter in plan.adapters if not adapter.sha256]
    if needs_adapters(plan) and without:
        raise InputRefused(f"{named('keep_residual')} needs adapters from files: {', '.join(without)} has no hash")


def changed_tensors(plan: Plan, base: TensorFile, merged: TensorFile) -> Iterator[ChangedTensor]:
    """The tensors of a file that the merge changed, in the order of their bytes."""
    for entry in base.entries.values():
        tensor = changed_tensor(plan, entry, merged.entries[plan.output_name(entry.name)])
        if tensor is not None:
            yield tensor


def _write_differences(
    tensors: list[ChangedTensor],
    base: TensorFile,
    merged: TensorFile,
    write: Callable[[bytes], object],
    progress: OnBytesWritten,
) -> None:
    """The differences of all blocks, in order. Several threads compute them."""
    threads = block_copy.default_threads()
    pending: deque[tuple[int, Future[bytes]]] = deque()

    def finish_first() -> None:
        count, future = pending.popleft()
        write(future.result())
        progress(count)

    with (
        base.path.open("rb") as old,
        merged.path.open("rb") as new,
        threadpool_limits(1, user_api="blas"),
        ThreadPoolExecutor(threads) as pool,
    ):
        try:
            for tensor in tensors:
                predictor = Predictor(tensor)
                for rows in tensor.pieces():
                    reading = functools.partial(_block, predictor, rows, base, old.fileno(), merged, new.fileno())
                    count = (rows.stop - rows.start) * tensor.shape[1] * tensor.base.dtype.itemsize
                    pending.append((count, pool.submit(reading)))
                    if len(pending) > 2 * threads:
                        finish_first()
            while pending:
                finish_first()
        finally:
            pool.shutdown(cancel_futures=True)


def _block(predictor: Predictor, rows: slice, base: TensorFile, old: int, merged: TensorFile, new: int) -> bytes:
    tensor = predictor.tensor
    before = _read(base, old, tensor.base, rows, tensor)
    return packed_differences(before, predictor.rows(rows, _read(merged, new, tensor.merged, rows, tensor)))


def _read(file: TensorFile, fd: int, entry: Entry, rows: slice, tensor: ChangedTensor) -> NDArray[Any]:
    """Rows of a tensor, as (rows, columns)."""
    row_bytes = tensor.shape[1] * entry.dtype.itemsize
    stored = np.empty((rows.stop - rows.start) * row_bytes, np.uint8)
    block_copy.read(file.path, fd, stored, entry.start + rows.start * row_bytes)
    return stored.view(entry.dtype).reshape(-1, tensor.shape[1])


def _write_other_files(
    base: Checkpoint, merged: Path, writer: ResidualWriter, hashing: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The hash of each other file of the base that the merge carried over; those that it changed are stored."""
    if not base.is_folder:
        return
    written = read_manifest(merged).get("files", {})
    names = [*map(Path.as_posix, base.other_files()), *([base.index] if base.index else [])]
    names += [MANIFEST] if (base.path / MANIFEST).is_file() else []
    for name in dict.fromkeys(names):
        path = base.path / name
        is_same = name in written and name not in (CONFIG, MANIFEST, base.index)
        if not is_same:
            writer.write(f"file/{name}", path.read_bytes())
        yield name, {"hash": file_hash(path, hashing), "stored": not is_same}
