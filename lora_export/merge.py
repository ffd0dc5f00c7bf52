"""Executor 1: a plan over a checkpoint. Little more than a file copy.

Ranges that nothing changes go from file to file inside the kernel; a weight that changes is read,
summed and written in blocks of rows, so that memory does not grow with the model.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from lora_export.ledger import StepResult, Tally
from lora_export.lora import add
from lora_export.plan import FLOATS, Plan, Step
from lora_export.tensorfile import Entry, TensorFile

BLOCK = 1 << 20  # bytes of fp32 worked on at a time: small enough for a core's second-level cache
COPY = 8 << 20  # bytes a read where the kernel cannot copy by itself
LOW_RETENTION = 0.9  # below this a result is worth a warning
MIN_RETENTION = 0.5  # below this it is refused unless the user says otherwise
WORD_HEAD = re.compile(r"LMHead|For(CausalLM|MaskedLM|ConditionalGeneration|PreTraining)")  # classes that predict words

Progress = Callable[[int], None]  # hears how many bytes of output have been written since the last call


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

    Raises InputRefused when an adapter is in the base already, tied embeddings would be torn, a value
    is not finite, the base changes meanwhile, or a weight keeps less than `min_retention` of its change.
    """
    begun = time.perf_counter()
    refuse_second_merge(plan, base)
    refuse_torn_tie(plan, base)
    record = provenance(plan, base, {"dtype": dtype or "keep", "min_retention": min_retention})
    own = {} if base.is_folder else {PROVENANCE: json.dumps(record)}
    moves = _moves(plan, base, dtype)
    results: list[StepResult] = []
    written: dict[str, TensorFile] = {}
    for name, source in base.shards.items():
        path = stage / (name if base.is_folder else file_name)
        results += _write_shard(path, source, moves[name], {"format": "pt", **source.metadata, **own}, progress)
        written[name] = tensorfile.open_file(path)
    _refuse_faint(results, min_retention)
    for source in base.shards.values():
        if not source.unchanged():
            raise InputRefused(f"{source.path} changed while it was being merged. Nothing was written.")
    if base.is_folder:
        _write_companions(plan, base, stage, written, dtype)
        files.write_manifest(stage, record)
    return MergeReport(
        results=tuple(results),
        copied=sum(move.nbytes for name in moves for move in moves[name] if move.is_copy),
        bytes=sum(file.size for file in written.values()),
        replaced=sum(step.replace is not None for step in plan.steps),
        seconds=time.perf_counter() - begun,
    )


def output_size(plan: Plan, base: Checkpoint, dtype: str | None = None) -> int:
    """How many bytes of tensors a merge writes."""
    return sum(move.nbytes for moves in _moves(plan, base, dtype).values() for move in moves)


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


def refuse_second_merge(plan: Plan, base: Checkpoint) -> None:
    """Raise InputRefused where one of the plan's adapters is in the base already."""
    merged = {adapter.get("sha256"): adapter.get("name") for adapter in base.history}
    for adapter in plan.adapters:
        if adapter.sha256 and adapter.sha256 in merged:
            raise InputRefused(
                f"{base.path} already holds the adapter {adapter.name} (merged as {merged[adapter.sha256]}, sha256 "
                f"{adapter.sha256[:12]}). Merge into the original base, or nothing twice"
            )


def refuse_torn_tie(plan: Plan, base: Checkpoint) -> None:
    """Raise InputRefused where the input embeddings change, and the output embeddings are the same stored tensor.

    Trained apart they are two tensors. A file of a tied model has one, and the other would follow it unseen.
    """
    architecture = str((base.config.get("architectures") or [""])[0])
    tables = _word_tables(plan, base)
    if len(tables) != 1 or not base.config.get("tie_word_embeddings", True) or not WORD_HEAD.search(architecture):
        return
    ((name, step),) = tables.items()
    if step is not None:
        raise InputRefused(
            f"{name} is the output embeddings too (tie_word_embeddings), which the adapter was trained without. "
            "Untie the base first (save it with tie_word_embeddings false), or train with ensure_weight_tying"
        )


def _word_tables(plan: Plan, base: Checkpoint) -> dict[str, Step | None]:
    """The output's tensors of one row a word, input and output embeddings, with what the plan does to them."""
    parts = [base.config, base.config.get("text_config")]
    words = next((part["vocab_size"] for part in parts if isinstance(part, dict) and "vocab_size" in part), None)
    specs = {spec.name: spec for spec in (*base.specs, *(step.spec for step in plan.steps))}
    names = [name for name, spec in specs.items() if len(spec.shape) == 2 and spec.shape[0] == words]
    return {name: plan.by_weight.get(name) for name in names}


def _refuse_faint(results: Sequence[StepResult], min_retention: float) -> None:
    lost = [result for result in results if result.retention < min_retention]
    if lost:
        lines = [f"  {r.weight}: {r.retention:.1%} of the change kept, noise {r.noise:.0%}" for r in lost]
        raise InputRefused(
            f"{len(lost)} of {len(results)} weights would lose most of their change to rounding "
            f"(--min-retention {min_retention:g}):\n" + "\n".join(lines) + "\n"
            "Store the result with --dtype float32, or keep the adapter beside the weights (onnx --lora nodes). "
            "Nothing was written."
        )


@dataclass(frozen=True, eq=False)
class _Move:
    """One tensor of the output: what it is, where in the base it comes from, and what happens to it on the way."""

    old: Entry  # of an added tensor: no bytes
    step: Step | None  # None: nothing but, perhaps, another dtype
    name: str
    dtype: np.dtype[Any]

    @property
    def is_copy(self) -> bool:
        return self.step is None and self.old.dtype == self.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.old.shape) * self.dtype.itemsize


def _moves(plan: Plan, base: Checkpoint, dtype: str | None) -> dict[str, list[_Move]]:
    """Every tensor of the output, by its file, in the order of the base's bytes; the added ones last."""

    def stored(own: np.dtype[Any]) -> np.dtype[Any]:
        return np.dtype(dtype) if dtype and str(own) in FLOATS else own

    moves = {
        name: [
            _Move(entry, plan.by_weight.get(entry.name), plan.output_name(entry.name), stored(entry.dtype))
            for entry in source.entries.values()
        ]
        for name, source in base.shards.items()
    }
    for step in plan.steps:
        if step.added and step.replace is not None:
            nowhere = Entry(step.weight, step.replace.dtype, step.spec.shape, 0, 0)
            moves[list(moves)[-1]].append(_Move(nowhere, step, plan.output_name(step), stored(nowhere.dtype)))
    return moves


@dataclass(frozen=True)
class _Pipe:
    """From one file to another, by position."""

    source: Path
    read_fd: int
    write_fd: int
    progress: Progress

    def copy(self, start: int, place: int, count: int) -> None:
        while count:
            done = _copy_range(self.read_fd, self.write_fd, start, place, count)
            if not done:
                raise InputRefused(f"{self.source} became shorter while it was being copied")
            start, place, count = start + done, place + done, count - done
            self.progress(done)

    def read(self, start: int, count: int) -> bytes:
        data = os.pread(self.read_fd, count, start)
        if len(data) != count:
            raise InputRefused(f"{self.source} became shorter while it was being read")
        return data

    def write(self, place: int, array: NDArray[Any]) -> None:
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        while data:  # a disk that is nearly full takes a part, and complains about the rest
            done = os.pwrite(self.write_fd, data, place)
            data, place = data[done:], place + done
            self.progress(done)


def _copy_range(read_fd: int, write_fd: int, start: int, place: int, count: int) -> int:
    """Copy inside the kernel, or through memory where the file systems do not allow it."""
    try:
        return os.copy_file_range(read_fd, write_fd, count, start, place)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
            raise
    return os.pwrite(write_fd, os.pread(read_fd, min(count, COPY), start), place)


def _write_shard(
    path: Path, source: TensorFile, moves: Sequence[_Move], metadata: Mapping[str, str], progress: Progress
) -> list[StepResult]:
    """Write one file of the output; returns what became of the weights that change."""
    header, places = tensorfile.layout([(move.name, move.dtype, move.old.shape) for move in moves], metadata)
    results = []
    with source.path.open("rb") as reader, path.open("xb") as writer:
        pipe = _Pipe(source.path, reader.fileno(), writer.fileno(), progress)
        pipe.write(0, np.frombuffer(header, np.uint8))
        for is_copy, group in itertools.groupby(zip(moves, places, strict=True), key=lambda pair: pair[0].is_copy):
            run = list(group)
            if is_copy:  # neighbours in both files: one range
                (first, place), (_, last) = run[0], run[-1]
                pipe.copy(first.old.start, place.start, last.stop - place.start)
            else:
                results += [result for move, place in run if (result := _change(pipe, move, place))]
    return results


def _change(pipe: _Pipe, move: _Move, place: Entry) -> StepResult | None:
    """Write a tensor that is not copied; returns what became of it where something was added to it."""
    if move.step is not None and move.step.replace is not None:
        with _overflow_is_looked_for():
            tensor = move.step.replace.astype(place.dtype, copy=False)
        _refuse_overflow(place, move.step.replace, tensor)
        pipe.write(place.start, tensor)
        return None
    old, tally = move.old, Tally(place.name)
    for rows, start, stop in _row_blocks(old):
        data = pipe.read(old.start + start, stop - start)
        weight = np.frombuffer(data, old.dtype).reshape(rows.stop - rows.start, *old.shape[1:])
        with _overflow_is_looked_for():
            if move.step is None:
                merged = weight.astype(place.dtype)
            else:
                change = move.step.stored_delta(rows)
                merged = add(weight, change, place.dtype)
                tally.count(weight, change, merged)
        _refuse_overflow(place, weight, merged)
        pipe.write(place.start + start // old.dtype.itemsize * place.dtype.itemsize, merged)
    return tally.result() if move.step is not None else None


def _row_blocks(entry: Entry) -> Iterator[tuple[slice, int, int]]:
    """Row ranges of a tensor with the bytes [start, stop) that hold them, counted from its beginning."""
    rows = entry.shape[0] if entry.shape else 1
    row_bytes = entry.nbytes // rows if rows else 0
    step = max(1, BLOCK // max(1, row_bytes // entry.dtype.itemsize * 4))
    for first in range(0, rows, step):
        last = min(first + step, rows)
        yield slice(first, last), first * row_bytes, last * row_bytes


def _overflow_is_looked_for() -> np.errstate:
    # By _refuse_overflow, which knows the tensor's name; NumPy would only warn, without it.
    return np.errstate(over="ignore", invalid="ignore")


def _refuse_overflow(place: Entry, before: NDArray[Any], after: NDArray[Any]) -> None:
    if str(place.dtype) not in FLOATS or np.isfinite(after).all():
        return
    bad = before.size - np.count_nonzero(np.isfinite(before))
    if bad:
        raise InputRefused(f"{place.name}: the base holds {bad} values that are not finite. Nothing was written.")
    limit = float(ml_dtypes.finfo(place.dtype).max)
    raise InputRefused(
        f"{place.name}: {after.size - np.count_nonzero(np.isfinite(after))} values would lie beyond {limit:g}, the "
        f"largest {place.dtype}. Look at the adapter's scale, or use --dtype float32. Nothing was written."
    )


def _equal(one: Step, other: Step) -> bool:
    return one.replace is not None and other.replace is not None and np.array_equal(one.replace, other.replace)


def _write_companions(
    plan: Plan, base: Checkpoint, stage: Path, written: Mapping[str, TensorFile], dtype: str | None
) -> None:
    for relative in base.companions():
        (stage / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base.path / relative, stage / relative)
    config = config_with_heads(base.config, plan.adapters)
    wholes = [step for step in _word_tables(plan, base).values() if step is not None and step.replace is not None]
    if any(step.added for step in wholes) and not (len(wholes) == 2 and _equal(*wholes)):
        config["tie_word_embeddings"] = False  # or a loader would drop the one that was added
    if dtype and config:
        config["dtype"] = dtype
        config.pop("torch_dtype", None)
    if config != base.config:
        (stage / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if base.index:
        weight_map = {entry: name for name, file in written.items() for entry in file.entries}
        size = sum(entry.nbytes for file in written.values() for entry in file.entries.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (stage / base.index).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
