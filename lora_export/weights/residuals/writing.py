"""The residual of a merge: what the merged weights lack of the base, found after a merge and before it is published."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from lora_export import provenance
from lora_export.errors import InputRefused
from lora_export.options.spelling import named
from lora_export.plan import Plan
from lora_export.storage import block_copy, safetensors_file
from lora_export.storage.hashes import FAST, file_hash
from lora_export.storage.manifest import MANIFEST, read_manifest
from lora_export.storage.safetensors_file import Entry, TensorFile
from lora_export.weights.checkpoint import CONFIG, Checkpoint
from lora_export.weights.merge_report import OnBytesWritten
from lora_export.weights.residuals.archive import FACTS, ResidualWriter, facts_as_bytes
from lora_export.weights.residuals.bit_differences import packed_differences
from lora_export.weights.residuals.prediction import ChangedTensor, Predictor, changed_tensor


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

    Raises InputRefused for adapters without a hash, where one is needed, and where the base changed meanwhile.
    """
    refuse_without_hash(plan)
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
            "adapters": provenance.adapter_records(plan.adapters, plan.strengths) if needs_adapters(plan) else [],
            "settings": dict(settings or {}),
            "shards": shards,
            "files": dict(_write_other_files(base, merged, writer, hashing)),
        }
        writer.write(FACTS, facts_as_bytes(facts))
    for shard in base.shards.values():
        if not shard.unchanged():
            raise InputRefused(f"{shard.path} changed while it was being merged. Nothing was written.")


def needs_adapters(plan: Plan) -> bool:
    """Whether a restoration subtracts anything: not where each weight was replaced, or its change follows from it."""
    return any(step.shift is not None or (step.terms and not step.depends_on_weight) for step in plan.steps)


def refuse_without_hash(plan: Plan) -> None:
    """Raise InputRefused for adapters that a restoration could not recognise: it needs the very same ones."""
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
