"""Copying the parts of a merged graph's files, block by block, with the changes of weights on the way."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from lora_export.errors import RuntimeRefused
from lora_export.graph.onnx_file import protobuf_wire
from lora_export.graph.onnx_file.protobuf_wire import LARGE_TENSOR_BYTES, MAX_MESSAGE_BYTES
from lora_export.graph.onnx_file.shared_weights import SharedWeights
from lora_export.graph.onnx_file.writing import message_of
from lora_export.graph.values import stored_at
from lora_export.storage import block_copy
from lora_export.storage.atomic_output import data_name
from lora_export.storage.block_copy import Block, Bytes, RunningHashes
from lora_export.storage.hashes import FAST
from lora_export.storage.safetensors_file import PAGE, Entry
from lora_export.weights import tensor_blocks
from lora_export.weights.apply_step import Backend
from lora_export.weights.merge_report import (
    MIN_RETENTION,
    OnBytesWritten,
    QuantisedLayer,
    StatisticsByWeight,
)
from lora_export.weights.tensor_blocks import OutputTensor


@dataclass(frozen=True, eq=False)
class MovedTensor:
    """A tensor of one of the old graph's files, which is copied or changed into one of the new files."""

    value: ir.Value
    source: Path
    output: OutputTensor

    @property
    def old(self) -> Entry:
        """The tensor's position and dtype in the old file."""
        return self.output.source

    @property
    def is_copy(self) -> bool:
        """Whether its bytes stay the same."""
        return self.output.is_copy


@dataclass(frozen=True, eq=False)
class FilePart:
    """Bytes [start, stop) of a new file: a tensor, or literal bytes."""

    start: int
    stop: int
    tensor: MovedTensor | None = None
    literal: bytes = b""


def data_file_parts(tensors: Sequence[MovedTensor]) -> list[tuple[Path, FilePart]]:
    """The parts of the data file with their sources, in the order of the sources' bytes.

    Each tensor keeps its offset within a page, so that the file system can share the blocks of both files.
    """
    parts: list[tuple[Path, FilePart]] = []
    end = 0
    for tensor in sorted(tensors, key=lambda tensor: (tensor.source, tensor.old.start)):
        start = end + (tensor.old.start - end) % PAGE
        if start > end:
            parts.append((tensor.source, FilePart(end, start, literal=bytes(start - end))))
        end = start + tensor.output.nbytes
        parts.append((tensor.source, FilePart(start, end, tensor)))
    return parts


def graph_file_parts(model: ir.Model, tensors: Sequence[MovedTensor]) -> list[FilePart]:
    """The parts of the graph's own file: its message, and in it the tensors that it holds.

    Raises RuntimeRefused where the file would be too long.
    """
    location = protobuf_wire.unused_location()
    for number, tensor in enumerate(tensors):
        set_location(tensor.value, location, number)
    pieces = protobuf_wire.split_at_tensors(message_of(model), location, [each.output.nbytes for each in tensors])
    parts: list[FilePart] = []
    for piece in pieces:
        start = parts[-1].stop if parts else 0
        if isinstance(piece, bytes):
            parts.append(FilePart(start, start + len(piece), literal=piece))
        else:
            parts.append(FilePart(start, start + tensors[piece].output.nbytes, tensors[piece]))
    if parts[-1].stop >= MAX_MESSAGE_BYTES:
        raise RuntimeRefused(
            f"the merged graph would have {parts[-1].stop:,} bytes. An ONNX graph must have less than "
            f"{MAX_MESSAGE_BYTES:,}: save the base graph with its weights in a file beside it (external data) first"
        )
    return parts


def set_location(value: ir.Value, location: str, offset: int) -> None:
    """Point an initializer to bytes of another file."""
    assert value.const_value is not None
    value.const_value = stored_at(value.const_value, location, offset, name=value.name)


@dataclass(eq=False, kw_only=True)
class MergeRun:
    """The settings of one merge, and the statistics and hashes that it collects."""

    file_name: str  # of the merged graph
    min_retention: float = MIN_RETENTION
    hashing: str = FAST
    progress: OnBytesWritten = lambda _: None
    requantise: bool = False  # quantised weights, on their own scales or promoted; otherwise they are refused
    layers: tuple[QuantisedLayer, ...] = ()  # what became of the quantised weights that change
    backend: Backend = field(default_factory=Backend)  # changes float weights in files
    shared: SharedWeights | None = None  # of another graph, which are not written
    external_data: bool = False  # weights inside the old graph are written beside the new one
    statistics: StatisticsByWeight = field(default_factory=StatisticsByWeight)
    sources: dict[Path, str] = field(default_factory=dict)  # hashes of the old files
    copied: int = 0  # bytes

    def takes_out(self, tensor: MovedTensor) -> bool:
        """Whether a tensor inside the old graph is written beside the new one."""
        return self.external_data and tensor.output.nbytes >= LARGE_TENSOR_BYTES

    def written(self, stage: Path) -> list[Path]:
        """The files of the new graph in its stage, without those of weights that it shares."""
        copies = self.shared.files if self.shared else ()
        return [path for path in stage.iterdir() if path.is_file() and path.name not in copies]

    @property
    def hashes(self) -> dict[str, dict[str, str]]:
        """The hashes of the old files, in the form of a record."""
        return {path.name: {self.hashing: digest} for path, digest in self.sources.items()}


def write_data_file(stage: Path, tensors: Sequence[MovedTensor], run: MergeRun) -> None:
    """Write the weights that are stored beside the graph, and point their initializers to the new file.

    The file is named by its content.
    """
    path, hashes, parts = stage / "weights.data", RunningHashes(run.hashing), data_file_parts(tensors)
    with path.open("xb") as target:
        for source, group in itertools.groupby(parts, key=lambda part: part[0]):
            hashes = hashes.for_next_source()
            run.sources[source] = copy_parts(source, target, [part for _, part in group], hashes, run)
    name = data_name(run.file_name, hashes.target.hexdigest())
    path.rename(stage / name)
    for _, part in parts:
        if part.tensor is not None:
            set_location(part.tensor.value, name, part.start)


def copy_parts(source: Path, target: BinaryIO, parts: Sequence[FilePart], hashes: RunningHashes, run: MergeRun) -> str:
    """Write parts of a file whose tensors come from `source`. Returns the hash of all of `source`."""
    with source.open("rb") as reader:
        block_copy.reserve(target.fileno(), parts[-1].stop)
        blocks = _blocks(source, reader.fileno(), target.fileno(), parts, run.backend)
        tensors = [part.tensor for part in parts if part.tensor is not None]
        size = tensor_blocks.block_size(tensor.output for tensor in tensors)
        for block, found in run.backend.transfer(source, target.fileno(), blocks, hashes, buffer_bytes=size):
            run.statistics.add(found)
            run.progress(block.target_stop - block.target_start)
    return hashes.source.hexdigest()


def _blocks(source: Path, read_fd: int, write_fd: int, parts: Sequence[FilePart], backend: Backend) -> Iterator[Block]:
    """Blocks that write the parts in their order, and read every byte of the source once, in its order."""
    read_to = written_to = 0
    for run in tensor_blocks.runs(parts, _are_neighbours):
        first, written_to = run[0], run[-1].stop
        if first.tensor is None:
            yield from _literal_blocks(first, read_to)
            continue
        start = first.tensor.old.start
        blocks = _tensor_blocks(source, read_fd, write_fd, first, written_to, backend)
        if start < read_to:  # these bytes were read before, for example for another reader of one tensor
            blocks = (replace(block, repeated=True) for block in blocks)
        else:
            yield from tensor_blocks.skipped_blocks(read_to, first.start, start - read_to)
            read_to = start + written_to - first.start if first.tensor.is_copy else first.tensor.old.stop
        yield from blocks
    yield from tensor_blocks.skipped_blocks(read_to, written_to, os.fstat(read_fd).st_size - read_to)


def _tensor_blocks(
    source: Path, read_fd: int, write_fd: int, part: FilePart, stop: int, backend: Backend
) -> Iterator[Block]:
    """The blocks of one changed tensor, or of a run of copied tensors up to `stop` in the target."""
    tensor = part.tensor
    assert tensor is not None
    if tensor.is_copy:
        return tensor_blocks.copied_blocks(read_fd, write_fd, tensor.old.start, part.start, stop - part.start)
    return tensor.output.blocks_from(part.start, source, read_fd, backend)


def _are_neighbours(one: FilePart, other: FilePart) -> bool:
    """Whether two parts are copies that follow each other in both files."""
    if one.tensor is None or other.tensor is None or one.stop != other.start:
        return False
    return one.tensor.is_copy and other.tensor.is_copy and one.tensor.old.stop == other.tensor.old.start


def _literal_blocks(part: FilePart, position: int) -> Iterator[Block]:
    for first in range(0, len(part.literal), block_copy.BLOCK):
        piece = part.literal[first : first + block_copy.BLOCK]
        start = part.start + first
        yield Block(position, position, start, start + len(piece), work=functools.partial(_write_literal, piece))


def _write_literal(piece: bytes, _source: Bytes, target: Bytes, _scratch: Bytes) -> None:
    target[:] = np.frombuffer(piece, np.uint8)
