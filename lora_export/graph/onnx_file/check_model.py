"""Checks of an ONNX file: ONNX's checker, with onnxruntime's own operators, and where external data is stored."""

from __future__ import annotations

import functools
import os
import re
import stat
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx import defs

from lora_export.errors import InputRefused, OutputFailed, listed
from lora_export.graph.onnx_file.protobuf_wire import without_large_tensors
from lora_export.graph.values import attribute_tensors, initializers

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
    for value in initializers(model):
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and value not in inline:
            tensor.base_dir = path.parent
            if blob := _huggingface_blob(path.parent, os.fsdecode(tensor.location)):
                value.const_value = tensor = moved_to(tensor, blob)
            problems.append(_location_problem(Path(tensor.base_dir), tensor))
        elif isinstance(tensor, ir.ExternalTensor):
            problems.append(_length_problem(tensor))
    for tensor in attribute_tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            tensor.base_dir = path.parent
            problems.append(_location_problem(path.parent, tensor))
    problems = [problem for problem in problems if problem]
    if problems:
        what = f"{path}: {len(problems)} tensors cannot be read from its external data:"
        raise InputRefused(what, listed(problems, MAX_LISTED))


def moved_to(tensor: ir.ExternalTensor, path: Path) -> ir.ExternalTensor:
    """The same tensor in another file, at the same offset."""
    return ir.ExternalTensor(
        path.name,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=ir.Shape(tensor.shape),
        name=tensor.name,
        metadata_props=dict(tensor.metadata_props),
        base_dir=path.parent,
    )


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


def _location_problem(folder: Path, tensor: ir.ExternalTensor) -> str:
    """What is wrong with the location of a tensor's data. Empty where it can be read."""
    location = os.fsdecode(tensor.location)
    path = Path(os.path.normpath(folder / location))
    if not location or "\0" in location or Path(location).is_absolute() or not path.is_relative_to(folder):
        return f"{tensor.name}: the location of its data is absolute or outside the model's folder ({location!r})"
    if path.resolve() != folder.resolve() / path.relative_to(folder):
        return f"{tensor.name}: {location} is reached through a symbolic link; replace the link by a copy of the file"
    try:
        status = os.stat(os.path.join(folder, location))  # noqa: PTH116, PTH118 - a Path would drop a final slash
    except OSError as error:
        return f"{tensor.name}: {location}: {error.strerror}"
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        return f"{tensor.name}: {location} is not a regular file with one name; replace it by a copy of the file"
    offset = tensor.offset or 0
    if problem := _length_problem(tensor):
        return problem
    if not 0 <= offset <= status.st_size - tensor.nbytes:
        end = offset + tensor.nbytes
        return f"{tensor.name}: needs bytes {offset} to {end} of {location}, which has {status.st_size}"
    return ""


def _length_problem(tensor: ir.ExternalTensor) -> str:
    if tensor.length in (None, tensor.nbytes):
        return ""
    return (
        f"{tensor.name}: {tensor.length} bytes are recorded, but {tensor.dtype.name} {list(tensor.shape)} has "
        f"{tensor.nbytes}"
    )
