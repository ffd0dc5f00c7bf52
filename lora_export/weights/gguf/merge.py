"""A merge into a GGUF file: the same fields, the same tensors in the same sequence, and the type of each its own.

Weights that no adapter changes keep their bytes. The others are summed in fp32 and stored as the nearest codes on the
scales that their blocks have, or on new ones (`new_scales`). A weight that would lose its change so is promoted to a
wider type. That is decided before anything is written, on the blocks that the statistics count: the place of a tensor
depends on those before it.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from lora_export import provenance
from lora_export.errors import InputRefused, listed
from lora_export.lora import EVERY_ROW
from lora_export.options.spelling import command, named
from lora_export.plan import Plan
from lora_export.storage import block_copy, gguf_file
from lora_export.storage.block_copy import Block, Bytes
from lora_export.storage.gguf_blocks import FLAT, BlockCodec, codec_of, decoded, new_q8_0
from lora_export.storage.gguf_file import BY_NAME, BlockType, GgufTensor
from lora_export.storage.gguf_scales import Floats
from lora_export.storage.hashes import FAST, file_hash
from lora_export.storage.safetensors_file import Entry
from lora_export.weights import compiled, tensor_blocks
from lora_export.weights.apply_step import Backend
from lora_export.weights.calibrated_rounding import LayerInputs, calibrated
from lora_export.weights.encoded_tensor import EncodedTensor, WrittenRows
from lora_export.weights.gguf.base import GgufBase
from lora_export.weights.gguf.new_scales import on_best_scales
from lora_export.weights.merge import refuse_before_merge
from lora_export.weights.merge_report import (
    MIN_RETENTION,
    MergeReport,
    OnBytesWritten,
    QuantisedLayer,
    Statistics,
    StatisticsByWeight,
    StepResult,
    is_in_range,
    refuse_below_rounding,
)
from lora_export.weights.quantised_layers import why_promoted
from lora_export.weights.tensor_blocks import OutputTensor, Patch

FLOAT = np.dtype(np.float32)
Q8_0, F16, F32 = BY_NAME["Q8_0"], BY_NAME["F16"], BY_NAME["F32"]
KEEP = "keep"
STATED = {**{name: BY_NAME[name] for name in ("Q8_0", "F16", "BF16", "F32")}, KEEP: None}  # what a user may choose


@dataclass(frozen=True)
class _Stored:
    """How a tensor is stored in the output."""

    tensor: GgufTensor  # of the base
    type: BlockType
    change: OutputTensor | None = None  # None: its bytes are copied
    has_new_scales: bool = False  # in blocks of its own type

    @property
    def name(self) -> str:
        """Its type in a report."""
        return f"{self.type.name}, new scales" if self.has_new_scales else self.type.name


def merge_gguf(
    plan: Plan,
    base: GgufBase,
    path: Path,
    *,
    min_retention: float = MIN_RETENTION,
    rescale: bool = False,
    types: Mapping[str, str] = MappingProxyType({}),
    calibration: Mapping[str, LayerInputs] = MappingProxyType({}),
    hashing: str = FAST,
    progress: OnBytesWritten = lambda _: None,
    backend: Backend | None = None,
    more_settings: Mapping[str, Any] = MappingProxyType({}),
) -> MergeReport:
    """Carry out a plan over a GGUF file, into the new file `path`. The plan has the rows of transformers.

    `types` are those that the user chose: a name or glob of tensors -> a key of STATED; the last that matches counts.
    `calibration` has the inputs of layers, by the names that transformers has for their weights. With `rescale`, blocks
    that change get new scales where these bring them nearer to W + ΔW. Peak memory is a few blocks, and the header.

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
        stored, layers = _decide(plan, base, chosen, min_retention, backend, calibration, rescale=rescale)
        promoted = {one.tensor.name: one.type.name for one in stored if one.type != one.tensor.type}
        settings = {"min_retention": min_retention, "types": promoted, **backend.settings, **more_settings}
        if named_layers := [one.change.name for one in stored if one.change is not None and _is_fed_back(one.change)]:
            settings |= {"calibrated": sorted(named_layers)}
        if rescaled := [one.tensor.name for one in stored if one.has_new_scales]:
            settings |= {"rescaled": rescaled}

        def record(source_hash: str) -> dict[str, str]:
            files = {base.file.path.name: {hashing: source_hash}}
            own = provenance.record(
                plan.adapters, plan.strengths, files, base.checkpoint.history, settings, base_path=base.file.path
            )
            return {provenance.KEY: json.dumps(own)}

        results = _write(path, base, stored, record, progress, backend, hashing)
    refuse_below_rounding(results, min_retention, _ways_out)
    base.checkpoint.refuse_changed_files("merged")
    return MergeReport(
        results=results,
        copied=sum(one.tensor.stop - one.tensor.start for one in stored if one.change is None),
        bytes=path.stat().st_size,
        replaced_weights=plan.replaced_weights,
        seconds=time.perf_counter() - begun,
        spellings={one.name: spelling for one, spelling in zip(plan.adapters, plan.spellings, strict=False)},
        layers=layers,
        base_bytes=base.file.size,
    )


# --- What is refused ---


def _ways_out() -> str:
    """What helps where a weight loses its change in the type that it has."""
    return (
        f"Store them in a wider type ({named('dtype_of', {'*': 'F32'})}), or keep the adapter beside the model "
        f"({command('convert', to='gguf')}), where llama.cpp adds it"
    )


def _refuse_added(plan: Plan) -> None:
    added = [*plan.untied, *(step.weight for step in plan.steps if step.added)]
    if added:
        raise InputRefused(
            f"a merge into a GGUF file adds no tensors, and this one would add {', '.join(added)}. Merge into the "
            "checkpoint of which the file was made, and convert the result"
        )


def _stated_types(plan: Plan, base: GgufBase, types: Mapping[str, str]) -> dict[str, BlockType | None]:
    """The types that the user chose, by weight; None: that of the base.

    Norms and biases have none: llama.cpp reads them in the type that they have.
    """
    changed = [name for name, one in base.tensors.items() if len(one.shape) > 1 and plan.steps_on(name)]
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
    for name, stated in found.items():
        if stated is not None and (width := base.tensors[name].shape[-1]) % stated.elements:
            raise InputRefused(
                f"{name} has rows of {width} elements, and {stated.name} has blocks of {stated.elements}: "
                f"{named('dtype_of', {name: 'F16'})} stores it"
            )
    return found


# --- The type of each tensor ---


def _decide(
    plan: Plan,
    base: GgufBase,
    chosen: Mapping[str, BlockType | None],
    min_retention: float,
    backend: Backend,
    calibration: Mapping[str, LayerInputs],
    *,
    rescale: bool,
) -> tuple[list[_Stored], tuple[QuantisedLayer, ...]]:
    """Every tensor in the order of the base's bytes, in the narrowest type that can hold its change; and why."""

    def of(name: str) -> tuple[_Stored, QuantisedLayer | None]:
        tensor, change = base.tensors[name], _changed(plan, base, name)
        if change is None:
            return _Stored(tensor, tensor.type), None
        change = change.with_inputs(name, calibration)
        stored_as = functools.partial(_stored_as, tensor=tensor, change=change, rescale=rescale)
        trial = functools.cache(lambda kind: _trial(base, stored_as(kind), backend))
        own, *wider = _types_for(tensor.type)
        result = trial(own)
        why = _why_promoted(result, min_retention)
        if name in chosen:
            kind = chosen[name] or own
            why = "" if kind == own else f"stated by {named('dtype_of')}"
        else:
            kind = own if not why else next((one for one in wider if not _why_promoted(trial(one), min_retention)), F32)
        stored = stored_as(kind)
        if _is_fed_back(change) and not _is_calibrated(trial(kind)):  # the record names it before it is written
            stored = replace(stored, change=replace(change, inputs=_measured_alone(change.inputs)))
        figures = (None, None, None) if result is None else (result.retention, result.noise, result.outputs)
        return stored, QuantisedLayer(name, own.name, stored.name, why, *figures)

    # The matrices of a layer's inputs are large: with these, one layer at a time
    with ThreadPoolExecutor(1 if calibration else block_copy.default_threads()) as pool:
        found = list(pool.map(of, base.tensors))
    return [stored for stored, _ in found], tuple(layer for _, layer in found if layer is not None)


def _why_promoted(result: StepResult | None, min_retention: float) -> str:
    return "its values do not fit" if result is None else why_promoted(result, min_retention)


def _stored_as(kind: BlockType, tensor: GgufTensor, change: OutputTensor, *, rescale: bool) -> _Stored:
    """A changed tensor in a type. On new scales, each number is the nearest: the scales were fitted to these."""
    rescale = rescale and kind == tensor.type and kind not in FLAT
    own_grid = kind in FLAT or (kind == tensor.type and not rescale)
    change = change if own_grid else replace(change, inputs=_measured_alone(change.inputs))
    return _Stored(tensor, kind, change, rescale)


def _measured_alone(inputs: LayerInputs | None) -> LayerInputs | None:
    """The inputs of a layer that is rounded to nearest."""
    return None if inputs is None else replace(inputs, is_fed_back=False)


def _is_fed_back(change: OutputTensor) -> bool:
    return change.inputs is not None and change.inputs.is_fed_back


def _is_calibrated(result: StepResult | None) -> bool:
    return result is not None and result.outputs is not None and result.outputs.is_calibrated


def _types_for(own: BlockType) -> list[BlockType]:
    """The types that are tried for a weight, the narrowest first."""
    wider = [F16, F32] if own in FLAT else [Q8_0, F16, F32]
    return [own, *(kind for kind in wider if kind != own and own != F32)]


def _changed(plan: Plan, base: GgufBase, name: str) -> OutputTensor | None:
    """What happens to a tensor on its way; None where it is copied."""
    step, parts = plan.by_weight.get(name), plan.by_part.get(name, ())
    if step is None and not parts:
        return None
    tensor = base.tensors[name]
    if tensor.type not in FLAT:
        codec_of(name, tensor.type)
    entry = Entry(name, FLAT.get(tensor.type, FLOAT), tensor.shape, tensor.start, tensor.stop)
    patches = tuple(
        Patch(part, part.spec.region.rows, part.spec.region.columns) for part in parts if part.spec.region is not None
    )
    cut = parts[0].spec.region if parts else None
    return OutputTensor(
        source=entry if cut is None else replace(entry, shape=cut.shape),
        step=step,
        name=name,
        dtype=entry.dtype,
        patches=patches,
        quantised=base.checkpoint.quantised.get(name),
        shape=tensor.shape,
    )


def _trial(base: GgufBase, stored: _Stored, backend: Backend) -> StepResult | None:
    """What a change loses in this type, on the blocks that are measured; None where its numbers do not fit."""
    assert stored.change is not None
    total = Statistics(stored.tensor.name)
    with base.file.path.open("rb") as file:
        blocks = _changed_blocks(base, stored, file.fileno(), 0, backend)
        measured = (block for block, is_measured in blocks if is_measured)
        try:
            for statistics in tensor_blocks.run_in_memory(base.file.path, file.fileno(), stored.change, measured):
                total.merge(statistics)
        except InputRefused:
            return None
    return total.result()


# --- Writing ---


def _write(
    path: Path,
    base: GgufBase,
    stored: Sequence[_Stored],
    record: Callable[[str], Mapping[str, str]],
    progress: OnBytesWritten,
    backend: Backend,
    hashing: str,
) -> tuple[StepResult, ...]:
    """Write the file. `record` makes its record of provenance from the hash of the base."""
    hashes = block_copy.RunningHashes(hashing)

    def layout(source_hash: str) -> tuple[bytes, list[GgufTensor]]:
        described = [(one.tensor.name, one.type, one.tensor.shape) for one in stored]
        return gguf_file.gguf_layout(base.file, described, record(source_hash))

    header, targets = layout(hashes.source.hexdigest())
    total = StatisticsByWeight()
    with base.file.path.open("rb") as reader, path.open("xb") as writer:
        if not writer.seekable():  # the header goes first, and has the source's hash: the source is read twice
            header, _ = layout(file_hash(base.file.path, hashing))
            block_copy.write(writer.fileno(), memoryview(header), 0)
        block_copy.reserve(writer.fileno(), max([len(header), *(target.stop for target in targets)]))
        blocks = _blocks(base, stored, targets, reader.fileno(), writer.fileno(), backend)
        size = tensor_blocks.block_size(one.change for one in stored if one.change is not None)
        for block, found in backend.transfer(base.file.path, writer.fileno(), blocks, hashes, buffer_bytes=size):
            total.add(found)
            progress(block.target_stop - block.target_start)
        if writer.seekable():
            header, _ = layout(hashes.source.hexdigest())  # as long as the first one: all hashes have one length
            block_copy.write(writer.fileno(), memoryview(header), 0)
    progress(len(header))
    return total.results


def _blocks(
    base: GgufBase,
    stored: Sequence[_Stored],
    targets: Sequence[GgufTensor],
    read_fd: int,
    write_fd: int,
    backend: Backend,
) -> Iterator[Block]:
    """All bytes of the base in their order. Between two tensors there are zeros."""
    alignment = base.file.alignment
    yield from tensor_blocks.skipped_blocks(0, 0, base.file.data_start)
    ends = [*(one.tensor.start for one in stored[1:]), base.file.size]
    for one, target, end in zip(stored, targets, ends, strict=True):
        start, stop = one.tensor.start, one.tensor.stop
        if one.change is None:
            yield from tensor_blocks.copied_blocks(read_fd, write_fd, start, target.start, stop - start)
        else:
            for block, _ in _changed_blocks(base, one, read_fd, target.start, backend):
                yield block
        yield Block(stop, end, target.stop, gguf_file.next_aligned(target.stop, alignment), work=_fill_with_zeros)


def _fill_with_zeros(_source: Bytes, target: Bytes, _scratch: Bytes) -> None:
    target[:] = 0


def _changed_blocks(
    base: GgufBase, stored: _Stored, read_fd: int, start: int, backend: Backend
) -> Iterator[tuple[Block, bool]]:
    """The blocks of a tensor that changes and begins there in the output, and whether each is measured.

    Their work returns statistics.
    """
    assert stored.change is not None
    path, change, kind = base.file.path, stored.change, stored.type
    if kind not in FLAT:
        per_row, encode = math.prod(change.source.shape[1:]), functools.partial(_encode, stored)
        own = change.source, change.step, change.name, FLOAT, change.patches, change.quantised
        made = EncodedTensor(
            *own,
            encode=encode,
            place=lambda row: row * per_row // kind.elements * kind.nbytes,
            is_one=True,
            at_once=functools.partial(_at_once, stored),
        )  # without inputs: the feedback is that of `encode`
        yield from made.blocks(path, read_fd, start, backend)
        return
    change = replace(change, dtype=FLAT[kind])
    target = Entry(change.name, change.dtype, change.source.shape, start, start + change.nbytes)
    blocks = list(tensor_blocks.changed_blocks(path, read_fd, change, target, backend))
    rows = [slice(*((edge - start) // target.row_bytes for edge in (b.target_start, b.target_stop))) for b in blocks]
    yield from zip(blocks, tensor_blocks.blocks_to_measure(change.step, rows), strict=True)


def _at_once(stored: _Stored, rows: slice, source: Bytes, target: Bytes, measured: bool) -> list[Statistics] | None:
    """Sum and store rows on their scales by compiled code, and copy those without a change; None where it cannot."""
    change, kind = stored.change, stored.type
    assert change is not None
    is_kept = kind == stored.tensor.type and not stored.has_new_scales
    if not is_kept or change.inputs is not None or compiled.kernel() is None:
        return None
    before, after = (each.reshape(rows.stop - rows.start, -1, kind.nbytes) for each in (source, target))
    total, is_copied, codec = np.zeros(5), np.ones(len(before), bool), codec_of(change.name, kind)
    for patch in change.all_patches:
        own = patch.within(rows)
        if own is None:
            continue
        here = slice(own.start + patch.rows.start - rows.start, own.stop + patch.rows.start - rows.start)
        blocks = (each[here].reshape(-1, kind.nbytes) for each in (before, after))
        is_whole = patch.columns == EVERY_ROW
        found = compiled.merged_blocks(patch.step, own, codec, *blocks, measured=measured) if is_whole else None
        if found is None:
            return None
        total += found
        is_copied[here] = False
    if is_copied.any():  # experts without an adapter
        after[is_copied] = before[is_copied]
        values = decoded(change.name, codec, before[is_copied].reshape(-1, kind.nbytes))
        total[0] += np.square(values, dtype=np.float64).sum() if measured else 0
    if measured and not is_in_range(total[:2]):
        return None
    statistics = Statistics(change.name)
    if measured:
        statistics.add_sums(total, before.size // kind.nbytes * kind.elements)
    return [statistics]


def _encode(stored: _Stored, source: Bytes, total: Floats, target: Bytes, measured: bool) -> WrittenRows:
    """Store sums as blocks. Raises InputRefused where a value is beyond what the type can hold."""
    name, own, kind = stored.tensor.name, stored.tensor.type, stored.type
    codec, values, before = codec_of(name, kind), total.reshape(-1, kind.elements), source.reshape(-1, own.nbytes)
    if kind != own:
        blocks = new_q8_0(values)
    else:
        blocks = (on_best_scales if stored.has_new_scales else BlockCodec.encode)(codec, before, values)
    outputs = None
    if stored.change is not None and stored.change.inputs is not None:
        change = total - decoded(name, codec_of(name, own), before).reshape(total.shape)
        start = before if kind == own and not stored.has_new_scales else blocks
        blocks, outputs = _fed_back(stored.change.inputs, codec, start, codec.codes_of(blocks), total, change)
    target[:] = blocks.reshape(-1)
    # `decoded` refuses new scales that are too large
    return None if kind == own and not measured else decoded(name, codec, blocks), outputs


def _fed_back(
    inputs: LayerInputs, codec: BlockCodec, blocks: Bytes, nearest: Bytes, total: Floats, change: Floats
) -> tuple[Bytes, NDArray[np.float64]]:
    """Blocks with the nearest codes, or those on the other side of some sums; and the sums of their outputs."""
    other = codec.beyond(blocks, total.reshape(nearest.shape), nearest)
    values = (codec.values_of(blocks, codes).reshape(total.shape) for codes in (nearest, other))
    takes_other, outputs = calibrated(inputs, total, change, *values, is_transposed=False)
    return codec.with_codes(blocks, np.where(takes_other.reshape(nearest.shape), other, nearest)), outputs
