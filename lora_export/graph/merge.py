"""A plan over a graph on disk: its files carried over in blocks, the weights that change in whole rows.

What `fold` does in memory, for graphs of any size: the graph without its weights is changed in memory, and
where a weight belongs in the new files, its bytes pass through from the old ones (see `transfer`).
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir
from threadpoolctl import threadpool_limits

from lora_export import provenance
from lora_export.errors import InputRefused, RuntimeRefused
from lora_export.graph import protobuf_wire
from lora_export.graph.fold import (
    Landing,
    change_in_memory,
    land,
    refuse_quantised,
    refuse_what_a_graph_cannot_take,
)
from lora_export.graph.onnx_file import LIMIT, GraphFile, append_metadata, initializers, message_of, strip
from lora_export.graph.quantised.requantise import Part, Requantised, is_quantised, refuse_unknown_scheme, take_over
from lora_export.graph.sites import Sites
from lora_export.lora import EVERY_ROW
from lora_export.plan import Plan
from lora_export.storage import block_copy
from lora_export.storage.atomic_output import data_name
from lora_export.storage.block_copy import Block, Bytes, Hashes
from lora_export.storage.safetensors_file import PAGE, Entry
from lora_export.weights import tensor_blocks
from lora_export.weights.apply_step import Backend
from lora_export.weights.merge_report import (
    MIN_RETENTION,
    MergeReport,
    Progress,
    Statistics,
    StepResult,
    refuse_below_rounding,
)
from lora_export.weights.tensor_blocks import OutputTensor, Patch

WAYS_OUT = (
    "Keep the adapter beside the weights (onnx MODEL.onnx --lora nodes), or merge into the float model and export or "
    "quantise that"
)


@dataclass(frozen=True, eq=False)
class _Weight:
    """A tensor of a file of the old graph, on its way into one of the new."""

    value: ir.Value
    source: Path
    move: OutputTensor
    part: tuple[Requantised, Part] | None = None  # what is made in place of a copy

    @property
    def old(self) -> Entry:
        return self.move.source

    @property
    def is_copy(self) -> bool:
        return self.part is None and self.move.is_copy


@dataclass(frozen=True, eq=False)
class _Part:
    """Bytes [place, end) of a new file: a weight's, or given ones."""

    place: int
    end: int
    weight: _Weight | None = None
    literal: bytes = b""


def merge_graph(
    plan: Plan,
    graph: GraphFile,
    sites: Sites,
    stage: Path,
    *,
    file_name: str,
    min_retention: float = MIN_RETENTION,
    hashing: str = "xxh3_128",
    progress: Progress = lambda _: None,
    requantise: bool = False,
    backend: Backend | None = None,
) -> MergeReport:
    """Carry out a plan over the graph of a file, into the folder `stage` (see `staging.stage_file`).

    Weights inside the graph's file stay inside, those in files beside it go into one file that is named by its
    content. Only the plan's weights change; whoever shared one of their tensors gets an initializer of its own.
    The graph's properties stay, and say where it comes from; its exporter's notes on this machine go (`strip`).
    With `requantise`, quantised weights are quantised again in the scheme that they have; else they are refused.
    `backend` is who changes float weights that lie in files, NumPy unless told (see `device`).
    Peak memory is the graph without its weights and a few blocks. The graph in `graph.model` is used up.

    Raises InputRefused when an adapter is in the graph already, a value is not finite, a file changes meanwhile, or
    a weight keeps less than `min_retention` of its change.
    """
    begun, backend = time.perf_counter(), backend or Backend()
    written = write_merged(
        plan,
        graph,
        sites,
        stage,
        file_name=file_name,
        min_retention=min_retention,
        hashing=hashing,
        progress=progress,
        requantise=requantise,
        backend=backend,
    )
    settings = {"lora": "merged", "min_retention": min_retention} | ({"requantize": True} if requantise else {})
    settings |= backend.settings
    record = provenance.record(plan.adapters, plan.strengths, written.sources, graph.history, settings)
    append_metadata(stage / file_name, {provenance.KEY: json.dumps(record)})
    for path in graph.changed():
        raise InputRefused(f"{path} changed while it was being merged. Nothing was written.")
    replaced = tuple(step.weight for step in plan.steps if step.is_replacement)
    return MergeReport(
        results=written.results,
        copied=written.copied,
        bytes=sum(path.stat().st_size for path in stage.iterdir()),
        replaced=len(replaced),
        replaced_weights=replaced,
        seconds=time.perf_counter() - begun,
    )


@dataclass(frozen=True, eq=False)
class Written:
    """What was done to a graph's files."""

    results: tuple[StepResult, ...]
    copied: int  # bytes
    sources: dict[str, dict[str, str]]  # the old files' hashes, as a record has them


def write_merged(
    plan: Plan,
    graph: GraphFile,
    sites: Sites,
    stage: Path,
    *,
    file_name: str,
    min_retention: float = MIN_RETENTION,
    hashing: str = "xxh3_128",
    progress: Progress = lambda _: None,
    requantise: bool = False,
    backend: Backend | None = None,
) -> Written:
    """As `merge_graph`, but for the record of it, and for the look at files that change meanwhile."""
    refuse_before_the_work(plan, graph, sites, requantise=requantise)
    ledger = _Ledger(hashing, progress, backend or Backend())
    with threadpool_limits(1, user_api="blas"):
        landed = _land(plan, graph.model, sites, ledger)
    strip(graph.model)
    graph.model.metadata_props.pop(provenance.KEY, None)  # its adapters are in the new one
    weights = list(_weights(graph.model, landed))
    own = Path(os.path.realpath(graph.path))
    with threadpool_limits(1, user_api="blas"):  # the transfer's threads are as many as there are cores
        beside = [weight for weight in weights if weight.source != own]
        if beside:
            _write_data(stage, file_name, beside, ledger)
        parts = _graph_parts(graph.model, [weight for weight in weights if weight.source == own])
        with (stage / file_name).open("xb") as target:
            ledger.sources[own] = _carry(own, target, parts, Hashes(hashing), ledger)
    results = [statistics.result() for statistics in ledger.tallies.values()]
    refuse_below_rounding(results, min_retention, WAYS_OUT)
    return Written(
        tuple(results),
        sum(weight.old.nbytes for weight in weights if weight.is_copy),
        {path.name: {hashing: value} for path, value in ledger.sources.items()},
    )


def refuse_before_the_work(plan: Plan, graph: GraphFile, sites: Sites, *, requantise: bool = False) -> None:
    """Raise InputRefused for what can be told of a merge without reading a weight."""
    if graph.takes_adapters:
        raise InputRefused(
            f"{graph.path} takes adapters while it runs, and their fingerprints are its weights': merge into the graph "
            "that it was made from"
        )
    provenance.refuse_second_merge(plan, graph.path, graph.history)
    refuse_what_a_graph_cannot_take(plan)
    for step in plan.steps:
        if not requantise:
            refuse_quantised(step, sites)
        for site in sites.by_name[step.weight]:
            if site.quantised is not None:
                refuse_unknown_scheme(site.quantised, step.weight)


class _Ledger:
    """What is heard while the files are written, and who changes the weights."""

    def __init__(self, hashing: str, progress: Progress, backend: Backend):
        self.hashing, self.progress, self.backend = hashing, progress, backend
        self.tallies: dict[str, Statistics] = {}
        self.sources: dict[Path, str] = {}  # hashes

    def statistics(self, weight: str) -> Statistics:
        return self.tallies.setdefault(weight, Statistics(weight))


@dataclass(frozen=True, eq=False)
class _Landed:
    """What is to be done to tensors that lie in files."""

    landings: dict[ir.Value, list[Landing]] = field(default_factory=dict)
    parts: dict[ir.Value, tuple[Requantised, Part]] = field(default_factory=dict)


def _land(plan: Plan, model: ir.Model, sites: Sites, ledger: _Ledger) -> _Landed:
    """What is to be done to weights that stay in their files; to the others it is done."""
    landed, quantised = _Landed(), dict[ir.Value, list[Landing]]()
    for step in plan.steps:
        for landing in land(model, sites, step):
            if is_quantised(landing.value):
                quantised.setdefault(landing.value, []).append(landing)
            elif isinstance(landing.value.const_value, ir.ExternalTensor):
                landed.landings.setdefault(landing.value, []).append(landing)  # `rewrite` will do it
            else:
                statistics = change_in_memory(landing)
                if not step.is_replacement:
                    ledger.statistics(step.weight).merge(statistics)
    for value, there in quantised.items():
        weight, places = take_over(model, value, there)
        for part, place in places.items():
            if isinstance(place.const_value, ir.ExternalTensor):
                landed.parts[place] = weight, part
                continue
            place.const_value, tallies = weight.made(part)
            for statistics in tallies:
                ledger.statistics(statistics.weight).merge(statistics)
    return landed


def _weights(model: ir.Model, landed: _Landed) -> Iterator[_Weight]:
    for value in initializers(model):
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            source = Path(os.path.realpath(tensor.path))
            yield _Weight(value, source, _move(tensor, landed.landings.get(value, [])), landed.parts.get(value))


def _move(tensor: ir.ExternalTensor, landings: Sequence[Landing]) -> OutputTensor:
    start, name = tensor.offset or 0, landings[0].step.weight if landings else tensor.name or ""
    if not landings:  # bytes, whatever they mean: four bits may be an element
        whole = Entry(name, np.dtype(np.uint8), (tensor.nbytes,), start, start + tensor.nbytes)
        return OutputTensor(whole, None, name, whole.dtype)
    shape = tuple(int(size) for size in tensor.shape.numpy())
    entry = Entry(name, tensor.dtype.numpy(), shape, start, start + tensor.nbytes)
    if not landings[0].is_block:
        return OutputTensor(entry, landings[0].step, name, entry.dtype)
    return OutputTensor(entry, None, name, entry.dtype, tuple(_patch(landing, entry) for landing in landings))


def _patch(landing: Landing, entry: Entry) -> Patch:
    rows, *columns = landing.where
    first, last, _ = rows.indices(entry.rows)
    return Patch(landing.step, slice(first, last), columns[0] if columns else EVERY_ROW)


# --- where what comes to lie ---------------------------------------------------------------------


def _write_data(stage: Path, file_name: str, weights: Sequence[_Weight], ledger: _Ledger) -> None:
    """Write the weights that lie beside the graph, and tell the graph where they are now."""
    path, hashes, parts = stage / "weights.data", Hashes(ledger.hashing), _data_parts(weights)
    with path.open("xb") as target:
        for source, theirs in itertools.groupby(parts, key=lambda there: there[0]):
            hashes = hashes.for_next_source()
            ledger.sources[source] = _carry(source, target, [part for _, part in theirs], hashes, ledger)
    name = data_name(file_name, hashes.target.hexdigest())
    path.rename(stage / name)
    for _, part in parts:
        if part.weight is not None:
            _put(part.weight.value, name, part.place, part.end - part.place)


def _data_parts(weights: Sequence[_Weight]) -> list[tuple[Path, _Part]]:
    """The weights with their sources, in the order of their bytes, and each in its page as before.

    Files whose bytes lie alike in their pages can share them on the disk.
    """
    parts: list[tuple[Path, _Part]] = []
    position = 0
    for weight in sorted(weights, key=lambda weight: (weight.source, weight.old.start)):
        place = position + (weight.old.start - position) % PAGE
        if place > position:
            parts.append((weight.source, _Part(position, place, literal=bytes(place - position))))
        position = place + weight.old.nbytes
        parts.append((weight.source, _Part(place, position, weight)))
    return parts


def _graph_parts(model: ir.Model, weights: Sequence[_Weight]) -> list[_Part]:
    """The graph's own file: its message, and in it the weights that it holds."""
    mark = secrets.token_hex(8)  # a place that no graph can name
    for number, weight in enumerate(weights):
        _put(weight.value, mark, number, weight.old.nbytes)
    pieces = protobuf_wire.pieces(message_of(model), mark, [weight.old.nbytes for weight in weights])
    parts: list[_Part] = []
    for piece in pieces:
        place = parts[-1].end if parts else 0
        if isinstance(piece, bytes):
            parts.append(_Part(place, place + len(piece), literal=piece))
        else:
            parts.append(_Part(place, place + weights[piece].old.nbytes, weights[piece]))
    if parts[-1].end >= LIMIT:
        raise RuntimeRefused(
            f"the graph would have {parts[-1].end:,} bytes, and ends at {LIMIT:,}: save it with its weights in a file "
            "beside it (external data) first"
        )
    return parts


def _put(value: ir.Value, location: str, offset: int, length: int) -> None:
    old = value.const_value
    assert isinstance(old, ir.ExternalTensor)
    value.const_value = ir.ExternalTensor(
        location, offset, length, old.dtype, shape=ir.Shape(old.shape), name=value.name or "", doc_string=old.doc_string
    )


# --- how it gets there ---------------------------------------------------------------------------


def _carry(source: Path, target: BinaryIO, parts: Sequence[_Part], hashes: Hashes, ledger: _Ledger) -> str:
    """Write parts of a file; returns the hash of all of the source, of which the parts' weights are."""
    with source.open("rb") as reader:
        blocks = _blocks(source, reader.fileno(), target.fileno(), parts, ledger.backend)
        weights = [part.weight for part in parts if part.weight is not None]
        room = max(tensor_blocks.block_size(weight.move for weight in weights), *map(_room, weights), 0)
        for block, found in ledger.backend.transfer(source, target.fileno(), blocks, hashes, room=room):
            for statistics in found or ():
                ledger.statistics(statistics.weight).merge(statistics)
            ledger.progress(block.end - block.place)
    return hashes.source.hexdigest()


def _room(weight: _Weight) -> int:
    return weight.part[0].room(weight.part[1]) if weight.part is not None else 0


def _blocks(source: Path, read_fd: int, write_fd: int, parts: Sequence[_Part], backend: Backend) -> Iterator[Block]:
    """The parts in their order, and the source in its own, every byte of it once."""
    cursor = place = 0  # how far the source was read, and the target written
    for run in _runs(parts):
        first, place = run[0], run[-1].end
        if first.weight is None:
            yield from _literal(first, cursor)
            continue
        start, stop = first.weight.old.start, first.weight.old.start + place - first.place
        if first.weight.is_copy:
            blocks = tensor_blocks.copied_blocks(read_fd, write_fd, start, first.place, place - first.place)
        elif first.weight.part is not None:
            requantised, part = first.weight.part
            blocks = requantised.blocks(part, start, first.place)
        else:
            there = replace(first.weight.old, start=first.place, stop=place)
            blocks = tensor_blocks.changed_blocks(source, read_fd, first.weight.move, there, backend)
        if start < cursor:  # it was read before: for another reader of the same bytes, say
            blocks = map(functools.partial(_aside, source, read_fd, cursor), blocks)
        else:
            yield from _passed_over(cursor, start, first.place)
            cursor = stop
        yield from blocks
    yield from _passed_over(cursor, os.fstat(read_fd).st_size, place)


def _runs(parts: Iterable[_Part]) -> Iterator[list[_Part]]:
    """The parts one by one, but for copies that are neighbours in both files."""
    run: list[_Part] = []
    for part in parts:
        if run and not _are_neighbours(run[-1], part):
            yield run
            run = []
        run.append(part)
    if run:
        yield run


def _are_neighbours(one: _Part, other: _Part) -> bool:
    if one.weight is None or other.weight is None or one.end != other.place:
        return False
    return one.weight.is_copy and other.weight.is_copy and one.weight.old.stop == other.weight.old.start


def _passed_over(start: int, stop: int, place: int) -> Iterator[Block]:
    """What the target does not have: read for the source's hash."""
    for first in range(start, stop, block_copy.BLOCK):
        yield Block(first, min(first + block_copy.BLOCK, stop), place, place, work=_nothing)


def _nothing(_source: Bytes, _target: Bytes, _spare: Bytes) -> None:
    """Leave an empty target empty."""


def _literal(part: _Part, cursor: int) -> Iterator[Block]:
    for first in range(0, len(part.literal), block_copy.BLOCK):
        piece = part.literal[first : first + block_copy.BLOCK]
        place = part.place + first
        yield Block(cursor, cursor, place, place + len(piece), work=functools.partial(_write_literal, piece))


def _write_literal(piece: bytes, _source: Bytes, target: Bytes, _spare: Bytes) -> None:
    target[:] = np.frombuffer(piece, np.uint8)


def _aside(source: Path, read_fd: int, cursor: int, block: Block) -> Block:
    """A block that fetches its own source, which is not hashed with it."""

    def work(_: Bytes, target: Bytes, spare: Bytes) -> list[Statistics]:
        before = target if block.work is None else np.empty(block.stop - block.start, np.uint8)
        block_copy.read(source, read_fd, before, block.start)
        found: list[Statistics] = block.work(before, target, spare) if block.work is not None else []
        return found

    return Block(cursor, cursor, block.place, block.end, work=work, shared=block.shared)
