"""Tensors in files of `torch.save`, which are pickles in a zip archive.

Unpickling can run code. Names are read without it. Tensors are read by `torch.load` with weights_only=True, which
accepts tensors and plain containers alone, and torch is imported only then. An archive whose entries are compressed
is refused: torch writes none, and a small one could fill the memory.
"""

from __future__ import annotations

import functools
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lora_export.errors import EnvironmentLacking, InputRefused, first_line, refuse_unprintable
from lora_export.isolation.bounds import bounded_memory, is_out_of_memory
from lora_export.isolation.limits import MAX_OPCODES, MAX_PICKLE, memory_for
from lora_export.storage import input_files
from lora_export.storage.safetensors_file import Entry

if TYPE_CHECKING:
    import torch

TEXT_OPCODES = frozenset({"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"})
NOT_TENSORS = "{} cannot be read with weights_only=True: it is damaged, or it holds more than tensors ({})"
# What the pickle of a table of tensors names, as `module name`.
NAMES_OF_TENSORS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|tensor_v3|parameter|sparse_tensor|qtensor)"
    r"|torch(\.storage)? \w*Storage|torch [a-z]\w*|torch Size|torch\.nn\.parameter Parameter"
    r"|torch\.serialization _get_layout"
)
# What unpickling raises for files that are damaged, or that hold more than tensors.
FAILURES = (
    *(pickle.UnpicklingError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, EOFError, IndexError),
    *(AssertionError, OverflowError, OSError, zipfile.BadZipFile, NotImplementedError),
)
# NumPy has no such types: torch's bits are viewed as those of ml_dtypes.
VIEWED = {
    "torch.bfloat16": ("uint16", ml_dtypes.bfloat16),
    "torch.float8_e4m3fn": ("uint8", ml_dtypes.float8_e4m3fn),
    "torch.float8_e5m2": ("uint8", ml_dtypes.float8_e5m2),
}


@dataclass(frozen=True, eq=False)
class PickledTensors:
    """The tensors of a pickle, in memory."""

    path: Path
    entries: Mapping[str, Entry]  # their positions in the file are not known, and are zero
    arrays: Mapping[str, NDArray[Any]]
    metadata: Mapping[str, str]
    state: tuple[int, ...]

    @classmethod
    def of(cls, path: Path, tensors: Mapping[str, Any], state: tuple[int, ...]) -> Self:
        """Torch's tensors. Raises as `array_of`."""
        arrays = {name: array_of(path, name, tensor) for name, tensor in tensors.items()}
        entries = {name: Entry(name, array.dtype, array.shape, 0, array.nbytes) for name, array in arrays.items()}
        return cls(path, entries, arrays, {}, state)

    def read(self, name: str) -> NDArray[Any]:
        return self.arrays[name]

    def unchanged(self) -> bool:
        """Whether the file is still the one that was read."""
        try:
            return input_files.file_states([self.path]) == [self.state]
        except OSError:
            return False


def text_in_pickle(path: Path) -> frozenset[str]:
    """Every text in the pickle of an archive of `torch.save`; none for another file. Unpickles and raises nothing."""
    try:
        return _texts(path, *input_files.file_states([path]))
    except (InputRefused, *FAILURES):
        return frozenset()


@functools.lru_cache(maxsize=4)  # every format of adapters looks at them
def _texts(path: Path, _state: tuple[int, ...]) -> frozenset[str]:
    with input_files.open_regular(path) as file, zipfile.ZipFile(file) as archive:
        operations = _operations(archive)
        return frozenset(text for name, text in operations if name in TEXT_OPCODES and isinstance(text, str))


def _operations(archive: zipfile.ZipFile) -> Iterator[tuple[str, Any]]:
    """The operations of the pickle in an archive, with their arguments. Raises UnpicklingError for too many of them."""
    (entry,) = (one for one in archive.infolist() if one.filename.rpartition("/")[2] == "data.pkl")
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > MAX_PICKLE:
        raise pickle.UnpicklingError(f"its pickle is compressed, or has more than {MAX_PICKLE:,} bytes")
    for number, (opcode, argument, _) in enumerate(pickletools.genops(archive.read(entry))):
        if number > MAX_OPCODES:
            raise pickle.UnpicklingError(f"its pickle has more than {MAX_OPCODES:,} operations")
        yield opcode.name, argument


def costly_pickle(archive: zipfile.ZipFile) -> str:
    """Why a pickle could take more memory or time than its size; empty where it cannot.

    A call of another name could take any memory (`bytearray`). A tuple that is used twice, in one that is used twice,
    and so on, would be hashed for years.
    """
    before, tuples = "", set[Any]()
    try:
        for operation, argument in _operations(archive):
            if operation == "GLOBAL" and not NAMES_OF_TENSORS.fullmatch(argument):
                return f"it names {argument.replace(' ', '.')}"
            if operation.endswith("PUT"):
                (tuples.add if before.startswith("TUPLE") else tuples.discard)(argument)
            elif operation == "DUP" or (operation.endswith("GET") and argument in tuples):
                return "it uses a tuple twice"
            before = operation
    except FAILURES as error:
        return str(error) or type(error).__name__
    return ""


def open_pickle(path: Path) -> PickledTensors:
    """Read the tensors of an archive that `torch.save` wrote from a table of tensors.

    Raises InputRefused for another file, for one that holds more than tensors, and for tensors that are larger than
    their data; EnvironmentLacking without PyTorch.
    """
    try:
        import torch
    except ImportError as error:
        raise EnvironmentLacking(f"{path} is a pickle, and needs PyTorch ({error}): pip install torch") from error
    with input_files.open_regular(path) as file:
        (state,) = input_files.file_states([path])
        _refuse_other_archives(path, file)
        file.seek(0)
        most = memory_for(path.stat().st_size)
        try:
            with bounded_memory(most):
                content = torch.load(file, map_location="cpu", weights_only=True)
        except (*FAILURES, MemoryError) as error:
            if is_out_of_memory(error):
                raise InputRefused(f"{path} needs more than {most:,} bytes of memory") from error
            raise InputRefused(NOT_TENSORS.format(path, first_line(error))) from error
    return PickledTensors.of(path, _table(path, content), state)


def _refuse_other_archives(path: Path, file: Any) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            costly = costly_pickle(archive)
    except FAILURES as error:
        raise InputRefused(
            f"{path} is no archive of torch.save. If it is a pickle of PyTorch before 1.6, load it with PyTorch where "
            "you trust it, and save it again"
        ) from error
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    size = sum(entry.file_size for entry in entries)
    if packed or size > path.stat().st_size:
        raise InputRefused(f"{path} has compressed entries, which torch.save does not write")
    if costly:
        raise InputRefused(NOT_TENSORS.format(path, costly))


def _table(path: Path, content: Any) -> dict[str, torch.Tensor]:
    """The tensors by name. litgpt and others put the table under `model`."""
    import torch

    if isinstance(content, Mapping) and list(content) == ["model"]:
        content = content["model"]
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise InputRefused(f"{path} holds no table of tensors, but {type(content).__name__}")
    refuse_unprintable(content, f"the names in {path}")
    others = [name for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise InputRefused(f"{path} holds more than tensors: {', '.join(others[:5])}")
    return dict(content)


def array_of(path: Path, name: str, tensor: torch.Tensor) -> NDArray[Any]:
    """A tensor as an array with the same bits."""
    import torch

    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise InputRefused(f"{path}: {name} is sparse or quantised; only plain tensors are read")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise InputRefused(f"{path}: {name} {tuple(tensor.shape)} is larger than its data")
    tensor = tensor.detach().contiguous()
    try:
        if str(tensor.dtype) in VIEWED:
            bits, dtype = VIEWED[str(tensor.dtype)]
            return np.asarray(tensor.view(getattr(torch, bits)).numpy()).view(dtype)
        return np.asarray(tensor.numpy())
    except (TypeError, RuntimeError) as error:
        raise InputRefused(f"{path}: {name} has the type {tensor.dtype}, which no adapter needs") from error
