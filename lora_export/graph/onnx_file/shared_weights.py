"""Weights that several graphs have on the disk once: a graph refers to equal weights in the data file of another."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Container, Iterable, Iterator, Sequence, Set
from pathlib import Path

import numpy as np
import onnx_ir as ir
from xxhash import xxh3_128

from lora_export.callbacks import OnMessage
from lora_export.errors import InputRefused
from lora_export.graph.onnx_file.protobuf_wire import LARGE_TENSOR_BYTES
from lora_export.graph.onnx_file.reading import open_graph
from lora_export.graph.values import initializers
from lora_export.options.spelling import named
from lora_export.provenance import SHARED_KEY
from lora_export.storage import block_copy
from lora_export.storage.atomic_output import remove, sign_alone
from lora_export.storage.hashes import FAST, HASH_BLOCK, file_hash
from lora_export.storage.store_path import StorePath


class SharedTensor(ir.ExternalTensor):
    """A tensor in a file of another graph. It is not written again."""


class SharedWeights:
    """The weights in the data files of a graph, by their bytes. Copies of the files are in `folder`."""

    def __init__(self, tensors: Sequence[ir.ExternalTensor], folder: Path):
        self.files = {os.path.normpath(os.fsdecode(tensor.location)) for tensor in tensors}
        self.shared = 0  # bytes that were referred to
        self.used: set[str] = set()  # the files that were referred to
        self._folder = folder
        self._by_size: dict[int, list[ir.ExternalTensor]] = {}
        self._by_hash: dict[int, dict[str, ir.ExternalTensor]] = {}
        for tensor in tensors:
            self._by_size.setdefault(tensor.nbytes, []).append(tensor)

    def refer(self, value: ir.Value) -> str | None:
        """Let an initializer refer to equal bytes. Returns the name of their file, or None where there are none."""
        tensor = value.const_value
        if tensor is None or tensor.dtype.is_string() or (stored := self._equal(tensor)) is None:
            return None
        location = os.path.normpath(os.fsdecode(stored.location))
        value.const_value = SharedTensor(
            *(location, stored.offset, tensor.nbytes, tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            name=value.name or "",
            doc_string=tensor.doc_string,
            base_dir=self._folder,
        )
        self.shared += tensor.nbytes
        self.used.add(location)
        return location

    def _equal(self, tensor: ir.TensorProtocol) -> ir.ExternalTensor | None:
        if tensor.nbytes not in self._by_size:
            return None
        if tensor.nbytes not in self._by_hash:
            self._by_hash[tensor.nbytes] = {_hash_of(stored): stored for stored in self._by_size[tensor.nbytes]}
        return self._by_hash[tensor.nbytes].get(_hash_of(tensor))

    def hashes_of(self, locations: Iterable[str]) -> dict[str, dict[str, str]]:
        """The hashes of files of the weights, in the form of a record."""
        return {name: {FAST: file_hash(self._folder / name, FAST)} for name in sorted(locations)}


def share_weights(model: ir.Model, shared: SharedWeights | None, but: Container[ir.Value] = ()) -> None:
    """Let the initializers of a graph refer to equal weights, but for some, and record the hashes of their files.

    Without `shared`, the graph shares none.
    """
    model.metadata_props.pop(SHARED_KEY, None)
    if shared is None:
        return
    files = {shared.refer(value) for value in initializers(model) if value not in but}
    if hashes := shared.hashes_of(filter(None, files)):
        model.metadata_props[SHARED_KEY] = json.dumps(hashes)


def _hash_of(tensor: ir.TensorProtocol) -> str:
    if isinstance(tensor, ir.ExternalTensor):
        stored = np.memmap(tensor.path, np.uint8, "r", tensor.offset or 0, (tensor.nbytes,))
        return xxh3_128(stored.data).hexdigest()
    return xxh3_128(tensor.tobytes()).hexdigest()


@contextlib.contextmanager
def shared_weights(path: Path, output: Path, stage: Path, *, sign: bool = False) -> Iterator[SharedWeights]:
    """The weights of a graph that an output beside it may share. Their files are copied into the stage meanwhile.

    There the output is checked and run before it is published. Where the file system can, a copy takes no space. With
    `sign` the copies of files to which the output refers are signed with it.
    Raises InputRefused where the graph is not in the output's folder, which onnxruntime requires, or has no weights in
    a file beside it, and where its files change meanwhile.
    """
    if isinstance(path, StorePath) or path.parent.resolve() != output.parent.resolve():
        raise InputRefused(
            f"{named('share_with', str(path))} is not in the folder of the output, {output.parent}: onnxruntime reads "
            "no weights outside of a graph's folder"
        )
    graph = open_graph(path)
    own_file = Path(os.path.realpath(path))
    tensors = [value.const_value for value in initializers(graph.model)]
    apart = [one for one in tensors if isinstance(one, ir.ExternalTensor) and Path(one.path) != own_file]
    if not apart:
        raise InputRefused(
            f"{path} has its weights inside, and a graph can share those of a file beside it alone. Write {path.name} "
            f"again with {named('external_data', True)}"
        )
    shared = SharedWeights([one for one in apart if one.nbytes >= LARGE_TENSOR_BYTES], stage)
    try:
        for name in shared.files:
            _copy(path.parent / name, stage / name)
        yield shared
    finally:
        _leave_signed(stage, shared.files, shared.used if sign else set())
    for changed in graph.changed():
        raise InputRefused(f"{changed} changed while it was being read")


def _leave_signed(stage: Path, files: Set[str], signed: Set[str]) -> None:
    """Remove the copies in a stage, but for those that are signed with the output and then removed."""
    tops, left = ({Path(file).parts[0] for file in each} for each in (files, signed))
    for name in (tops - left) | (files - signed):  # of a folder, the other files
        remove(stage / name)
    for name in left:
        sign_alone(stage, stage / name)


@contextlib.contextmanager
def sharing(
    path: Path | None, output: Path, stage: Path, on_message: OnMessage, *, sign: bool = False
) -> Iterator[SharedWeights | None]:
    """As `shared_weights`, and report what was shared. None where no graph is named."""
    if path is None:
        yield None
        return
    with shared_weights(path, output, stage, sign=sign) as shared:
        yield shared
    if shared.shared:
        on_message(f"{shared.shared / 2**20:,.1f} MiB of the weights are shared with {path.name}")
    else:
        on_message(f"note: no large weight equals one of {path.name}: none are shared")


def _copy(source: Path, target: Path) -> None:
    """Copy a file, without its bytes where the file system can."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as reader, target.open("xb") as writer:
        size = os.fstat(reader.fileno()).st_size
        done = block_copy.share(reader.fileno(), writer.fileno(), 0, 0, size).stop
        reader.seek(done)
        writer.seek(done)
        shutil.copyfileobj(reader, writer, HASH_BLOCK)
