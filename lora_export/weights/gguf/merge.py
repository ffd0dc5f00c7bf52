"""A merge into a GGUF file: the same fields, the same tensors in the same sequence, and the type of each its own.

Weights that no adapter changes keep their bytes. The others are summed in fp32 and stored as the nearest codes on the
scales that their blocks have. A weight that would lose its change so is promoted to a wider type. That is decided
before anything is written, on the blocks that the statistics count: the place of a tensor depends on those before it.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from lora_export import provenance
from lora_export.errors import InputRefused, listed
from lora_export.options.spelling import named
from lora_export.plan import Plan
from lora_export.storage import block_copy, gguf_file
from lora_export.storage.block_copy import Block, Bytes
from lora_export.storage.gguf_blocks import PLAIN, BlockCodec, Floats, codec_of, decoded, new_q8_0
from lora_export.storage.gguf_file import BY_NAME, BlockType, GgufTensor
from lora_export.storage.hashes import FAST
from lora_export.storage.safetensors_file import Entry
from lora_export.weights import tensor_blocks
from lora_export.weights.apply_step import Backend
from lora_export.weights.gguf.base import GgufBase
from lora_export.weights.merge import refuse_before_merge
from lora_export.weights.merge_report import (
    MIN_RETENTION,
    MergeReport,
    OnBytesWritten,
    Statistics,
    StepResult,
    refuse_below_rounding,
)
from lora_export.weights.tensor_blocks import OutputTensor, Patch

MOST_NOISE = 1.0  # of the change; above it the stored weight is farther from the sum than the base is
Q8_0, F16, F32 = BY_NAME["Q8_0"], BY_NAME["F16"], BY_NAME["F32"]
KEEP = "keep"
STATED = {**{name: BY_NAME[name] for name in ("Q8_0", "F16", "BF16", "F32")}, KEEP: None}  # what a user may choose


@dataclass(frozen=True)
class _Stored:
    """How a tensor is stored in the output."""

    tensor: GgufTensor  # of the base
    type: BlockType
    change: OutputTensor | None = None  # None: its bytes are copied


def merge_gguf(
    plan: Plan,
    base: GgufBase,
    path: Path,
    *,
    min_retention: float = MIN_RETENTION,
    types: Mapping[str, str] = MappingProxyType({}),
    hashing: str = FAST,
    progress: OnBytesWritten = lambda _: None,
    backend: Backend | None = None,
    more_settings: Mapping[str, Any] = MappingProxyType({}),
) -> MergeReport:
    """Carry out a plan over a GGUF file, into the new file `path`. The plan has the rows of transformers.

    `types` are those that the user chose: a name or glob of tensors -> a key of STATED; the last that matches counts.
    Peak memory is a few blocks, and the header.

    Raises InputRefused as `merge_checkpoint` does, for tensors that would be added, for types that cannot be read, and
    for a pattern that fits no weight that changes.
    """
    begun = time.perf_counter()
    refuse_before_merge(plan, base.checkpoint)
    _refuse_added(plan)
    backend = backend or Backend()
    plan = base.in_stored_rows(plan)
    chosen = _stated_types(plan, base, types)
    with threadpool_limits(1, user_api="blas"):
        stored = _decide(plan, base, chosen, min_retention, backend)
        promoted = {one.tensor.name: one.type.name for one in stored.values() if one.type != one.tensor.type}
        settings = {"min_retention": min_retention, **({"types": promoted} if promoted else {}), **more_settings}

        def record(source_hash: str) -> dict[str, str]:
            files = {path.name: {hashing: source_hash}}
            own = provenance.record(
                plan.adapters, plan.strengths, files, base.checkpoint.history, settings, base_path=base.file.path
            )
            return {provenance.KEY: json.dumps(own)}

        results = _write(path, base, stored, record, progress, backend, hashing)
    refuse_below_rounding(results, min_retention)
    base.checkpoint.refuse_changed_files("merged")
    replaced = tuple(step.weight for step in plan.steps if step.is_replacement)
    return MergeReport(
        results=results,
        copied=sum(one.tensor.stop - one.tensor.start for one in stored.values() if one.change is None),
        bytes=path.stat().st_size,
        replaced=len(replaced),
        replaced_weights=replaced,
        seconds=time.perf_counter() - begun,
        spellings={one.name: spelling for one, spelling in zip(plan.adapters, plan.spellings, strict=False)},
    )


# --- What is refused ---


def _refuse_added(plan: Plan) -> None:
    added = [*plan.untied, *(step.weight for step in plan.steps if step.added)]
    if added:
        raise InputRefused(f"a merge into a GGUF file adds no tensors, and this one would add {', '.join(added)}")


def _stated_types(plan: Plan, base: GgufBase, types: Mapping[str, str]) -> dict[str, BlockType | None]:
    """The types that the user chose, by weight; None: that of the base."""
    changed = [name for name in base.tensors if name in plan.by_weight or name in plan.by_part]
    found: dict[str, BlockType | None] = {}
    unused = []
    for pattern, kind in types.items():
        spellings = {name: (name, name.removesuffix(".weight"), base.tensors[name].name) for name in changed}
        fitting = [name for name in changed if any(fnmatchcase(one, pattern) for one in spellings[name])]
        unused += [] if fitting else [pattern]
        found |= dict.fromkeys(fitting, STATED[kind])
    if unused:
        raise InputRefused(
            f"{named('dtype_of', unused[0])} fits no weight that the adapters change. They change:", listed(changed)
        )
    return found


# --- The type of each tensor ---


def _decide(
    plan: Plan, base: GgufBase, chosen: Mapping[str, BlockType | None], min_retention: float, backend: Backend
) -> dict[str, _Stored]:
    """Every tensor in the order of the base's bytes, with the type in which it loses as little as is allowed."""

    def of(name: str) -> _Stored:
        tensor = base.tensors[name]
        change = _changed(plan, base, name)
        if change is None:
            return _Stored(tensor, tensor.type)
        if name in chosen:
            return _Stored(tensor, chosen[name] or tensor.type, change)
        *types, last = _types_for(tensor.type)
        for kind in types:
            result = _trial(base, _Stored(tensor, kind, change), backend)
            if result is not None and result.retention >= min_retention and result.noise <= MOST_NOISE:
                return _Stored(tensor, kind, change)
        return _Stored(tensor, last, change)

    with ThreadPoolExecutor(block_copy.default_threads()) as pool:
        return dict(zip(base.tensors, pool.map(of, base.tensors), strict=True))


def _types_for(own: BlockType) -> list[BlockType]:
    """The types that are tried for a weight, the narrowest first."""
    wider = [Q8_0, F16, F32]
    if own in PLAIN:
        wider = [kind for kind in (F16, F32) if PLAIN[own].itemsize < 4 and kind != own]
    return [own, *(kind for kind in wider if kind != own)]


def _changed(plan: Plan, base: GgufBase, name: str) -> OutputTensor | None:
    """What happens to a tensor on its way; None where it is copied."""
    step, parts = plan.by_weight.get(name), plan.by_part.get(name, ())
    if step is None and not parts:
        return None
    tensor, quantised = base.tensors[name], base.checkpoint.quantised.get(name)
    entry = Entry(name, np.dtype(np.float32), tensor.shape, tensor.start, tensor.stop)
    if quantised is None:
        entry = replace(entry, dtype=PLAIN[tensor.type])
    else:
        codec_of(name, tensor.type)
    regions = [part.spec.region for part in parts if part.spec.region is not None]
    if not regions:
        return OutputTensor(entry, step, name, entry.dtype, quantised=quantised)
    patches = tuple(Patch(part, one.rows, one.columns) for part, one in zip(parts, regions, strict=True))
    cut = replace(entry, shape=regions[0].shape)
    return OutputTensor(cut, None, name, entry.dtype, patches, quantised, tensor.shape)


def _trial(base: GgufBase, stored: _Stored, backend: Backend) -> StepResult | None:
    """What a change would lose in this type, on the blocks that are measured; None where its numbers do not fit."""
    total: dict[str, Statistics] = {}
    with base.file.path.open("rb") as file:
        for block in _changed_blocks(base, stored, file.fileno(), 0, backend, only_measured=True):
            assert block.work is not None
            source = np.empty(block.stop - block.start, np.uint8)
            target, scratch = np.empty(block.target_stop - block.target_start, np.uint8), np.empty(1, np.uint8)
            block_copy.read(base.file.path, file.fileno(), source, block.start)
            scratch = np.empty(2 * max(block_copy.BLOCK, 4 * _elements(stored, block)), np.uint8)
            try:
                _add(total, block.work(source, target, scratch))
            except InputRefused:
                return None
    joined = Statistics(stored.tensor.name)
    for statistics in total.values():
        joined.merge(statistics)
    return joined.result()


def _elements(stored: _Stored, block: Block) -> int:
    """The number of elements in a block of the output."""
    return (block.target_stop - block.target_start) // stored.type.nbytes * stored.type.elements


def _add(total: dict[str, Statistics], found: Sequence[Statistics] | None) -> None:
    for statistics in found or ():
        total.setdefault(statistics.weight, Statistics(statistics.weight)).merge(statistics)


# --- Writing ---


def _write(
    path: Path,
    base: GgufBase,
    stored: Mapping[str, _Stored],
    record: Callable[[str], Mapping[str, str]],
    progress: OnBytesWritten,
    backend: Backend,
    hashing: str,
) -> tuple[StepResult, ...]:
    """Write the file. `record` makes its record of provenance from the hash of the source."""
    hashes = block_copy.RunningHashes(hashing)

    def layout() -> tuple[bytes, list[GgufTensor]]:
        described = [(one.tensor.name, one.type, one.tensor.shape) for one in stored.values()]
        return gguf_file.layout(base.file, described, record(hashes.source.hexdigest()))

    header, targets = layout()
    total: dict[str, Statistics] = {}
    changes = [one.change for one in stored.values() if one.change is not None]
    with base.file.path.open("rb") as reader, path.open("xb") as writer:
        blocks = _blocks(base, list(stored.values()), targets, reader.fileno(), writer.fileno(), backend)
        size = tensor_blocks.block_size(changes)
        for block, found in backend.transfer(base.file.path, writer.fileno(), blocks, hashes, buffer_bytes=size):
            _add(total, found)
            progress(block.target_stop - block.target_start)
        final, _ = layout()  # as long as the first one: all hashes have one length
        block_copy.write(writer.fileno(), memoryview(final), 0)
    progress(len(final))
    return tuple(statistics.result() for statistics in total.values())


def _blocks(
    base: GgufBase,
    stored: Sequence[_Stored],
    targets: Sequence[GgufTensor],
    read_fd: int,
    write_fd: int,
    backend: Backend,
) -> Iterator[Block]:
    """All bytes of the base in their order. What follows a tensor up to the next one is zeros."""
    position, end = 0, base.file.data_start  # what was read, and where the next tensor begins in the base
    yield from tensor_blocks.skipped_blocks(0, targets[0].start if targets else 0, base.file.data_start)
    for number, (one, target) in enumerate(zip(stored, targets, strict=True)):
        tensor = one.tensor
        if one.change is None:
            count = tensor.stop - tensor.start
            yield from tensor_blocks.copied_blocks(read_fd, write_fd, tensor.start, target.start, count)
        else:
            yield from _changed_blocks(base, one, read_fd, target.start, backend)
        is_last = number + 1 == len(stored)
        end = base.file.size if is_last else stored[number + 1].tensor.start
        target_end = gguf_file.aligned(target.stop, base.file.alignment) if is_last else targets[number + 1].start
        position = tensor.stop
        yield Block(position, end, target.stop, target_end, work=_fill_with_zeros)


def _fill_with_zeros(_source: Bytes, target: Bytes, _scratch: Bytes) -> None:
    target[:] = 0


def _changed_blocks(
    base: GgufBase, stored: _Stored, read_fd: int, start: int, backend: Backend, *, only_measured: bool = False
) -> Iterator[Block]:
    """The blocks of a tensor that changes, which begins there in the output. Their work returns its statistics."""
    assert stored.change is not None
    change, kind = stored.change, stored.type
    if kind in PLAIN:
        change = replace(change, dtype=PLAIN[kind])
    floats = Entry(change.name, change.dtype, change.source.shape, start, start + change.nbytes)
    measured = change if only_measured else None
    for block in tensor_blocks.changed_blocks(base.file.path, read_fd, change, floats, backend, measured):
        if kind in PLAIN:
            yield block
            continue
        first, last = ((edge - start) // 4 // kind.elements * kind.nbytes for edge in (block.target_start, block.target_stop))
        work = functools.partial(_encode, block, change, stored)
        yield replace(block, target_start=start + first, target_stop=start + last, work=work)
