"""Executor 1: a plan over a checkpoint. Little more than a file copy.

Every file of the base is carried over in blocks (see `transfer`), those of a weight that changes in whole
rows, so that memory does not grow with the model.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from lora_export import provenance
from lora_export.errors import InputRefused
from lora_export.plan import FLOATS, Plan, Step
from lora_export.storage import block_copy, safetensors_file
from lora_export.storage.block_copy import Block
from lora_export.storage.manifest import write_manifest
from lora_export.storage.safetensors_file import Entry, TensorFile
from lora_export.weights import apply_step
from lora_export.weights.apply_step import Backend, Move
from lora_export.weights.checkpoint import CONFIG, Checkpoint
from lora_export.weights.merge_report import (
    MIN_RETENTION,
    MergeReport,
    Progress,
    Statistics,
    StepResult,
    refuse_below_rounding,
)
from lora_export.weights.task_head import config_with_heads

WORD_HEAD = re.compile(r"LMHead|For(CausalLM|MaskedLM|ConditionalGeneration|PreTraining)")  # classes that predict words


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
    backend: Backend | None = None,
) -> MergeReport:
    """Carry out a plan over a checkpoint, into the folder `stage` (see `staging`).

    A folder becomes a folder with the same shards, config and tokenizer and a manifest; a bare
    file becomes one file called `file_name`, its provenance in the header. `dtype` converts every
    float tensor. `hashing` is the hash by which base and output are recorded (see `hashes.ALGORITHMS`).
    `backend` is who changes the weights, NumPy unless told (see `device`).
    Peak memory is a few blocks, whatever the model's size.

    Raises InputRefused when an adapter is in the base already, tied embeddings would be torn, a value
    is not finite, the base changes meanwhile, or a weight keeps less than `min_retention` of its change.
    """
    begun = time.perf_counter()
    refuse_before_the_work(plan, base)
    backend = backend or Backend()
    settings = {"dtype": dtype or "keep", "min_retention": min_retention} | backend.settings

    def record(hashes: Mapping[str, str]) -> dict[str, Any]:
        return provenance.record(
            plan, {name: {hashing: value} for name, value in hashes.items()}, base.history, settings
        )

    def metadata(name: str, source_hash: str) -> Mapping[str, str]:
        own = {} if base.is_folder else {provenance.KEY: json.dumps(record({name: source_hash}))}
        return {"format": "pt", **base.shards[name].metadata, **own}

    moves = _moves(plan, base, dtype)
    written = {}
    with threadpool_limits(1, user_api="blas"):  # the transfer's threads are as many as there are cores
        for name, source in base.shards.items():
            path = stage / (name if base.is_folder else file_name)
            own = functools.partial(metadata, name)
            written[name] = _write_shard(path, source, moves[name], own, progress, backend, hashing=hashing)
    results = [result for shard in written.values() for result in shard.results]
    refuse_below_rounding(results, min_retention)
    for source in base.shards.values():
        if not source.unchanged():
            raise InputRefused(f"{source.path} changed while it was being merged. Nothing was written.")
    if base.is_folder:
        _write_companions(plan, base, stage, {name: shard.file for name, shard in written.items()}, dtype)
        origin = record({name: shard.source_hash for name, shard in written.items()})
        write_manifest(stage, origin, {name: {hashing: shard.target_hash} for name, shard in written.items()})
    return MergeReport(
        results=tuple(results),
        copied=sum(move.nbytes for name in moves for move in moves[name] if move.is_copy),
        bytes=sum(shard.file.size for shard in written.values()),
        replaced=sum(step.is_replacement for step in plan.steps),
        seconds=time.perf_counter() - begun,
    )


def output_size(plan: Plan, base: Checkpoint, dtype: str | None = None) -> int:
    """How many bytes of tensors a merge writes."""
    return sum(move.nbytes for moves in _moves(plan, base, dtype).values() for move in moves)


def refuse_before_the_work(plan: Plan, base: Checkpoint) -> None:
    """Raise InputRefused for what can be told of a merge without reading a weight."""
    provenance.refuse_second_merge(plan, base.path, base.history)
    refuse_broken_tie(plan, base)


def refuse_broken_tie(plan: Plan, base: Checkpoint) -> None:
    """Raise InputRefused where the input embeddings change, and the output embeddings are the same stored tensor.

    Trained apart they are two tensors. A file of a tied model has one, and the other would follow it unseen. Rows
    of tokens are another matter: where a model is tied, PEFT trains them for both.
    """
    architecture = str((base.config.get("architectures") or [""])[0])
    tables = _word_tables(plan, base)
    if len(tables) != 1 or not base.config.get("tie_word_embeddings", True) or not WORD_HEAD.search(architecture):
        return
    ((name, step),) = tables.items()
    if step is not None and not step.replaces_only_rows:
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


def _moves(plan: Plan, base: Checkpoint, dtype: str | None) -> dict[str, list[Move]]:
    """Every tensor of the output, by its file, in the order of the base's bytes; the added ones last."""

    def stored(own: np.dtype[Any]) -> np.dtype[Any]:
        return np.dtype(dtype) if dtype and str(own) in FLOATS else own

    moves = {
        name: [
            Move(entry, plan.by_weight.get(entry.name), plan.output_name(entry.name), stored(entry.dtype))
            for entry in source.entries.values()
        ]
        for name, source in base.shards.items()
    }
    for step in plan.steps:
        if step.added and step.replace is not None:
            nowhere = Entry(step.weight, step.replace.dtype, step.spec.shape, 0, 0)
            moves[list(moves)[-1]].append(Move(nowhere, step, plan.output_name(step), stored(nowhere.dtype)))
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
    moves: Sequence[Move],
    metadata: Callable[[str], Mapping[str, str]],
    progress: Progress,
    backend: Backend,
    *,
    hashing: str,
) -> _Written:
    """Write one file of the output. `metadata` makes the header's part of it from the source's hash."""
    hashes = block_copy.Hashes(hashing)

    def layout() -> tuple[bytes, list[Entry]]:
        tensors = [(move.name, move.dtype, move.old.shape) for move in moves]
        return safetensors_file.layout(tensors, metadata(hashes.source.hexdigest()), beside=source.data_start)

    header, places = layout()
    hashes.target.update(header)
    with source.path.open("rb") as reader, path.open("xb") as writer:
        hashes.source.update(reader.read(source.data_start))
        blocks = _blocks(source.path, reader.fileno(), writer.fileno(), moves, places, backend)
        tallies: dict[str, Statistics] = {}
        passed = backend.transfer(source.path, writer.fileno(), blocks, hashes, room=apply_step.room(moves))
        for block, found in passed:
            for statistics in found or ():
                tallies.setdefault(statistics.weight, Statistics(statistics.weight)).merge(statistics)
            progress(block.end - block.place)
        final, _ = layout()  # a hash is as long as any other
        block_copy.write(writer.fileno(), memoryview(final), 0)
    progress(len(final))
    results = tuple(statistics.result() for statistics in tallies.values())
    return _Written(safetensors_file.open_file(path), results, hashes.source.hexdigest(), hashes.target.hexdigest())


def _blocks(
    source: Path, read_fd: int, write_fd: int, moves: Sequence[Move], places: Sequence[Entry], backend: Backend
) -> Iterator[Block]:
    """The whole of the source's data, in its order, and after it what is added."""
    for is_copy, group in itertools.groupby(zip(moves, places, strict=True), key=lambda pair: pair[0].is_copy):
        run = list(group)
        if is_copy:  # neighbours in both files: one range
            (first, place), (_, last) = run[0], run[-1]
            yield from apply_step.copied_blocks(
                read_fd, write_fd, first.old.start, place.start, last.stop - place.start
            )
        else:
            for move, place in run:
                yield from apply_step.changed_blocks(source, read_fd, move, place, backend)


def _equal(one: Step, other: Step) -> bool:
    if one.terms or other.terms or one.token_rows or other.token_rows or one.replace is None or other.replace is None:
        return False
    return np.array_equal(one.replace, other.replace)


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
