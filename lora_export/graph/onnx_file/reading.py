"""Reading an ONNX file: every part is checked before it is used, and large weights stay in their files.

The checks: ONNX's checker, with the operators that onnxruntime adds, and where external data is stored.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import stat
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx import defs

from lora_export import provenance
from lora_export.errors import InputRefused, OutputFailed, count, first_of, listed
from lora_export.graph.exporter_names import texts
from lora_export.graph.onnx_file import protobuf_wire
from lora_export.graph.onnx_file.protobuf_wire import without_large_tensors
from lora_export.graph.values import attribute_tensors, initializer_tensors, initializers, keep_in_nodes, stored_at
from lora_export.provenance import CONTRACT_KEY, ROW_ADAPTERS_KEY, SLOTS_KEY, History, read_shared

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
        return not {CONTRACT_KEY, ROW_ADAPTERS_KEY, SLOTS_KEY}.isdisjoint(self.model.metadata_props)

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
    location = protobuf_wire.unused_location()  # of data in the graph's own file
    message, model = _parse(path, location)
    for text in texts(model):
        if isinstance(text, bytes):  # protobuf returns bytes for text that is not UTF-8
            raise InputRefused(f"{path} is a damaged ONNX file: {text[:SHOWN_BYTES]!r} is not UTF-8 text")
    for name in read_shared(model.metadata_props, path):
        if not (path.parent / name).exists():
            raise InputRefused(
                f"{path} shares the weights in {name} with another graph, and this file is not beside it. Put it "
                "back, or export again"
            )
    refuse_misplaced_data(model, path, _read_inline_data(model, location, own_file))
    try:
        check_message(message)  # onnx_ir accepts any node with any inputs and attributes
    except Exception as error:
        raise InputRefused(f"{path} is not valid ONNX: {error}") from error
    tensors = (*initializer_tensors(model), *attribute_tensors(model))
    data_files = {Path(tensor.path) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)} - {own_file}
    sources = {own_file: own_stamp} | {file: _stamp(file) for file in sorted(data_files)}
    keep_in_nodes(model)
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
            proto = onnx.ModelProto.FromString(message)
            if sparse := [tensor.values.name for tensor in proto.graph.sparse_initializer]:
                raise InputRefused(f"{path} stores {first_of(sparse, MAX_LISTED)} as sparse tensors: store them dense")
            model = ir.from_proto(proto)
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


FLOAT_TYPES = ["tensor(bfloat16)", "tensor(double)", "tensor(float)", "tensor(float16)"]


def check_file(path: Path) -> None:
    """Check an ONNX file with `onnx.checker`. Accepts graphs that onnxruntime or its tools have fused.

    The weights inside the file are not read: the checker would hold them twice.

    Raises OutputFailed for a path that is not UTF-8, which neither the checker nor onnxruntime takes.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise OutputFailed(f"{path} is not UTF-8, and ONNX's libraries take no such path. Name it otherwise") from error
    message = without_large_tensors(path, path.name)
    if _names_other_files(message, path.name):
        _register_schemas()
        onnx.checker.check_model(str(path))
    else:
        check_message(message)


def check_message(message: bytes) -> None:
    """Check a serialised graph with `onnx.checker`, as `check_file` does. Ignores its external data."""
    _register_schemas()
    onnx.checker.check_model(_without_external_data(message))


def innermost_error(error: BaseException) -> BaseException:
    """The error that caused this one, or this one itself."""
    inner = error.__cause__ or error.__context__
    return innermost_error(inner) if inner is not None else error


def _names_other_files(message: bytes, own: str) -> bool:
    """Whether a tensor of the model is in a file of another name."""
    external = (one for one in _tensors(onnx.ModelProto.FromString(message)) if one.data_location == one.EXTERNAL)
    return any(entry.value != own for one in external for entry in one.external_data if entry.key == "location")


def _without_external_data(message: bytes) -> onnx.ModelProto:
    """The model with empty tensors in place of external ones. The checker would look for their files."""
    proto: onnx.ModelProto = onnx.ModelProto.FromString(message)
    for tensor in _tensors(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.dims[:] = [0] * max(len(tensor.dims), 1)  # a scalar would need one number
    return proto


def _tensors(proto: onnx.ModelProto) -> list[onnx.TensorProto]:
    """All tensors of a model: initializers and attributes, subgraphs and functions included."""
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
    return tensors


@functools.cache
def _register_schemas() -> None:
    """Declare SimplifiedLayerNormalization (RMSNorm), and LayerNormalization before opset 17, as onnxruntime does."""
    for name, inputs, outputs in (
        ("SimplifiedLayerNormalization", ("X", "scale"), ("Y", "inv_std_var")),
        ("LayerNormalization", ("X", "Scale", "B"), ("Y", "Mean", "InvStdDev")),
    ):
        if not defs.has(name, 1, ""):
            defs.register_schema(_schema(name, inputs, outputs))


def _schema(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> defs.OpSchema:
    parameter, optional = defs.OpSchema.FormalParameter, defs.OpSchema.FormalParameterOption.Optional
    types = defs.OpSchema.AttrType
    return defs.OpSchema(
        name,
        "",
        1,
        inputs=[parameter(name, "T") for name in inputs[:2]]
        + [parameter(name, "T", "", param_option=optional) for name in inputs[2:]],
        outputs=[parameter(outputs[0], "T")]
        + [parameter(name, "U", "", param_option=optional) for name in outputs[1:]],
        type_constraints=[("T", FLOAT_TYPES, ""), ("U", FLOAT_TYPES, "")],
        attributes=[
            defs.OpSchema.Attribute("axis", types.INT, "", required=False),
            defs.OpSchema.Attribute("epsilon", types.FLOAT, "", required=False),
            defs.OpSchema.Attribute("stash_type", types.INT, "", required=False),
        ],
    )


MAX_LISTED = 10  # problems that an error lists
BLOB_NAME = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # of a file in a Hugging Face cache: its hash


def refuse_misplaced_data(model: ir.Model, path: Path, inline: set[ir.Value]) -> None:
    """Raise InputRefused for external data that cannot be read, or is stored outside of the graph's folder.

    `inline` are the values whose data is in the graph's own file. Sets the folder of all other external tensors.
    """
    problems = []
    blob_of = functools.cache(functools.partial(_huggingface_blob, path.parent))  # many tensors are in one file
    size_of = functools.cache(_size_or_problem)
    for value in initializers(model):
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and value not in inline:
            tensor.base_dir = path.parent
            if blob := blob_of(os.fsdecode(tensor.location)):
                value.const_value = tensor = moved_to(tensor, blob)
            problems.append(_location_problem(size_of(Path(tensor.base_dir), os.fsdecode(tensor.location)), tensor))
        elif isinstance(tensor, ir.ExternalTensor):
            problems.append(_length_problem(tensor))
    for tensor in attribute_tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            tensor.base_dir = path.parent
            problems.append(_location_problem(size_of(path.parent, os.fsdecode(tensor.location)), tensor))
    if problems := list(filter(None, problems)):
        what = f"{path}: {count(len(problems), 'tensor')} cannot be read from its external data:"
        raise InputRefused(what, listed(problems, MAX_LISTED))


def moved_to(tensor: ir.ExternalTensor, path: Path) -> ir.ExternalTensor:
    """The same tensor in another file, at the same offset."""
    return stored_at(tensor, path.name, tensor.offset, tensor.length, name=tensor.name, folder=path.parent)


def _huggingface_blob(folder: Path, location: str) -> Path | None:
    """The file behind a link in a Hugging Face cache: `snapshots/REVISION/NAME` links to `blobs/HASH`.

    None for any other link, which is refused: the author of a model could link to any file of the user. These links
    stay within the folder of one model, and the blob is not a link.
    """
    path = folder / location
    snapshots = next((parent for parent in folder.parents if parent.name == "snapshots"), None)
    relative = Path(location)
    if snapshots is None or "\0" in location or relative.is_absolute() or ".." in relative.parts:
        return None
    if not path.is_symlink():
        return None
    blob = Path(os.path.realpath(path))
    if blob.parent != Path(os.path.realpath(snapshots.parent)) / "blobs" or not BLOB_NAME.fullmatch(blob.name):
        return None
    return blob if Path(os.path.realpath(path.parent)).is_relative_to(os.path.realpath(snapshots)) else None


def _location_problem(size: int | str, tensor: ir.ExternalTensor) -> str:
    """What is wrong with where a tensor's data is, in a file of this size or problem. Empty where it can be read."""
    if isinstance(size, str):
        return f"{tensor.name}: {size}"
    if problem := _length_problem(tensor):
        return problem
    start = tensor.offset or 0
    if not 0 <= start <= size - tensor.nbytes:
        location = os.fsdecode(tensor.location)
        return f"{tensor.name}: needs bytes {start} to {start + tensor.nbytes} of {location}, which has {size}"
    return ""


def _size_or_problem(folder: Path, location: str) -> int | str:
    """The size of the file at a location of external data, or why it is not read."""
    path = Path(os.path.normpath(folder / location))
    if not location or "\0" in location or Path(location).is_absolute() or not path.is_relative_to(folder):
        return f"the location of its data is absolute or outside the model's folder ({location!r})"
    if path.resolve() != folder.resolve() / path.relative_to(folder):
        return f"{location} is reached through a symbolic link; replace the link by a copy of the file"
    try:
        status = os.stat(os.path.join(folder, location))  # noqa: PTH116, PTH118 - a Path would drop a final slash
    except OSError as error:
        return f"{location}: {error.strerror}"
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        return f"{location} is not a regular file with one name; replace it by a copy of the file"
    return status.st_size


def _length_problem(tensor: ir.ExternalTensor) -> str:
    if tensor.length in (None, tensor.nbytes):
        return ""
    return (
        f"{tensor.name}: {tensor.length} bytes are recorded, but {tensor.dtype.name} {list(tensor.shape)} has "
        f"{tensor.nbytes}"
    )
