"""safetensors files as ranges of bytes.

The safetensors library checks every file here, but three things are done by this module. It returns the position of
each tensor, so that a merge can copy unchanged ranges without reading them as tensors, or share them on the disk. It
reads one tensor or header at a time, within bounds, so that memory does not grow with the file. It refuses headers that
name a tensor twice; the library takes the last one.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused, refuse_unprintable
from lora_export.isolation.limits import MAX_HEADER
from lora_export.storage import input_files, json_files
from lora_export.storage.store_path import StorePath
from lora_export.storage.system_calls import file_status

MAX_DIMENSIONS = 64  # of a NumPy array
ALIGNMENT = 8  # bytes; the data of a file starts at a multiple
PAGE = 4096  # bytes
CACHED_HEADERS = 256  # of objects in stores: each costs a request

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


def is_safetensors(path: Path) -> bool:
    """Whether the name of a file claims this format."""
    return path.suffix == ".safetensors"


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, and the bytes [start, stop) of the file that hold it."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, which is one index of the first dimension. A scalar is one row."""
        return self.nbytes // self.rows if self.rows else 0

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1


@dataclass(frozen=True)
class TensorFile:
    """A checked header. It holds no tensor data."""

    path: Path
    entries: Mapping[str, Entry]  # by name, in the order of their bytes
    metadata: Mapping[str, str]
    size: int  # bytes of the whole file
    mtime_ns: int

    @property
    def data_start(self) -> int:
        return min((entry.start for entry in self.entries.values()), default=self.size)

    def read(self, name: str) -> NDArray[Any]:
        """Read one tensor, as stored. Raises InputRefused where the file became shorter."""
        entry = self.entries[name]
        data = np.empty(entry.nbytes, np.uint8)
        with _opened(self.path, is_last=entry.stop == self.size) as file:
            file.seek(entry.start)
            count = file.readinto(data.data)
        if count != entry.nbytes:
            raise InputRefused(f"{self.path}: the file became shorter while {name} was read")
        return data.view(entry.dtype).reshape(entry.shape)

    def unchanged(self) -> bool:
        """Whether the file still has the size and the modification time of when its header was read."""
        try:
            now = self.path.stat()
        except OSError:
            return False
        return (now.st_size, now.st_mtime_ns) == (self.size, self.mtime_ns)


def open_file(path: Path) -> TensorFile:
    """Read and check the header of a safetensors file. Raises InputRefused for another file, and for a damaged one."""
    if isinstance(path, StorePath) and path.is_file():
        return _open_object(path, path.stat().st_ino)
    found = _open(path)
    from safetensors import SafetensorError, safe_open  # here: a header that is stored elsewhere needs no library

    try:  # the library may refuse what the checks above do not
        with safe_open(str(path), framework="numpy"):
            return found
    except (SafetensorError, OSError) as error:
        raise InputRefused(f"{path}: {error}") from error


def _open(path: Path) -> TensorFile:
    with input_files.open_regular(path) as file:
        status = file_status(file.fileno())
        prefix = file.read(8)
        text = file.read(_header_size(path, prefix, status.st_size))
    return _described(path, text, status.st_size, status.st_mtime_ns)


@contextlib.contextmanager
def _opened(path: Path, *, is_last: bool) -> Iterator[io.BufferedReader]:
    """A file for reading. An object reads ahead from one time to the next.

    It stays open, with what was read ahead, until its last tensor or another object is read, or a read fails.
    """
    if isinstance(path, StorePath):
        with _object_lock, contextlib.ExitStack() as stack:
            file = _opened_object(path, path.stat().st_ino)
            stack.callback(file.close)
            stack.callback(_opened_object.cache_clear)
            yield file
            if not is_last:
                stack.pop_all()
    else:
        with path.open("rb") as file:
            yield file


_object_lock = threading.Lock()


@functools.lru_cache(1)
def _opened_object(path: StorePath, _version: int) -> io.BufferedReader:
    from lora_export.storage.store_file import KEPT_OF_ONE

    return path.open_object(KEPT_OF_ONE)


@functools.lru_cache(CACHED_HEADERS)
def _open_object(path: StorePath, _version: int) -> TensorFile:
    """The header of an object, read once. The library, which opens files of the disk alone, does not see it."""
    return _open(path)


def file_of_header(path: Path, header: bytes, size: int) -> TensorFile:
    """What a file of `size` bytes with this header has. Reads no file. Raises InputRefused as `open_file` does."""
    header_size = _header_size(path, header[:8], size)
    if len(header) != 8 + header_size:
        raise InputRefused(f"the stored header of {path} has {len(header)} bytes, not {8 + header_size}")
    return _described(path, header[8:], size, 0)


def _described(path: Path, text: bytes, size: int, mtime_ns: int) -> TensorFile:
    """A file of `size` bytes by the JSON of its header."""
    header = json_files.parse_json(text, f"the header of {path}")
    metadata = _metadata(path, header)
    entries = _entries(path, header, data_start=8 + len(text))
    expected = max((entry.stop for entry in entries), default=8 + len(text))
    if expected != size:
        what = "cut short" if size < expected else "too long"
        raise InputRefused(f"{path} is {what}: its header describes {expected} bytes, the file has {size}")
    return TensorFile(path, {entry.name: entry for entry in entries}, metadata, size, mtime_ns)


def _metadata(path: Path, header: dict[str, Any]) -> dict[str, str]:
    """Take the metadata out of a header. MLX writes null where there is none."""
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputRefused(f"{path}: the header's __metadata__ must map names to strings")
    return metadata


def _header_size(path: Path, prefix: bytes, file_size: int) -> int:
    if len(prefix) < 8:
        raise InputRefused(f"{path} is not a safetensors file: it has only {file_size} bytes")
    (size,) = struct.unpack("<Q", prefix)
    if size > MAX_HEADER or 8 + size > file_size:
        raise InputRefused(
            f"{path} is not a safetensors file, or it was cut short: its header should have {size} bytes, "
            f"the file has {file_size}"
        )
    return int(size)


def _entries(path: Path, header: dict[str, Any], *, data_start: int) -> list[Entry]:
    """The header's tensors, in the order of their bytes. Raises InputRefused where they overlap or leave holes."""
    refuse_unprintable(header, f"the header of {path}")
    entries = [_entry(path, name, fields, data_start=data_start) for name, fields in header.items()]
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    position = data_start
    for entry in entries:
        needed = math.prod(entry.shape) * entry.dtype.itemsize
        if entry.nbytes != needed:
            raise InputRefused(
                f"{path}: {entry.name} {entry.shape} {entry.dtype} needs {needed} bytes, its range has {entry.nbytes}"
            )
        if math.prod(size or 1 for size in entry.shape) >= 1 << 63:
            raise _too_large(path, entry.name, entry.shape)
        if entry.start != position:
            what = "overlaps the tensor before it" if entry.start < position else "leaves a hole before it"
            raise InputRefused(f"{path}: {entry.name} {what}")
        position = entry.stop
    return entries


def _entry(path: Path, name: str, fields: Any, *, data_start: int) -> Entry:
    try:
        code, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
        are_sizes = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
        known = code in DTYPES
    except (KeyError, TypeError, ValueError) as error:
        raise InputRefused(f"{path}: the header's entry for {name} is malformed") from error
    if not are_sizes:
        raise InputRefused(f"{path}: the header's entry for {name} has a size that is not a non-negative integer")
    if not known:
        raise InputRefused(f"{path}: {name} has the unknown dtype {code!r}")
    if len(shape) > MAX_DIMENSIONS:  # before any arithmetic: the product of a million sizes would take hours
        raise _too_large(path, name, shape)
    return Entry(name, DTYPES[code], tuple(shape), data_start + begin, data_start + end)


def _too_large(path: Path, name: str, shape: Sequence[int]) -> InputRefused:
    shown = f"{list(shape[:4])}"[:-1] + (", ...]" if len(shape) > 4 else "]")
    return InputRefused(f"{path}: {name} has the shape {shown}, which no array can have")


def layout(
    tensors: Iterable[tuple[str, np.dtype[Any], tuple[int, ...]]],
    metadata: Mapping[str, str],
    *,
    beside: int | None = None,
) -> tuple[bytes, list[Entry]]:
    """Return the header for these tensors in this order, and the entries that the file will have.

    With `beside`, the data starts at that position, give or take whole pages. Two files whose data starts at the same
    offset in a page can share their pages on the disk.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    ranges = []
    for name, dtype, shape in tensors:
        stop = offset + math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [offset, stop]}
        ranges.append((name, dtype, shape, offset, stop))
        offset = stop
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    unit, phase = (PAGE, beside) if beside is not None and beside % ALIGNMENT == 0 else (ALIGNMENT, 0)
    text += b" " * ((phase - 8 - len(text)) % unit)
    header = struct.pack("<Q", len(text)) + text
    return header, [Entry(n, d, s, len(header) + begin, len(header) + end) for n, d, s, begin, end in ranges]


def write(path: Path, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None) -> None:
    """Write a small file, such as an adapter, at once. The caller stages it."""
    header, entries = layout([(name, t.dtype, t.shape) for name, t in tensors.items()], metadata or {})
    with path.open("wb") as file:
        file.write(header)
        for entry in entries:
            file.write(np.ascontiguousarray(tensors[entry.name]).tobytes())
