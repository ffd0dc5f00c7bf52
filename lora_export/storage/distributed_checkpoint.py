"""Tensors in a folder of torch.distributed.checkpoint, which FSDP and others save in shards.

`.metadata` is a pickle. It is read by an unpickler that makes torch's own records of a checkpoint and nothing else,
once. torch's reader gets these records, and reads each tensor by torch.load with weights_only=True. It would read
entries that are no tensors without that: none is requested. Shards outside of the folder, and packed ones, are refused.
"""

from __future__ import annotations

import importlib
import io
import itertools
import math
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_export.errors import EnvironmentLacking, InputRefused, first_line, listed, refuse_unprintable
from lora_export.isolation.bounds import bounded_memory, is_out_of_memory
from lora_export.isolation.limits import MAX_OPCODES, MAX_PICKLE, memory_for
from lora_export.storage import input_files
from lora_export.storage.artifact_kinds import METADATA_FILE, SHARD_SUFFIX
from lora_export.storage.torch_pickle import FAILURES, PickledTensors, costly_pickle

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

_OF_CHECKPOINT = "torch.distributed.checkpoint"
# What the pickle of a checkpoint's metadata names, by module.
_NAMES = {
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    f"{_OF_CHECKPOINT}.filesystem": {"_StorageInfo", "_StoragePrefix"},
    f"{_OF_CHECKPOINT}.metadata": {
        *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties"),
        *("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    },
}
MOST_REUSED = 40  # tuples in the metadata that are used again: one in each other would be hashed for years


def shards_of(folder: Path) -> list[Path]:
    """The files of all processes."""
    return sorted(folder.glob(f"*{SHARD_SUFFIX}"))


def text_in_metadata(folder: Path) -> frozenset[str]:
    """Every text in the metadata, names of tensors among them; none where these are damaged. Unpickles nothing."""
    try:
        content = input_files.read_bytes(folder / METADATA_FILE, MAX_PICKLE)
        operations = itertools.islice(pickletools.genops(content), MAX_OPCODES)
        return frozenset(argument for _, argument, _ in operations if isinstance(argument, str))
    except (InputRefused, *FAILURES):
        return frozenset()


def open_distributed_checkpoint(folder: Path, is_wanted: Callable[[str], bool]) -> PickledTensors:
    """Read the tensors with the wanted names, each whole, from the shards of all processes. Needs PyTorch.

    Raises InputRefused for metadata that name anything but torch's records, for tensors that are larger than their
    data, for shards that are missing or elsewhere, and for a damaged checkpoint; EnvironmentLacking without PyTorch.
    """
    try:
        import torch
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata
        from torch.distributed.checkpoint.state_dict_loader import load
    except ImportError as error:
        raise EnvironmentLacking(f"{folder} needs PyTorch ({error}): pip install torch") from error
    path = folder / METADATA_FILE
    (state,) = input_files.file_states([path])
    metadata = _metadata(path)
    size = 0
    wanted: dict[str, TensorStorageMetadata] = {
        name: one
        for name, one in metadata.state_dict_metadata.items()
        if isinstance(one, TensorStorageMetadata) and is_wanted(name)
    }
    refuse_unprintable(wanted, f"the names in {path}")

    class Reader(FileSystemReader):
        def read_metadata(self, *_: Any, **__: Any) -> Metadata:
            return metadata

    try:
        size = _checked_shards(folder, metadata, wanted)
        with bounded_memory(memory_for(size)):
            tensors = {name: torch.empty(one.size, dtype=one.properties.dtype) for name, one in wanted.items()}
            load(tensors, storage_reader=Reader(folder), no_dist=True)
    except (*FAILURES, MemoryError, CheckpointException) as error:
        inner = [found for found, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        if any(map(is_out_of_memory, inner)):
            raise InputRefused(f"{folder} needs more than {memory_for(size):,} bytes of memory") from error
        raise InputRefused(f"{folder} is damaged: {first_line(inner[0])}") from error
    return PickledTensors.of(path, tensors, state)


# --- The metadata ---


class _Records(pickle.Unpickler):
    """An unpickler that makes the records of a checkpoint alone."""

    def find_class(self, module: str, name: str) -> Any:
        import torch

        module = "pathlib" if module == "pathlib._local" else module  # its name where Python 3.13 wrote the file
        if name in _NAMES.get(module, ()):
            return getattr(importlib.import_module(module), name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


def _metadata(path: Path) -> Metadata:
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

    content = input_files.read_bytes(path, MAX_PICKLE)
    try:
        _refuse_costly(content)
        with bounded_memory(memory_for(len(content))):
            found: object = _Records(io.BytesIO(content)).load()
        if isinstance(found, Metadata) and (
            all(isinstance(name, str) for name in found.state_dict_metadata)
            and all(isinstance(index, MetadataIndex) for index in found.storage_data)
            and all(isinstance(info, _StorageInfo) for info in found.storage_data.values())
        ):
            return found
    except (*FAILURES, MemoryError) as error:
        raise InputRefused(f"{path} is no metadata of a checkpoint: {first_line(error)}") from error
    raise InputRefused(f"{path} is no metadata of a checkpoint")


def _refuse_costly(content: bytes) -> None:
    """Raise UnpicklingError for a pickle that could take more time than its size."""
    is_tuple: list[bool] = []  # by the number of what was put aside
    before, reused = "", 0
    for number, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if opcode.name == "MEMOIZE":
            is_tuple.append(before.startswith("TUPLE"))
        elif opcode.name.endswith("GET") and isinstance(argument, int):
            reused += argument >= len(is_tuple) or is_tuple[argument]
        elif opcode.name.endswith("PUT") or opcode.name == "DUP":  # not written by this protocol
            raise pickle.UnpicklingError(f"it has the operation {opcode.name}")
        if number > MAX_OPCODES or reused > MOST_REUSED:
            raise pickle.UnpicklingError(f"it has more than {MAX_OPCODES:,} operations, or uses tuples again and again")
        before = opcode.name


# --- The shards ---


def _checked_shards(folder: Path, metadata: Metadata, wanted: Mapping[str, TensorStorageMetadata]) -> int:
    """The bytes of the wanted tensors. Raises InputRefused for what torch's reader should not open."""
    problems, stored = [], 0
    nbytes = sum(math.prod(one.size) * one.properties.dtype.itemsize for one in wanted.values())
    for index, info in metadata.storage_data.items():
        if index.fqn not in wanted:
            continue
        path = folder / str(info.relative_path)
        if path.parent != folder or not path.is_file() or path.is_symlink():
            problems.append(f"{index.fqn}: there is no file {info.relative_path} in the folder")
        elif info.transform_descriptors:
            problems.append(f"{index.fqn}: it is packed ({', '.join(map(str, info.transform_descriptors))})")
        elif not 0 <= info.offset <= info.offset + info.length <= path.stat().st_size:
            problems.append(f"{index.fqn}: {info.relative_path} ends before it")
        else:
            stored += info.length
            with input_files.open_regular(path) as file:
                file.seek(info.offset)
                if why := _why_not_read(io.BytesIO(file.read(info.length))):
                    problems.append(f"{index.fqn}: {why}")
    if not problems and nbytes > stored:
        problems.append(f"its tensors have {nbytes:,} bytes, and their shards {stored:,}")
    if not problems:
        cut = [name for name, one in wanted.items() if not _is_made_up(one)]
        problems += [f"{name}: its shards do not have each of its elements once" for name in cut]
    if problems:
        raise InputRefused(f"{folder} is refused:", listed(sorted(set(problems)), len(problems)))
    return nbytes


def _is_made_up(tensor: TensorStorageMetadata) -> bool:
    """Whether the chunks of a tensor have each of its elements once: torch's reader leaves others as they are."""
    chunks = {(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in tensor.chunks}
    if sum(math.prod(sizes) for _, sizes in chunks) != math.prod(tensor.size):
        return False
    is_stored = np.zeros(tuple(tensor.size), bool)
    for offsets, sizes in chunks:
        if min(offsets, default=0) < 0:
            return False
        is_stored[tuple(slice(first, first + size) for first, size in zip(offsets, sizes, strict=True))] = True
    return bool(is_stored.all())


def _why_not_read(file: Any) -> str:
    """Why a tensor in an archive of torch.save is not read; empty where it is."""
    try:
        with zipfile.ZipFile(file) as archive:
            return costly_pickle(archive)
    except FAILURES as error:
        return f"it is no tensor of torch.save ({first_line(error)})"
