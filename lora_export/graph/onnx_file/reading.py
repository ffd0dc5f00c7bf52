"""Reading an ONNX file: every part is checked before it is used, and large weights stay in their files."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from lora_export import provenance
from lora_export.errors import InputRefused
from lora_export.formats import onnx_adapter
from lora_export.graph.names.exporter_names import texts
from lora_export.graph.onnx_file import protobuf_wire
from lora_export.graph.onnx_file.check_model import (
    MAX_LISTED,
    check_message,
    innermost_error,
    moved_to,
    refuse_misplaced_data,
)
from lora_export.graph.values import attribute_tensors, initializer_tensors, initializers
from lora_export.provenance import History

SHOWN_BYTES = 10  # of a text that is not UTF-8

Stamp = tuple[int, int]  # size in bytes and mtime in nanoseconds


@dataclass(frozen=True, eq=False)
class GraphFile:
    """A graph on disk. Its large weights are `ir.ExternalTensor`s, also those inside the graph's own file."""

    path: Path
    model: ir.Model
    sources: Mapping[Path, Stamp]  # the graph's file and its data files, as they were when they were opened
    history: History = ()  # the adapters that are merged into the graph

    @property
    def nbytes(self) -> int:
        """The size of all files."""
        return sum(size for size, _ in self.sources.values())

    @property
    def takes_adapters(self) -> bool:
        """Whether adapters are inputs of the graph, or are selected by an input."""
        return not {onnx_adapter.CONTRACT_KEY, onnx_adapter.ROW_ADAPTERS_KEY}.isdisjoint(self.model.metadata_props)

    def changed(self) -> list[Path]:
        """The files that have changed since they were opened."""
        return [path for path, stamp in self.sources.items() if not path.exists() or _stamp(path) != stamp]


def open_graph(path: Path) -> GraphFile:
    """Read a graph without its large weights, whatever its size. Checks where those are stored.

    Raises InputRefused for a file that is not ONNX, and for external data that is missing, shorter than its tensors,
    or not a regular file below the graph's own folder. In a snapshot of a Hugging Face cache, a blob of the same model
    is accepted too.
    """
    path = path.absolute()  # onnx_ir skips its own containment check for a bare file name
    protobuf_wire.refuse_no_message(path)
    own_file = Path(os.path.realpath(path))
    own_stamp = _stamp(own_file)
    location = secrets.token_hex(8)  # of data in the graph's own file; no graph can contain this name
    message, model = _parse(path, location)
    for text in texts(model):
        if isinstance(text, bytes):  # protobuf returns bytes for text that is not UTF-8
            raise InputRefused(f"{path} is a damaged ONNX file: {text[:SHOWN_BYTES]!r} is not UTF-8 text")
    refuse_misplaced_data(model, path, _read_inline_data(model, location, own_file))
    try:
        check_message(message)  # onnx_ir accepts any node with any inputs and attributes
    except Exception as error:
        raise InputRefused(f"{path} is not valid ONNX: {error}") from error
    tensors = (*initializer_tensors(model), *attribute_tensors(model))
    data_files = {Path(tensor.path) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)} - {own_file}
    sources = {own_file: own_stamp} | {file: _stamp(file) for file in sorted(data_files)}
    record = model.metadata_props.get(provenance.KEY)
    return GraphFile(path, model, sources, provenance.read_history(record, path) if record else ())


def load_graph(path: Path) -> ir.Model:
    """The model of `open_graph`."""
    return open_graph(path).model


def _parse(path: Path, location: str) -> tuple[bytes, ir.Model]:
    """The graph's message without its large tensors, and the model. `location` is the name of those tensors' file."""
    try:
        with _collected_warnings() as complaints:
            message = protobuf_wire.without_large_tensors(path, location)
            model = ir.from_proto(onnx.ModelProto.FromString(message))
    except InputRefused:
        raise
    except Exception as error:  # protobuf, onnx and onnx_ir each raise their own kinds
        raise InputRefused(f"{path} is no ONNX file, or a damaged one: {innermost_error(error)}") from error
    if not model.opset_imports:
        raise InputRefused(f"{path} is no ONNX file: it imports no operators")
    if complaints:
        raise InputRefused(f"{path} is a damaged ONNX file: {'; '.join(complaints[:MAX_LISTED])}")
    return message, model


def _read_inline_data(model: ir.Model, location: str, own_file: Path) -> set[ir.Value]:
    """Point tensors with this location to the graph's own file. Returns their values."""
    inline = set()
    for value in initializers(model):
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and tensor.location == location:
            value.const_value = moved_to(tensor, own_file)
            inline.add(value)
    return inline


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def _collected_warnings() -> Iterator[list[str]]:
    """Collect what onnx and onnx_ir only log: an input from nowhere, an initializer that they drop."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(ir.__name__)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Ignoring unknown external data key")
            yield messages
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
