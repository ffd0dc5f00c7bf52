"""safetensors files as ranges of bytes: headers that are checked before they are believed.

The safetensors library validates every file here; what it does not offer is where a tensor lies,
which a merge needs in order to leave the unchanged ranges to the kernel. Duplicate names, which
the library accepts (the last one wins), are refused.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused, refuse_unprintable
from lora_export.storage import input_files, json_files

MAX_HEADER = 100_000_000  # bytes; the format's own limit
MOST_DIMENSIONS = 64  # of a NumPy array
ALIGNMENT = 8  # bytes; the data of a file starts on this boundary
PAGE = 4096  # bytes

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


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: what it is, and the bytes [start, stop) of the file that hold it."""

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
        """Bytes of one row (of the first dimension); a scalar is one row."""
        return self.nbytes // self.rows if self.rows else 0

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1


@dataclass(frozen=True)
class TensorFile:
    """A validated header. Holds no tensor data."""

    path: Path
    entries: Mapping[str, Entry]  # in the order of their bytes
    metadata: Mapping[str, str]
    size: int  # bytes of the whole file
    mtime_ns: int

    @property
    def data_start(self) -> int:
        return min((entry.start for entry in self.entries.values()), default=self.size)

    def read(self, name: str) -> NDArray[Any]:
        """One tensor, as stored. Reads its bytes only."""
        entry = self.entries[name]
        with self.path.open("rb") as file:
            file.seek(entry.start)
            data = file.read(entry.nbytes)
        if len(data) != entry.nbytes:
            raise InputRefused(f"{self.path}: the file became shorter while {name} was read")
        return np.frombuffer(data, entry.dtype).reshape(entry.shape)

    def unchanged(self) -> bool:
        """Whether the file on disk still has the size and time it had when the header was read."""
        try:
            now = self.path.stat()
        except OSError:
            return False
        return (now.st_size, now.st_mtime_ns) == (self.size, self.mtime_ns)


def open_file(path: Path) -> TensorFile:
    """Read and check the header of a safetensors file. Reads no tensor data.

    Raises InputRefused for anything that is not a regular, whole and consistent safetensors file.
    """
    with input_files.open_regular(path) as file:
        status = os.fstat(file.fileno())
        header_size = _header_size(path, file.read(8), status.st_size)
        header = json_files.parse_json(file.read(header_size), f"the header of {path}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputRefused(f"{path}: the header's __metadata__ must map names to strings")
    entries = _entries(path, header, data_start=8 + header_size)
    expected = max((entry.stop for entry in entries), default=8 + header_size)
    if expected != status.st_size:
        what = "cut short" if status.st_size < expected else "too long"
        raise InputRefused(f"{path} is {what}: its header promises {expected} bytes, the file has {status.st_size}")
    _second_opinion(path)
    return TensorFile(path, {entry.name: entry for entry in entries}, metadata, status.st_size, status.st_mtime_ns)


def _header_size(path: Path, prefix: bytes, file_size: int) -> int:
    if len(prefix) < 8:
        raise InputRefused(f"{path} is no safetensors file: it has only {file_size} bytes")
    (size,) = struct.unpack("<Q", prefix)
    if size > MAX_HEADER or 8 + size > file_size:
        raise InputRefused(
            f"{path} is no safetensors file, or it was cut short: its header should have {size} bytes, "
            f"the file has {file_size}"
        )
    return int(size)


def _entries(path: Path, header: dict[str, Any], *, data_start: int) -> list[Entry]:
    refuse_unprintable(header, f"the header of {path}")
    entries = []
    for name, fields in header.items():
        try:
            code, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
            whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
            known = code in DTYPES
        except (KeyError, TypeError, ValueError) as error:
            raise InputRefused(f"{path}: the header's entry for {name} is malformed") from error
        if not whole:
            raise InputRefused(f"{path}: the header's entry for {name} has a size that is no natural number")
        if not known:
            raise InputRefused(f"{path}: {name} has the unknown dtype {code!r}")
        if len(shape) > MOST_DIMENSIONS:  # at once: the product of a million sizes would take hours
            raise InputRefused(f"{path}: {name} has the shape {_cut(shape)}, which no array can have")
        entries.append(Entry(name, DTYPES[code], tuple(shape), data_start + begin, data_start + end))
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    position = data_start
    for entry in entries:
        count = math.prod(entry.shape)
        if entry.nbytes != count * entry.dtype.itemsize:
            raise InputRefused(
                f"{path}: {entry.name} {entry.shape} {entry.dtype} needs {count * entry.dtype.itemsize} bytes, "
                f"its range has {entry.nbytes}"
            )
        if math.prod(size or 1 for size in entry.shape) >= 1 << 63:
            raise InputRefused(f"{path}: {entry.name} has the shape {_cut(entry.shape)}, which no array can have")
        if entry.start != position:
            what = "overlaps the tensor before it" if entry.start < position else "leaves a hole before it"
            raise InputRefused(f"{path}: {entry.name} {what}")
        position = entry.stop
    return entries


def _cut(shape: Sequence[int]) -> str:
    return f"{list(shape[:4])}"[:-1] + (", ...]" if len(shape) > 4 else "]")


def _second_opinion(path: Path) -> None:
    """What the safetensors library itself objects to, whatever we overlooked."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise InputRefused(f"{path}: {error}") from error


def layout(
    tensors: Iterable[tuple[str, np.dtype[Any], tuple[int, ...]]],
    metadata: Mapping[str, str],
    *,
    beside: int | None = None,
) -> tuple[bytes, list[Entry]]:
    """The header for these tensors in this order, and where each of them will lie.

    With `beside` the data starts at that position plus or minus whole pages: two files whose data lies
    alike in its pages can share them on the disk.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    relative = []
    for name, dtype, shape in tensors:
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        table[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        relative.append((name, dtype, shape, offset, offset + nbytes))
        offset += nbytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    unit, phase = (PAGE, beside) if beside is not None and beside % ALIGNMENT == 0 else (ALIGNMENT, 0)
    text += b" " * ((phase - 8 - len(text)) % unit)
    header = struct.pack("<Q", len(text)) + text
    return header, [Entry(n, d, s, len(header) + begin, len(header) + end) for n, d, s, begin, end in relative]


def write(path: Path, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None) -> None:
    """Write a small file (an adapter) in one go. The caller stages it."""
    header, entries = layout([(name, t.dtype, t.shape) for name, t in tensors.items()], metadata or {})
    with path.open("wb") as file:
        file.write(header)
        for entry in entries:
            file.write(np.ascontiguousarray(tensors[entry.name]).tobytes())
