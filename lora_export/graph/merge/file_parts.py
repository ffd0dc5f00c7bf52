"""The positions of weights in the files of a merged graph: in the graph's own file, or in one data file beside it."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from lora_export.errors import RuntimeRefused
from lora_export.graph.onnx_file import protobuf_wire
from lora_export.graph.onnx_file.protobuf_wire import MAX_MESSAGE_BYTES
from lora_export.graph.onnx_file.writing import message_of
from lora_export.graph.quantised.requantise import Component, RequantisedWeight
from lora_export.storage.safetensors_file import PAGE, Entry
from lora_export.weights.tensor_blocks import OutputTensor


@dataclass(frozen=True, eq=False)
class MovedTensor:
    """A tensor of one of the old graph's files, which is copied or changed into one of the new files."""

    value: ir.Value
    source: Path
    output: OutputTensor
    requantised: tuple[RequantisedWeight, Component] | None = None  # a component that is computed instead of copied

    @property
    def old(self) -> Entry:
        """The tensor's position and dtype in the old file."""
        return self.output.source

    @property
    def is_copy(self) -> bool:
        """Whether its bytes stay the same."""
        return self.requantised is None and self.output.is_copy


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
        end = start + tensor.old.nbytes
        parts.append((tensor.source, FilePart(start, end, tensor)))
    return parts


def graph_file_parts(model: ir.Model, tensors: Sequence[MovedTensor]) -> list[FilePart]:
    """The parts of the graph's own file: its message, and in it the tensors that it holds.

    Raises RuntimeRefused where the file would be too long.
    """
    location = secrets.token_hex(8)  # no graph can contain this name
    for number, tensor in enumerate(tensors):
        set_location(tensor.value, location, number, tensor.old.nbytes)
    pieces = protobuf_wire.split_at_tensors(message_of(model), location, [tensor.old.nbytes for tensor in tensors])
    parts: list[FilePart] = []
    for piece in pieces:
        start = parts[-1].stop if parts else 0
        if isinstance(piece, bytes):
            parts.append(FilePart(start, start + len(piece), literal=piece))
        else:
            parts.append(FilePart(start, start + tensors[piece].old.nbytes, tensors[piece]))
    if parts[-1].stop >= MAX_MESSAGE_BYTES:
        raise RuntimeRefused(
            f"the merged graph would have {parts[-1].stop:,} bytes. An ONNX graph must have less than "
            f"{MAX_MESSAGE_BYTES:,}: save the base graph with its weights in a file beside it (external data) first"
        )
    return parts


def set_location(value: ir.Value, location: str, offset: int, length: int) -> None:
    """Point an initializer to bytes of another file."""
    old = value.const_value
    assert isinstance(old, ir.ExternalTensor)
    value.const_value = ir.ExternalTensor(
        location, offset, length, old.dtype, shape=ir.Shape(old.shape), name=value.name or "", doc_string=old.doc_string
    )
