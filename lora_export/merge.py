"""Executor 1: a plan over a checkpoint. Little more than a file copy.

Every file of the base is carried over in blocks (see `transfer`), those of a weight that changes in whole
rows, so that memory does not grow with the model.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
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
from threadpoolctl import threadpool_limits

from lora_export import __version__, files, tensorfile, transfer
from lora_export.checkpoint import CONFIG, PROVENANCE, Checkpoint
from lora_export.errors import InputRefused
from lora_export.head import config_with_heads
from lora_export.ledger import StepResult, Tally
from lora_export.lora import add_into, sums_in
from lora_export.plan import FLOATS, Plan, Step
from lora_export.tensorfile import Entry, TensorFile
from lora_export.transfer import Block, Bytes

MEASURED = 1 << 20  # entries of a weight from which its figures are taken, at least
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
    hashing: str = "xxh3_128",
    progress: Progress = lambda _: None,
) -> MergeReport:
    """Carry out a plan over a checkpoint, into the folder `stage` (see `files`).

    A folder becomes a folder with the same shards, config and tokenizer and a manifest; a bare
    file becomes one file called `file_name`, its provenance in the header. `dtype` converts every
    float tensor. `hashing` is the hash by which base and output are recorded (see `files.HASHES`).
    Peak memory is a few blocks, whatever the model's size.

    Raises InputRefused when an adapter is in the base already, tied embeddings would be torn, a value
    is not finite, the base changes meanwhile, or a weight keeps less than `min_retention` of its change.
    """
    begun = time.perf_counter()
    refuse_second_merge(plan, base)
    refuse_torn_tie(plan, base)
    settings = {"dtype": dtype or "keep", "min_retention": min_retention}

    def record(hashes: Mapping[str, str]) -> dict[str, Any]:
        return provenance(plan, {name: {hashing: value} for name, value in hashes.items()}, base.history, settings)

    def metadata(name: str, source_hash: str) -> Mapping[str, str]:
        own = {} if base.is_folder else {PROVENANCE: json.dumps(record({name: source_hash}))}
        return {"format": "pt", **base.shards[name].metadata, **own}

    moves = _moves(plan, base, dtype)
    written = {}
    with threadpool_limits(1, user_api="blas"):  # the transfer's threads are as many as there are cores
        for name, source in base.shards.items():
            path = stage / (name if base.is_folder else file_name)
            own = functools.partial(metadata, name)
            written[name] = _write_shard(path, source, moves[name], own, progress, hashing=hashing)
    results = [result for shard in written.values() for result in shard.results]
    _refuse_faint(results, min_retention)
    for source in base.shards.values():
        if not source.unchanged():
            raise InputRefused(f"{source.path} changed while it was being merged. Nothing was written.")
    if base.is_folder:
        _write_companions(plan, base, stage, {name: shard.file for name, shard in written.items()}, dtype)
        origin = record({name: shard.source_hash for name, shard in written.items()})
        files.write_manifest(stage, origin, {name: {hashing: shard.target_hash} for name, shard in written.items()})
    return MergeReport(
        results=tuple(results),
        copied=sum(move.nbytes for name in moves for move in moves[name] if move.is_copy),
        bytes=sum(shard.file.size for shard in written.values()),
        replaced=sum(step.replace is not None for step in plan.steps),
        seconds=time.perf_counter() - begun,
    )


def output_size(plan: Plan, base: Checkpoint, dtype: str | None = None) -> int:
    """How many bytes of tensors a merge writes."""
    return sum(move.nbytes for moves in _moves(plan, base, dtype).values() for move in moves)


def provenance(
    plan: Plan,
    base: Mapping[str, Mapping[str, str]],
    history: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Where an output comes from: the hashes of the base's files, the adapters, an earlier merge's among them."""
    adapters = [
        {"name": adapter.name, "format": adapter.format, "sha256": adapter.sha256, "weight": strength}
        for adapter, strength in zip(plan.adapters, plan.strengths, strict=True)
    ]
    return {
        "made_by": f"lora-export {__version__}",
        "base": dict(base),
        "adapters": [*history, *adapters],
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
class _Written:
    """One file of the output."""

    file: TensorFile
    results: tuple[StepResult, ...]
    source_hash: str
    target_hash: str


def _write_shard(
    path: Path,
    source: TensorFile,
    moves: Sequence[_Move],
    metadata: Callable[[str], Mapping[str, str]],
    progress: Progress,
    *,
    hashing: str,
) -> _Written:
    """Write one file of the output. `metadata` makes the header's part of it from the source's hash."""
    hashes = transfer.Hashes(hashing)

    def layout() -> tuple[bytes, list[Entry]]:
        tensors = [(move.name, move.dtype, move.old.shape) for move in moves]
        return tensorfile.layout(tensors, metadata(hashes.source.hexdigest()), beside=source.data_start)

    header, places = layout()
    hashes.target.update(header)
    with source.path.open("rb") as reader, path.open("xb") as writer:
        hashes.source.update(reader.read(source.data_start))
        blocks = _blocks(reader.fileno(), writer.fileno(), moves, places)
        room = max((transfer.BLOCK, *(_room(move, 1) for move in moves if not move.is_copy)))
        tallies: dict[str, Tally] = {}
        for block, found in transfer.transfer(source.path, writer.fileno(), blocks, hashes, room=room):
            if found is not None:
                tallies.setdefault(found.weight, Tally(found.weight)).merge(found)
            progress(block.end - block.place)
        final, _ = layout()  # a hash is as long as any other
        transfer.write(writer.fileno(), memoryview(final), 0)
    progress(len(final))
    results = tuple(tally.result() for tally in tallies.values())
    return _Written(tensorfile.open_file(path), results, hashes.source.hexdigest(), hashes.target.hexdigest())


def _blocks(read_fd: int, write_fd: int, moves: Sequence[_Move], places: Sequence[Entry]) -> Iterator[Block]:
    """The whole of the source's data, in its order, and after it what is added."""
    for is_copy, group in itertools.groupby(zip(moves, places, strict=True), key=lambda pair: pair[0].is_copy):
        run = list(group)
        if is_copy:  # neighbours in both files: one range
            (first, place), (_, last) = run[0], run[-1]
            yield from _copied(read_fd, write_fd, first.old.start, place.start, last.stop - place.start)
        else:
            for move, place in run:
                yield from _changed(move, place)


def _copied(read_fd: int, write_fd: int, start: int, place: int, count: int) -> Iterator[Block]:
    shared = transfer.share(read_fd, write_fd, start, place, count)
    ends = sorted({start, start + count, *((shared.start, shared.stop) if shared else ())})
    for one, other in itertools.pairwise(ends):
        for first in range(one, other, transfer.BLOCK):
            last = min(first + transfer.BLOCK, other)
            yield Block(first, last, place + first - start, place + last - start, shared=first in shared)


def _changed(move: _Move, place: Entry) -> Iterator[Block]:
    """Blocks of whole rows."""
    old, count = move.old, max(1, transfer.BLOCK // max(1, _room(move, 1)))
    cuts = [*range(0, place.rows, count), place.rows]
    rows = [slice(first, last) for first, last in itertools.pairwise(cuts)]
    measured = _measured(move.step, rows)
    for part, is_measured in zip(rows, measured, strict=True):
        yield Block(
            old.start + part.start * old.row_bytes,
            old.start + part.stop * old.row_bytes,
            place.start + part.start * place.row_bytes,
            place.start + part.stop * place.row_bytes,
            work=functools.partial(_change, move, place, part, is_measured),
        )


def _room(move: _Move, rows: int) -> int:
    """The bytes that rows of a tensor take in their largest form on the way: stored, summed, or stored anew."""
    each = max(move.old.dtype.itemsize, move.dtype.itemsize, np.dtype(np.float32).itemsize)
    return rows * math.prod(move.old.shape[1:]) * each


def _measured(step: Step | None, rows: Sequence[slice]) -> Sequence[bool]:
    """Which blocks of a weight the ledger's figures are taken from: all, or in a large weight some.

    Measuring a block costs as much as changing it, and a million entries tell a retention to a thousandth. The
    sample is spread over the rows evenly; where it would miss much of the change, all is measured.
    """
    everything = [True] * len(rows)
    stride = math.prod(step.spec.shape) // MEASURED if step is not None and step.terms else 0
    if step is None or stride < 2:
        return everything
    sample = [number % stride == 0 for number in range(len(rows))]
    energies = step.row_energies()
    in_sample = [part for part, taken in zip(rows, sample, strict=True) if taken]
    share = sum(part.stop - part.start for part in in_sample) / len(energies)
    heard = sum(energies[part].sum() for part in in_sample)
    return sample if heard >= share / 2 * energies.sum() else everything


def _change(
    move: _Move, place: Entry, rows: slice, measured: bool, source: Bytes, target: Bytes, spare: Bytes
) -> Tally | None:
    """Make rows of a tensor that is not copied; returns what became of them where something was added to them."""
    shape = (rows.stop - rows.start, *move.old.shape[1:]) if move.old.shape else ()
    merged = target.view(place.dtype).reshape(shape)
    with np.errstate(over="ignore", invalid="ignore"):  # _refuse_overflow looks for it, and knows the tensor's name
        if move.step is not None and move.step.replace is not None:
            whole = move.step.replace[rows] if move.old.shape else move.step.replace
            np.copyto(merged, whole, casting="unsafe")
            _refuse_overflow(place, whole, merged)
            return None
        weight = source.view(move.old.dtype).reshape(shape)
        if move.step is None:
            np.copyto(merged, weight, casting="unsafe")
            _refuse_overflow(place, weight, merged)
            return None
        change, total = _two(spare, shape, sums_in(weight.dtype))
        change = move.step.stored_delta(rows, out=change)
        add_into(merged, weight, change, total)
        flat = total.reshape(-1)
        if not flat @ flat < float(ml_dtypes.finfo(place.dtype).max) ** 2:  # or it is finite, each entry of it
            _refuse_overflow(place, weight, merged)
        tally = Tally(place.name)
        if measured:
            tally.count(weight, change, merged)
    return tally


def _two(spare: Bytes, shape: tuple[int, ...], wide: np.dtype[Any]) -> tuple[NDArray[np.float32], NDArray[Any]]:
    """Room for a change and a sum of this shape."""
    half, count = spare.size // 2, math.prod(shape)
    change = spare[: 4 * count].view(np.float32).reshape(shape)
    return change, spare[half : half + wide.itemsize * count].view(wide).reshape(shape)


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
