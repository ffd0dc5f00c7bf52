"""Executor 1: a plan over a checkpoint. Little more than a file copy.

Ranges that nothing changes go from file to file inside the kernel; a weight that changes is read,
summed and written in blocks of rows, so that memory does not grow with the model.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lora_export import __version__, files, tensorfile
from lora_export.checkpoint import CONFIG, PROVENANCE, Checkpoint
from lora_export.errors import InputRefused
from lora_export.head import config_with_heads
from lora_export.lora import add
from lora_export.plan import FLOATS, Plan, Step
from lora_export.tensorfile import Entry, TensorFile

BLOCK = 1 << 20  # bytes of fp32 worked on at a time: small enough for a core's second-level cache
COPY = 8 << 20  # bytes a read where the kernel cannot copy by itself
LOW_RETENTION = 0.9  # below this a result is worth a warning
MIN_RETENTION = 0.5  # below this it is refused unless the user says otherwise

Progress = Callable[[int], None]  # hears how many bytes of output have been written since the last call


@dataclass(frozen=True)
class StepResult:
    """What became of one weight, measured on what was written (numerics: what rounding does to a merge)."""

    weight: str
    relative_change: float  # ‖ΔW‖ / ‖W‖
    retention: float  # <W'-W, ΔW> / ‖ΔW‖²: how much of the change arrived
    noise: float  # ‖(W'-W) - ΔW‖ / ‖ΔW‖
    changed: int  # entries whose stored value is another one now
    elements: int


@dataclass(frozen=True)
class MergeReport:
    """The ledger: what was done, in numbers."""

    results: tuple[StepResult, ...]
    copied: int  # bytes that went through unchanged
    bytes: int  # bytes of weights written in all
    replaced: int  # tensors that the adapters brought whole
    seconds: float

    @property
    def faint(self) -> tuple[StepResult, ...]:
        """The weights in which much of the change was lost to rounding."""
        return tuple(result for result in self.results if result.retention < LOW_RETENTION)


def merge_checkpoint(
    plan: Plan,
    base: Checkpoint,
    stage: Path,
    *,
    file_name: str = "model.safetensors",
    dtype: str | None = None,
    min_retention: float = MIN_RETENTION,
    progress: Progress = lambda _: None,
) -> MergeReport:
    """Carry out a plan over a checkpoint, into the folder `stage` (see `files`).

    A folder becomes a folder with the same shards, config and tokenizer and a manifest; a bare
    file becomes one file called `file_name`, its provenance in the header. `dtype` converts every
    float tensor. Peak memory is a few blocks, whatever the model's size.

    Raises InputRefused when an adapter is in the base already, a value is not finite, the base
    changes meanwhile, or a weight keeps less than `min_retention` of its change.
    """
    begun = time.perf_counter()
    _refuse_second_merge(plan, base)
    record = provenance(plan, base, {"dtype": dtype or "keep", "min_retention": min_retention})
    target = np.dtype(dtype) if dtype else None
    results: list[StepResult] = []
    copied = 0
    names = list(base.shards)
    weight_map: dict[str, str] = {}
    for name in names:
        added = [step for step in plan.steps if step.added] if name == names[-1] else []
        metadata = dict(base.shards[name].metadata) or {"format": "pt"}
        if not base.is_folder:
            metadata[PROVENANCE] = json.dumps(record)
        writer = _ShardWriter(base.shards[name], plan, added, target, progress)
        path = stage / (name if base.is_folder else file_name)
        copied += writer.write(path, metadata)
        results += writer.results
        weight_map |= dict.fromkeys(tensorfile.open_file(path).entries, name)
    _refuse_faint(results, min_retention)
    for shard in base.shards.values():
        if not shard.unchanged():
            raise InputRefused(f"{shard.path} changed while it was being merged. Nothing was written.")
    written = sum(path.stat().st_size for path in stage.iterdir())
    if base.is_folder:
        _write_companions(plan, base, stage, weight_map, written, dtype)
        files.write_manifest(stage, record)
    return MergeReport(
        results=tuple(results),
        copied=copied,
        bytes=written,
        replaced=sum(step.replace is not None for step in plan.steps),
        seconds=time.perf_counter() - begun,
    )


def provenance(plan: Plan, base: Checkpoint, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Where an output comes from: base, adapters and settings by their hashes, an earlier merge's adapters included."""
    adapters = [
        {"name": adapter.name, "format": adapter.format, "sha256": adapter.sha256, "weight": strength}
        for adapter, strength in zip(plan.adapters, plan.strengths, strict=True)
    ]
    return {
        "made_by": f"lora-export {__version__}",
        "base": {name: files.sha256(shard.path) for name, shard in base.shards.items()},
        "adapters": [*base.history, *adapters],
        "settings": dict(settings),
    }


def _refuse_second_merge(plan: Plan, base: Checkpoint) -> None:
    merged = {adapter.get("sha256"): adapter.get("name") for adapter in base.history}
    for adapter in plan.adapters:
        if adapter.sha256 and adapter.sha256 in merged:
            raise InputRefused(
                f"{base.path} already holds the adapter {adapter.name} (merged as {merged[adapter.sha256]}, sha256 "
                f"{adapter.sha256[:12]}). Merge into the original base, or nothing twice"
            )


def _refuse_faint(results: list[StepResult], min_retention: float) -> None:
    lost = [result for result in results if result.retention < min_retention]
    if lost:
        lines = [f"  {r.weight}: {r.retention:.1%} of the change kept, noise {r.noise:.0%}" for r in lost]
        raise InputRefused(
            f"{len(lost)} of {len(results)} weights would lose most of their change to rounding "
            f"(--min-retention {min_retention:g}):\n" + "\n".join(lines) + "\n"
            "Store the result with --dtype float32, or keep the adapter beside the weights (onnx --lora nodes). "
            "Nothing was written."
        )


class _ShardWriter:
    """Writes one file of the output, in order, and counts as it goes."""

    def __init__(
        self,
        source: TensorFile,
        plan: Plan,
        added: list[Step],
        dtype: np.dtype[Any] | None,
        progress: Progress,
    ):
        self.source, self.plan, self.added, self.progress = source, plan, added, progress
        self.dtype = dtype
        self.results: list[StepResult] = []
        self.copied = 0

    def write(self, path: Path, metadata: Mapping[str, str]) -> int:
        """Write the file; returns how many bytes were copied unchanged."""
        old = list(self.source.entries.values())
        shapes = [(self.plan.output_name(entry.name), self._stored(entry.dtype), entry.shape) for entry in old]
        for step in self.added:
            assert step.replace is not None
            shapes.append((self.plan.output_name(step), self._stored(step.replace.dtype), step.spec.shape))
        header, new = tensorfile.layout(shapes, metadata)
        with self.source.path.open("rb") as source, path.open("xb") as target:
            self.read_fd, self.write_fd = source.fileno(), target.fileno()
            os.pwrite(self.write_fd, header, 0)
            for run in _runs(zip(old, new, strict=False), self._is_kept):
                self._copy(run[0][0].start, run[0][1].start, run[-1][0].stop - run[0][0].start)
            for entry, place in zip(old, new, strict=False):
                if not self._is_kept(entry, place):
                    self._change(entry, place)
            for step, place in zip(self.added, new[len(old) :], strict=True):
                self._replace(step, place)
        return self.copied

    def _stored(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        return self.dtype if self.dtype is not None and str(dtype) in FLOATS else dtype

    def _is_kept(self, entry: Entry, place: Entry) -> bool:
        return entry.name not in self.plan.by_weight and entry.dtype == place.dtype

    def _copy(self, start: int, place: int, count: int) -> None:
        self.copied += count
        while count:
            done = _copy_range(self.read_fd, self.write_fd, start, place, count)
            if not done:
                raise InputRefused(f"{self.source.path} became shorter while it was being copied")
            start, place, count = start + done, place + done, count - done
            self.progress(done)

    def _change(self, entry: Entry, place: Entry) -> None:
        step = self.plan.by_weight.get(entry.name)
        if step is not None and step.replace is not None:
            self._replace(step, place)
            return
        tally = _Tally(place.name)
        for rows, start, stop in _row_blocks(entry):
            data = os.pread(self.read_fd, stop - start, entry.start + start)
            if len(data) != stop - start:
                raise InputRefused(f"{self.source.path} became shorter while it was being read")
            weight = np.frombuffer(data, entry.dtype).reshape(-1, *entry.shape[1:])
            if step is None:
                merged = weight.astype(place.dtype)
            else:
                change = step.stored_delta(rows)
                merged = add(weight, change, place.dtype)
                tally.count(weight, change, merged)
            _refuse_overflow(place, weight, merged)
            offset = start // entry.dtype.itemsize * place.dtype.itemsize
            os.pwrite(self.write_fd, _bytes(merged), place.start + offset)
            self.progress(merged.nbytes)
        if step is not None:
            self.results.append(tally.result())

    def _replace(self, step: Step, place: Entry) -> None:
        assert step.replace is not None
        tensor = step.replace.astype(place.dtype)
        _refuse_overflow(place, step.replace, tensor)
        os.pwrite(self.write_fd, _bytes(tensor), place.start)
        self.progress(tensor.nbytes)


def _bytes(tensor: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data


def _runs(
    pairs: Iterator[tuple[Entry, Entry]], kept: Callable[[Entry, Entry], bool]
) -> Iterator[list[tuple[Entry, Entry]]]:
    """Stretches of neighbouring tensors that are kept: each is one copy."""
    run: list[tuple[Entry, Entry]] = []
    for entry, place in pairs:
        if kept(entry, place):
            run.append((entry, place))
        elif run:
            yield run
            run = []
    if run:
        yield run


def _copy_range(read_fd: int, write_fd: int, start: int, place: int, count: int) -> int:
    """Copy inside the kernel, or through memory where the file systems do not allow it."""
    try:
        return os.copy_file_range(read_fd, write_fd, count, start, place)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return os.pwrite(write_fd, os.pread(read_fd, min(count, COPY), start), place)


def _row_blocks(entry: Entry) -> Iterator[tuple[slice, int, int]]:
    """Row ranges of a tensor with the bytes [start, stop) that hold them, counted from its beginning."""
    rows = entry.shape[0] if entry.shape else 1
    row_bytes = entry.nbytes // rows if rows else 0
    step = max(1, BLOCK // max(1, row_bytes // entry.dtype.itemsize * 4))
    for first in range(0, rows, step):
        last = min(first + step, rows)
        yield slice(first, last), first * row_bytes, last * row_bytes


class _Tally:
    """Sums over the blocks of one weight, in fp64."""

    def __init__(self, weight: str):
        self.weight = weight
        self.weight_sq = self.change_sq = self.kept_by_change = self.noise_sq = 0.0
        self.changed = self.elements = 0

    def count(self, weight: NDArray[Any], change: NDArray[np.float32], merged: NDArray[Any]) -> None:
        before = weight.astype(np.float32).ravel()
        kept = merged.astype(np.float32).ravel() - before
        wanted = change.ravel()
        self.weight_sq += float(before @ before)
        self.change_sq += float(wanted @ wanted)
        self.kept_by_change += float(kept @ wanted)
        self.changed += int(np.count_nonzero(kept))
        self.elements += kept.size
        kept -= wanted
        self.noise_sq += float(kept @ kept)

    def result(self) -> StepResult:
        if not self.change_sq:  # nothing was to be changed, and nothing was lost
            return StepResult(self.weight, 0.0, 1.0, 0.0, self.changed, self.elements)
        relative = math.sqrt(self.change_sq / self.weight_sq) if self.weight_sq else math.inf
        return StepResult(
            weight=self.weight,
            relative_change=relative,
            retention=self.kept_by_change / self.change_sq,
            noise=math.sqrt(self.noise_sq / self.change_sq),
            changed=self.changed,
            elements=self.elements,
        )


def _refuse_overflow(place: Entry, before: NDArray[Any], after: NDArray[Any]) -> None:
    if str(place.dtype) not in FLOATS or np.isfinite(after).all():
        return
    bad = before.size - np.count_nonzero(np.isfinite(before))
    if bad:
        raise InputRefused(f"{place.name}: the base holds {bad} values that are not finite. Nothing was written.")
    limit = float(ml_dtypes.finfo(place.dtype).max)  # type: ignore[no-untyped-call]
    raise InputRefused(
        f"{place.name}: {after.size - np.count_nonzero(np.isfinite(after))} merged values lie beyond {limit:g}, the "
        f"largest {place.dtype}. Look at the adapter's scale, or use --dtype float32. Nothing was written."
    )


def _write_companions(
    plan: Plan, base: Checkpoint, stage: Path, weight_map: Mapping[str, str], size: int, dtype: str | None
) -> None:
    for relative in base.companions():
        (stage / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base.path / relative, stage / relative)
    config = config_with_heads(base.config, plan.adapters)
    if dtype and config:
        config["dtype"] = dtype
        config.pop("torch_dtype", None)
    if config != base.config:
        (stage / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if base.index:
        index = {"metadata": {"total_size": size}, "weight_map": dict(weight_map)}
        (stage / base.index).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
