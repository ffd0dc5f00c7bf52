"""ONNX files: what is read is checked before it is believed, what is written says nothing about this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import stat
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export import provenance
from lora_export.errors import InputRefused, RuntimeRefused
from lora_export.formats import onnx_adapter
from lora_export.graph import ort_operators, protobuf_wire
from lora_export.graph.sites import FOLDED_FROM, KIND, NAME_SCOPES
from lora_export.provenance import History
from lora_export.storage.atomic_output import data_name
from lora_export.storage.hashes import file_sha256

LIMIT = 1 << 31  # bytes; what is longer, protobuf neither writes nor reads
INLINE = 1 << 30  # bytes of weights up to which a graph is one file
EXTERNAL_FROM = 1024  # bytes; smaller tensors stay in the graph, where shape inference reads them

SHOWN = 10  # problems that an error lists

# What exporters note about their own work: kept are the names, which the next adapter needs.
EXPORTERS_NOTES = re.compile(r"pkg\.(torch|onnxscript|transformers)\b|namespace$")
TRACE = 'File "'  # the mark of a Python stack trace
KEPT_NOTES = frozenset({FOLDED_FROM, KIND, NAME_SCOPES})
BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # a file in a Hugging Face cache, by its hash


@dataclass(frozen=True, eq=False)
class GraphFile:
    """A graph on disk. Its large weights stay there: as `ir.ExternalTensor`, those inside the graph's own file too."""

    path: Path
    model: ir.Model
    sources: Mapping[Path, tuple[int, int]]  # the graph's file and its data's: size and mtime_ns when they were opened
    history: History = ()  # the adapters that the graph holds already

    @property
    def nbytes(self) -> int:
        return sum(size for size, _ in self.sources.values())

    @property
    def takes_adapters(self) -> bool:
        """Whether adapters are its inputs, or are chosen by them."""
        return not {onnx_adapter.CONTRACT_KEY, onnx_adapter.ROW_ADAPTERS_KEY}.isdisjoint(self.model.metadata_props)

    def changed(self) -> list[Path]:
        """The files that are not what they were when they were opened."""
        return [path for path, stamp in self.sources.items() if not path.exists() or _stamp(path) != stamp]


def open_graph(path: Path) -> GraphFile:
    """Read a graph but for its large weights, whatever its size; check where those lie.

    Raises InputRefused for what is no ONNX file, and for external data that is missing, shorter than
    its tensors, or anything but a plain file below the graph's own folder (or, where that folder is a
    snapshot in a Hugging Face cache, a blob of the same model).
    """
    path = path.absolute()  # onnx_ir skips its own containment check for a bare file name
    _refuse_irregular(path)
    own, inside = Path(os.path.realpath(path)), secrets.token_hex(8)  # a place that no graph can name
    stamp = _stamp(own)
    try:
        with _complaints() as complaints:
            hollow = protobuf_wire.hollow(path, inside)
            model = ir.from_proto(onnx.ModelProto.FromString(hollow))
    except InputRefused:
        raise
    except Exception as error:  # protobuf, onnx and onnx_ir each have kinds of their own for this
        raise InputRefused(f"{path} is no ONNX file, or a damaged one: {_innermost(error)}") from error
    if not model.opset_imports:
        raise InputRefused(f"{path} is no ONNX file: it imports no operators")
    if complaints:
        raise InputRefused(f"{path} is a damaged ONNX file: {'; '.join(complaints[:SHOWN])}")
    for text in _texts(model):
        if isinstance(text, bytes):  # protobuf hands out what is no UTF-8
            raise InputRefused(f"{path} is a damaged ONNX file: {text[:SHOWN]!r} is no text")
    _refuse_misplaced(model, path, _read_inside(model, inside, own))
    try:
        ort_operators.check_model(_without_data(hollow))  # onnx_ir takes any node with any inputs and attributes
    except Exception as error:
        raise InputRefused(f"{path} is not valid ONNX: {error}") from error
    data = {Path(tensor.path) for tensor in _external(model)} - {own}
    return GraphFile(
        path, model, {own: stamp} | {place: _stamp(place) for place in sorted(data)}, _history(path, model)
    )


def load(path: Path) -> ir.Model:
    """The graph of `open_graph`, for who only wants to look at it."""
    return open_graph(path).model


def _read_inside(model: ir.Model, inside: str, own: Path) -> set[ir.Value]:
    """Let tensors that were left in the graph's own file be read there; returns their values."""
    found = set()
    for value in initializers(model):
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and tensor.location == inside:
            value.const_value = _moved(tensor, own)
            found.add(value)
    return found


def _refuse_misplaced(model: ir.Model, path: Path, inside: set[ir.Value]) -> None:
    """Raise InputRefused for data that cannot be read, or that lies where it should not."""
    problems = []
    for value in initializers(model):
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and value not in inside:
            tensor.base_dir = path.parent
            if blob := _blob(path.parent, os.fsdecode(tensor.location)):
                value.const_value = tensor = _moved(tensor, blob)
            problems.append(_place_problem(Path(tensor.base_dir), tensor))
        elif isinstance(tensor, ir.ExternalTensor):
            problems.append(_length_problem(tensor))
    for tensor in _attributes(model):
        if isinstance(tensor, ir.ExternalTensor):
            tensor.base_dir = path.parent
            problems.append(_place_problem(path.parent, tensor))
    problems = [problem for problem in problems if problem]
    if problems:
        shown = "\n  ".join(problems[:SHOWN])
        raise InputRefused(f"{path}: {len(problems)} tensors cannot be read from its external data:\n  {shown}")


def _without_data(message: bytes) -> onnx.ModelProto:
    """The model with empty tensors where they are external, for a checker that would look for their files."""
    proto: onnx.ModelProto = onnx.ModelProto.FromString(message)
    graphs, nodes = [proto.graph], [node for function in proto.functions for node in function.node]
    tensors: list[onnx.TensorProto] = []
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            tensors += graph.initializer
            nodes += graph.node
        for attribute in (attribute for node in nodes for attribute in node.attribute):
            tensors += [attribute.t, *attribute.tensors] if attribute.HasField("t") else attribute.tensors
            graphs += [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs
        nodes = []
    for tensor in tensors:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.dims[:] = [0] * max(len(tensor.dims), 1)  # a scalar would hold one number
    return proto


def _history(path: Path, model: ir.Model) -> History:
    record = model.metadata_props.get(provenance.KEY)
    return provenance.read_history(record, path) if record else ()


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def save(model: ir.Model, folder: Path, name: str, *, metadata: Mapping[str, str] | None = None) -> list[Path]:
    """Write a graph into a folder that is the caller's to publish; returns the files, the graph last.

    `metadata` is added to the model's properties. Weights of 1 GiB and more go into a file beside the
    graph that is named by its content (`staging.data_name`), so that an old graph never meets new weights.
    Changes the model: `strip` is applied. Raises RuntimeRefused when the graph without its weights is
    too long, or ONNX's checker objects.
    """
    strip(model)
    model.metadata_props.update(metadata or {})
    path = folder.absolute() / name
    written = [path]
    constants = sum(tensor.nbytes for tensor in _attributes(model))
    if constants >= LIMIT:
        raise RuntimeRefused(
            f"the graph holds {constants:,} bytes in its nodes, where ONNX keeps them; a graph ends at {LIMIT:,} bytes"
        )
    if constants + sum(tensor.nbytes for tensor in _weights(model)) < INLINE:
        ir.external_data.load_to_model(model)
        try:
            ir.save(model, path)
        except ir.serde.SerdeError as error:  # of a foreign graph: a field that protobuf cannot hold
            raise RuntimeRefused(f"the graph cannot be written as ONNX: {_innermost(error)}") from error
    else:
        written.insert(0, _save_apart(model, path))
    try:
        ort_operators.check_model(str(path))
    except (onnx.checker.ValidationError, ValueError) as error:
        raise RuntimeRefused(f"the graph is not valid ONNX: {error}") from error
    return written


def _save_apart(model: ir.Model, path: Path) -> Path:
    """Write the weights beside the graph; returns their file. The model is as before, its weights where they were."""
    values = [value for graph in model.graphs() for value in graph.initializers.values()]
    before = [value.const_value for value in values]
    data = path.with_name("weights.data")
    try:
        ir.external_data.unload_from_model(model, path.parent, data.name, size_threshold_bytes=EXTERNAL_FROM)
        data = data.replace(path.with_name(data_name(path.name, file_sha256(data))))
        for value, tensor in zip(values, before, strict=True):
            if isinstance(value.const_value, ir.ExternalTensor) and value.const_value is not tensor:
                value.const_value = _moved(value.const_value, data)
        ir.save(model, path)
    finally:
        for value, tensor in zip(values, before, strict=True):
            value.const_value = tensor
    return data


def _moved(tensor: ir.ExternalTensor, place: Path) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        place.name,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=ir.Shape(tensor.shape),
        name=tensor.name,
        metadata_props=dict(tensor.metadata_props),
        base_dir=place.parent,
    )


def message_of(model: ir.Model, *, check: bool = True) -> bytes:
    """The graph as ONNX, external tensors where they say they are. Raises RuntimeRefused where ONNX cannot hold it.

    Without `check`, outputs need not have a shape, which ONNX demands and onnxruntime does not.
    """
    try:
        message: bytes = ir.to_proto(model).SerializeToString()
        if check:
            ort_operators.check_model(_without_data(message))
    except (ir.serde.SerdeError, onnx.checker.ValidationError, ValueError) as error:
        raise RuntimeRefused(f"the graph cannot be written as ONNX: {_innermost(error)}") from error
    return message


def in_memory(model: ir.Model) -> tuple[bytes, dict[str, NDArray[Any]]]:
    """The graph's message without its large weights, and these by name, where they are: in memory or in their files.

    For a runtime that takes both; nothing is read or copied. Weights of types that NumPy lacks stay in the message.
    """
    apart: dict[str, NDArray[Any]] = {}
    message = ir.to_proto(model)
    for tensor in list(message.graph.initializer):
        value = model.graph.initializers[tensor.name]
        held = value.const_value
        assert held is not None
        if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
            message.graph.initializer.remove(tensor)  # onnxruntime would, and then miss it
            continue
        native = not held.dtype.is_string() and held.dtype.numpy().isbuiltin == 1
        if native and held.nbytes >= EXTERNAL_FROM:
            apart[tensor.name] = np.ascontiguousarray(held.numpy())  # a view is copied: onnxruntime takes none
            tensor.ClearField("raw_data")
            tensor.ClearField("external_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="memory")
        elif isinstance(held, ir.ExternalTensor):
            tensor.CopyFrom(ir.to_proto(ir.Tensor(held.numpy(), dtype=held.dtype, name=tensor.name)))
    return message.SerializeToString(), apart


def append_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Add new properties to a saved graph (a verdict, say) behind what was proven; nothing that is there is rewritten.

    Two protobuf messages one after the other are read as one, their repeated fields joined.
    """
    addition = onnx.ModelProto()
    onnx.helper.set_model_props(addition, dict(metadata))
    with path.open("ab") as file:
        file.write(addition.SerializeToString())


def strip(model: ir.Model) -> None:
    """Remove what exporters note down beside names: stack traces, source lines and paths of this machine."""
    for holder in _holders(model):
        for key in [key for key, text in holder.metadata_props.items() if not _is_published(key, text)]:
            del holder.metadata_props[key]
        if holder.doc_string and TRACE in holder.doc_string:
            holder.doc_string = None


def _holders(model: ir.Model) -> Iterator[Any]:
    """All graphs and functions, nodes and values, which have names, notes and properties."""
    graphs: list[ir.Graph | ir.Function] = [*model.graphs(), *model.functions.values()]
    for graph in graphs:
        yield from (graph, *graph.inputs)
        yield from graph.initializers.values() if isinstance(graph, ir.Graph) else ()
        for node in graph:
            yield from (node, *node.outputs)


def _texts(model: ir.Model) -> Iterator[Any]:
    """What a graph says in words: names, operators, notes and properties."""
    yield from (model.producer_name, model.producer_version, model.domain, model.doc_string, *model.opset_imports)
    for identifier in model.functions:
        yield from identifier
    for holder in [model, *_holders(model)]:
        yield from (holder.doc_string, *holder.metadata_props, *holder.metadata_props.values())
        if not isinstance(holder, ir.Model):
            yield holder.name
        if isinstance(holder, ir.Node):
            yield from (*holder.op_identifier(), *holder.attributes)


def _is_published(key: str, text: str) -> bool:
    return key in KEPT_NOTES or not (EXPORTERS_NOTES.match(key) or TRACE in text)


def _refuse_irregular(path: Path) -> None:
    try:
        status = path.stat()
    except OSError as error:
        raise InputRefused(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):  # a FIFO would wait for a writer
        raise InputRefused(f"{path} is not a regular file")
    if status.st_size >= LIMIT:
        raise InputRefused(
            f"{path} has {status.st_size:,} bytes, and an ONNX graph ends at {LIMIT:,}: save it with its weights in a "
            "file beside it (external data)"
        )


@contextlib.contextmanager
def _complaints() -> Iterator[list[str]]:
    """What onnx and onnx_ir would only mutter about a graph: an input from nowhere, an initializer they leave out."""
    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(ir.__name__)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Ignoring unknown external data key")
            yield told
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def initializers(model: ir.Model) -> Iterator[ir.Value]:
    """Every initializer, those of inner graphs included."""
    return (value for graph in model.graphs() for value in graph.initializers.values())


def _weights(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """The initializers' tensors, but for strings, which have no bytes of their own."""
    for value in initializers(model):
        if value.const_value is not None and not value.const_value.dtype.is_string():
            yield value.const_value


def _external(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    return (tensor for tensor in (*_weights(model), *_attributes(model)) if isinstance(tensor, ir.ExternalTensor))


def _attributes(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """The tensors that nodes hold (Constant, above all), those in functions and inner graphs included."""
    bodies: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for body in bodies:
        for node in ir.traversal.RecursiveGraphIterator(body):
            for attribute in node.attributes.values():
                if attribute.is_ref():
                    continue
                held = {ir.AttributeType.TENSOR: [attribute.value], ir.AttributeType.TENSORS: attribute.value}
                for tensor in held.get(attribute.type) or ():
                    if not tensor.dtype.is_string():
                        yield tensor


def _blob(folder: Path, location: str) -> Path | None:
    """Where a file of a snapshot in a Hugging Face cache lies: `snapshots/REVISION/NAME` links to `blobs/HASH`.

    Other links are refused: whoever made the model could have made them lead to any file of the user's. These lead
    from one part of one model's own folder to another, and on to nowhere.
    """
    path = folder / location
    snapshots = next((parent for parent in folder.parents if parent.name == "snapshots"), None)
    named = Path(location)
    if snapshots is None or "\0" in location or named.is_absolute() or ".." in named.parts or not path.is_symlink():
        return None
    place = Path(os.path.realpath(path))
    if place.parent != Path(os.path.realpath(snapshots.parent)) / "blobs" or not BLOB.fullmatch(place.name):
        return None
    return place if Path(os.path.realpath(path.parent)).is_relative_to(os.path.realpath(snapshots)) else None


def _innermost(error: BaseException) -> BaseException:
    inner = error.__cause__ or error.__context__
    return _innermost(inner) if inner is not None else error


def _place_problem(folder: Path, tensor: ir.ExternalTensor) -> str:
    """What is wrong with the place of a tensor's data; empty where nothing is."""
    location = os.fsdecode(tensor.location)
    path = Path(os.path.normpath(folder / location))
    if not location or "\0" in location or Path(location).is_absolute() or not path.is_relative_to(folder):
        return f"{tensor.name}: its data's place is absolute or outside the model's folder ({location!r})"
    if path.resolve() != folder.resolve() / path.relative_to(folder):
        return f"{tensor.name}: {location} is reached through a symbolic link; put a copy of the file there"
    try:
        status = os.stat(os.path.join(folder, location))  # noqa: PTH116, PTH118 - a Path would drop a final slash
    except OSError as error:
        return f"{tensor.name}: {location}: {error.strerror}"
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        return f"{tensor.name}: {location} is not a plain file with one name; put a copy of the file there"
    offset = tensor.offset or 0
    if problem := _length_problem(tensor):
        return problem
    if not 0 <= offset <= status.st_size - tensor.nbytes:
        return f"{tensor.name}: bytes {offset} to {offset + tensor.nbytes} of {location}, which has {status.st_size}"
    return ""


def _length_problem(tensor: ir.ExternalTensor) -> str:
    if tensor.length in (None, tensor.nbytes):
        return ""
    return (
        f"{tensor.name}: {tensor.length} bytes are recorded, {tensor.dtype.name} {list(tensor.shape)} has "
        f"{tensor.nbytes}"
    )
