"""Writing a graph: as ONNX files, as a message with weights apart, and metadata behind a saved graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.errors import RuntimeRefused
from lora_export.graph.exporter_names import remove_exporter_notes
from lora_export.graph.onnx_file.protobuf_wire import MAX_MESSAGE_BYTES, split_at_tensors, unused_location
from lora_export.graph.onnx_file.reading import check_file, check_message, innermost_error, moved_to
from lora_export.graph.onnx_file.shared_weights import SharedTensor, SharedWeights, share_weights
from lora_export.graph.values import attribute_tensors, initializer_tensors, initializers, read_later, stored_at
from lora_export.storage.atomic_output import data_name
from lora_export.storage.hashes import file_sha256

# Of a graph's tensors. With more, the weights go into a file beside the graph: onnxruntime maps it, and holds weights
# that are inside twice.
MAX_INLINE_BYTES = 1 << 29
MIN_EXTERNAL_BYTES = 1024  # smaller tensors stay in the graph, where shape inference reads them


def save_graph(
    model: ir.Model,
    folder: Path,
    name: str,
    *,
    metadata: Mapping[str, str] | None = None,
    shared: SharedWeights | None = None,
    external_data: bool = False,
) -> list[Path]:
    """Write a graph into a folder that the caller publishes. Returns the files, the graph last.

    `metadata` is added to the model's properties. Weights of 512 MiB and more go into a file beside the graph that is
    named by its content (`atomic_output.data_name`), so that an old graph never reads new weights; with `external_data`
    all that are not small do. Those that are `shared` are not written: `model` refers to them from then on. Removes
    exporter notes from `model`. Takes memory for the graph without its weights, and for one of them. Raises
    RuntimeRefused where the graph without its weights is too long, or where ONNX's checker rejects it.
    """
    remove_exporter_notes(model)
    model.metadata_props.update(metadata or {})
    share_weights(model, shared)
    path = folder.absolute() / name
    written = [path]
    constants = sum(tensor.nbytes for tensor in attribute_tensors(model))
    if constants >= MAX_MESSAGE_BYTES:
        raise RuntimeRefused(
            f"the nodes of the graph hold {constants:,} bytes of constants, which ONNX stores in the graph; a graph "
            f"must have less than {MAX_MESSAGE_BYTES:,} bytes"
        )
    own = [tensor.nbytes for tensor in initializer_tensors(model) if not isinstance(tensor, SharedTensor)]
    is_apart = external_data and max(own, default=0) > MIN_EXTERNAL_BYTES
    if constants + sum(own) < MAX_INLINE_BYTES and not is_apart:
        _save_in_one_file(model, path)
    else:
        written.insert(0, _save_with_external_data(model, path))
    try:
        check_file(path)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise RuntimeRefused(f"the graph is not valid ONNX: {error}") from error
    return written


def _save_in_one_file(model: ir.Model, path: Path) -> None:
    """Write the graph with its weights inside. Protobuf would hold them three times; here each is written by itself."""
    with _weights_apart(initializers(model)) as (location, weights):
        message = message_of(model, check=False)
    pieces = split_at_tensors(message, location, [weight.nbytes for weight in weights])
    with path.open("wb") as file:
        for piece in pieces:
            if isinstance(piece, bytes):
                file.write(piece)
            else:
                _write_tensor(weights[piece], file)


def _write_tensor(tensor: ir.TensorProtocol, file: BinaryIO) -> None:
    """Write the bytes of a tensor. Raises RuntimeRefused where their number is not what the graph declares."""
    start = file.tell()
    if hasattr(tensor, "tofile"):
        tensor.tofile(file)
    else:
        file.write(tensor.tobytes())
    if file.tell() - start != tensor.nbytes:
        raise RuntimeRefused(
            f"{tensor.name} has {file.tell() - start:,} bytes, and the graph declares {tensor.nbytes:,}"
        )


@contextlib.contextmanager
def _weights_apart(values: Iterable[ir.Value]) -> Iterator[tuple[str, list[ir.TensorProtocol]]]:
    """A location, and the large tensors of initializers and those of other files. The values name both meanwhile."""
    location = unused_location()
    apart = {value: one for value in values if (one := value.const_value) is not None and _is_apart(one)}
    numbered = {
        value: stored_at(tensor, location, number, name=value.name)
        for number, (value, tensor) in enumerate(apart.items())
    }
    with _with_tensors(numbered):
        yield location, list(apart.values())


def _is_apart(tensor: ir.TensorProtocol) -> bool:
    if tensor.dtype.is_string() or isinstance(tensor, SharedTensor):
        return False
    return isinstance(tensor, ir.ExternalTensor) or tensor.nbytes >= MIN_EXTERNAL_BYTES


def _save_with_external_data(model: ir.Model, path: Path) -> Path:
    """Write the weights beside the graph. Returns their file. Restores the tensors of `model` afterwards."""
    values = [value for value in initializers(model) if not isinstance(value.const_value, SharedTensor)]
    before = [value.const_value for value in values]
    data = path.with_name("weights.data")
    try:
        shared = [value for value in initializers(model) if isinstance(value.const_value, SharedTensor)]
        with _with_tensors(dict.fromkeys(shared)):  # onnx_ir would copy what they refer to
            ir.external_data.unload_from_model(model, path.parent, data.name, size_threshold_bytes=MIN_EXTERNAL_BYTES)
        data = data.replace(path.with_name(data_name(path.name, file_sha256(data))))
        for value, tensor in zip(values, before, strict=True):
            if isinstance(value.const_value, ir.ExternalTensor) and value.const_value is not tensor:
                value.const_value = moved_to(value.const_value, data)
        ir.save(model, path)
    finally:
        for value, tensor in zip(values, before, strict=True):
            value.const_value = tensor
    return data


@contextlib.contextmanager
def _with_tensors(tensors: Mapping[ir.Value, ir.TensorProtocol | None]) -> Iterator[None]:
    """Let initializers have other tensors, or none, meanwhile."""
    before = {value: value.const_value for value in tensors}
    try:
        for value, tensor in tensors.items():
            value.const_value = tensor
        yield
    finally:
        for value, own in before.items():
            value.const_value = own


def message_of(model: ir.Model, *, check: bool = True) -> bytes:
    """Serialise the graph as ONNX. External tensors keep their locations.

    Without `check`, outputs may lack a shape, which ONNX requires and onnxruntime does not. Raises RuntimeRefused where
    ONNX cannot represent the graph.
    """
    try:
        message: bytes = ir.to_proto(model).SerializeToString()
        if check:
            check_message(message)
    except (ir.serde.SerdeError, onnx.checker.ValidationError, ValueError) as error:
        raise RuntimeRefused(f"the graph cannot be written as ONNX: {innermost_error(error)}") from error
    return message


def in_memory(model: ir.Model) -> tuple[bytes, dict[str, NDArray[Any]]]:
    """The graph's message without its large weights, and these weights by name, in memory or mapped from their files.

    For a runtime that accepts both. Copies none of these but transposed views. Weights in dtypes that NumPy lacks stay
    in the message, and those of subgraphs.
    """
    weights: dict[str, NDArray[Any]] = {}
    inner = [value for value in initializers(model) if value.graph is not model.graph]
    read = {value: read_later(one) for value in inner if isinstance(one := value.const_value, ir.ExternalTensor)}
    with _weights_apart(model.graph.initializers.values()), _with_tensors(read):
        message = ir.to_proto(model)
    for tensor in list(message.graph.initializer):
        value = model.graph.initializers[tensor.name]
        stored = value.const_value
        assert stored is not None
        if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
            message.graph.initializer.remove(tensor)  # onnxruntime would remove it, and then miss it
            continue
        is_native = not stored.dtype.is_string() and stored.dtype.numpy().isbuiltin == 1
        if is_native and stored.nbytes >= MIN_EXTERNAL_BYTES:
            weights[tensor.name] = np.ascontiguousarray(stored.numpy())  # onnxruntime accepts no views
            tensor.ClearField("external_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="memory")
        elif tensor.data_location == onnx.TensorProto.EXTERNAL:
            tensor.CopyFrom(ir.to_proto(ir.Tensor(stored.numpy(), dtype=stored.dtype, name=tensor.name)))
    return message.SerializeToString(), weights


def append_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Append properties to a saved graph, for example a verdict. The existing bytes do not change.

    Protobuf reads two messages in sequence as one and joins their repeated fields.
    """
    addition = onnx.ModelProto()
    for key, value in metadata.items():
        addition.metadata_props.add(key=key, value=value)
    with path.open("ab") as file:
        file.write(addition.SerializeToString())
