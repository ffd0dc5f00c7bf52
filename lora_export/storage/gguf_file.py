"""GGUF files as ranges of bytes: ggml's format of weights, which llama.cpp and its relatives run.

A header has fields (a key, a type and a value each), then a name, a shape, a type and a place for each tensor. It is
read once, from its first byte to its last, and none of its values is held: a field is its range of bytes. The reader of
the package gguf makes an array of each token of a vocabulary, and believes every count and place; here they are checked
before anything is allocated. What llama.cpp refuses is refused here too: tensors are stored in the sequence of the
header, without overlaps and holes.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lora_export.errors import InputRefused, refuse_unprintable
from lora_export.isolation.limits import MAX_GGUF_ENTRIES, MAX_GGUF_HEADER, MAX_JSON
from lora_export.storage import input_files
from lora_export.storage.system_calls import file_status

MAGIC, _VERSIONS = b"GGUF", (2, 3)
SUFFIX = ".gguf"
ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAX_ALIGNMENT = "general.alignment", 32, 1 << 20
MOST_SIZES = 4  # of ggml
MAX_NAME = 1 << 16  # bytes of a key or of a tensor's name
FLOAT32, STRING, ARRAY = 6, 8, 9
# The types of values whose size is known: their number, as `struct` reads them
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


class BlockType(NamedTuple):
    """A type of ggml: so many elements of a row are stored in so many bytes."""

    number: int
    name: str
    elements: int
    nbytes: int


# Elements of a block -> number, name and bytes of the types that have as many: gguf 0.19.0, GGML_QUANT_SIZES
_TYPES = {
    1: "0 F32 4, 1 F16 2, 30 BF16 2, 28 F64 8, 24 I8 1, 25 I16 2, 26 I32 4, 27 I64 8",
    32: "2 Q4_0 18, 3 Q4_1 20, 6 Q5_0 22, 7 Q5_1 24, 8 Q8_0 34, 9 Q8_1 40, 20 IQ4_NL 18, 39 MXFP4 17",
    64: "40 NVFP4 36",
    128: "41 Q1_0 18",
    256: "10 Q2_K 84, 11 Q3_K 110, 12 Q4_K 144, 13 Q5_K 176, 14 Q6_K 210, 15 Q8_K 292, 16 IQ2_XXS 66, 17 IQ2_XS 74, "
    "18 IQ3_XXS 98, 19 IQ1_S 50, 21 IQ3_S 110, 22 IQ2_S 82, 23 IQ4_XS 136, 29 IQ1_M 56, 34 TQ1_0 54, 35 TQ2_0 66",
}
BLOCK_TYPES = {
    int(number): BlockType(int(number), name, elements, int(nbytes))
    for elements, types in _TYPES.items()
    for number, name, nbytes in map(str.split, types.split(","))
}
BY_NAME = {one.name: one for one in BLOCK_TYPES.values()}


class GgufTensor(NamedTuple):
    """One tensor, and the bytes [start, stop) of the file that hold it."""

    name: str
    type: BlockType
    shape: tuple[int, ...]  # as NumPy has it: the rows' elements are the last dimension
    start: int
    stop: int


class GgufField(NamedTuple):
    """The bytes [start, stop) of the file that hold a key, a type and a value, and where the value begins."""

    type: int
    start: int
    value: int
    stop: int


@dataclass(frozen=True)
class GgufFile:
    """A checked header. It holds neither values nor tensors."""

    path: Path
    version: int
    alignment: int
    fields: Mapping[str, GgufField]
    tensors: tuple[GgufTensor, ...]  # in the order of their bytes
    data_start: int
    size: int  # bytes of the whole file
    mtime_ns: int

    def value(self, key: str, default: Any = None) -> Any:
        """The value of a field: a number or a text. The default for a key that it lacks, and for an array."""
        field = self.fields.get(key)
        if field is None or field.type == ARRAY or field.stop - field.value > MAX_JSON:
            return default
        with self.path.open("rb") as file:
            data = _read(self.path, file, field.value, field.stop)
        return (
            data[8:].decode(errors="replace") if field.type == STRING else struct.unpack(_NUMBERS[field.type], data)[0]
        )


def _read(path: Path, file: BinaryIO, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file. Raises InputRefused where it ends before."""
    file.seek(start)
    data = file.read(stop - start)
    if len(data) != stop - start:
        raise InputRefused(f"{path} became shorter while it was being read")
    return data


def is_gguf(path: Path) -> bool:
    """Whether a path is a file that begins as one. Raises nothing."""
    try:
        if not path.is_file() or path.stat().st_size < len(MAGIC):  # such as /proc/kmsg, which waits for its reader
            return False
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def open_gguf(path: Path) -> GgufFile:
    """Read and check a header, in memory that does not depend on its values.

    Raises InputRefused for another file, a damaged one, and one part of several.
    """
    with input_files.open_regular(path) as file:
        status = file_status(file.fileno())
        return _HeaderReader(path, file, status.st_size).read(status.st_mtime_ns)


class _HeaderReader:
    """Reads one header from its first byte to its last."""

    def __init__(self, path: Path, file: BinaryIO, size: int):
        self.path, self.file, self.size = path, file, size
        self.position, self.end = 0, min(size, MAX_GGUF_HEADER)

    def read(self, mtime_ns: int) -> GgufFile:
        if self.take(4) != MAGIC:
            raise InputRefused(f"{self.path} is no GGUF file: it does not begin with GGUF")
        version = self.number("<I")
        if version not in _VERSIONS:
            order = "stored in big-endian order" if version in (2 << 24, 3 << 24) else f"of version {version}"
            raise InputRefused(f"{self.path} is a GGUF file {order}, which is not supported")
        tensor_count, field_count = self.count("tensors"), self.count("fields")
        fields = self.fields(field_count)
        found = GgufFile(self.path, version, DEFAULT_ALIGNMENT, fields, (), 0, self.size, mtime_ns)
        alignment = found.value(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise InputRefused(f"{self.path}: {ALIGNMENT_KEY} is {alignment!r}, which is no power of two")
        if found.value("split.count", 1) not in (0, 1):
            raise InputRefused(
                f"{self.path} is one of several parts of a model. Join them with llama.cpp's llama-gguf-split"
            )
        described = [self.tensor() for _ in range(tensor_count)]
        refuse_unprintable([name for name, *_ in described], f"the header of {self.path}")
        data_start = next_aligned(self.position, alignment)
        tensors = self.placed(described, data_start, alignment)
        return GgufFile(self.path, version, alignment, fields, tensors, data_start, self.size, mtime_ns)

    def damaged(self, why: str) -> InputRefused:
        return InputRefused(f"{self.path} is damaged, or was cut short: {why}")

    def skip(self, count: int) -> None:
        self.position += count
        if self.position > self.end:
            limit = f"{self.size:,} bytes" if self.end == self.size else f"the {self.end:,} bytes that one may take"
            raise self.damaged(f"its header goes beyond {limit}")

    def take(self, count: int) -> bytes:
        self.skip(count)
        data = self.file.read(count)
        if len(data) != count:
            raise self.damaged("it became shorter while it was being read")
        return data

    def number(self, kind: str) -> Any:
        return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]

    def count(self, what: str) -> int:
        number = int(self.number("<Q"))
        if number > MAX_GGUF_ENTRIES:
            raise self.damaged(f"its header should have {number:,} {what}, and {MAX_GGUF_ENTRIES:,} are the most")
        return number

    def name(self, what: str) -> str:
        length = self.number("<Q")
        if length > MAX_NAME:
            raise self.damaged(f"the name of {what} should have {length:,} bytes")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"the name of {what} is not UTF-8") from error

    def fields(self, count: int) -> dict[str, GgufField]:
        fields: dict[str, GgufField] = {}
        for _ in range(count):
            start, key, kind, value = self.position, self.name("a field"), self.number("<I"), self.position
            if key in fields:
                raise self.damaged(f"it has the field {key!r} twice")
            if kind == ARRAY:
                kind_inside, length = self.number("<I"), self.number("<Q")
                self.skip_values(kind_inside, length, key)
            else:
                self.skip_values(kind, 1, key)
            self.file.seek(self.position)
            fields[key] = GgufField(kind, start, value, self.position)
        return fields

    def skip_values(self, kind: int, count: int, key: str) -> None:
        if kind in _NUMBERS:
            self.skip(count * struct.calcsize(_NUMBERS[kind]))
            return
        if kind != STRING:
            raise self.damaged(f"the field {key!r} has the unknown type {kind}")
        if count > (self.end - self.position) // 8:  # before the loop: each text has a length of 8 bytes
            raise self.damaged(f"the field {key!r} should have {count:,} texts")
        read, seek, length_of = self.file.read, self.file.seek, struct.Struct("<Q").unpack
        for _ in range(count):  # a vocabulary has some 100,000
            self.skip(8)
            length = length_of(read(8))[0]
            self.skip(length)
            seek(length, os.SEEK_CUR)

    def tensor(self) -> tuple[str, BlockType, tuple[int, ...], int]:
        name, dimensions = self.name("a tensor"), self.number("<I")
        if not 0 < dimensions <= MOST_SIZES:
            raise self.damaged(f"{name!r} has {dimensions} dimensions")
        shape = struct.unpack(f"<{dimensions}Q", self.take(8 * dimensions))[::-1]
        number, offset = self.number("<I"), self.number("<Q")
        if number not in BLOCK_TYPES:
            raise InputRefused(f"{self.path}: {name!r} has the unknown type {number}")
        kind = BLOCK_TYPES[number]
        if not all(shape) or shape[-1] % kind.elements or math.prod(shape) >= 1 << 63:
            raise self.damaged(f"{name!r} cannot have the shape {list(shape)} in blocks of {kind.elements}")
        return name, kind, shape, offset

    def placed(
        self, described: Sequence[tuple[str, BlockType, tuple[int, ...], int]], data_start: int, alignment: int
    ) -> tuple[GgufTensor, ...]:
        tensors, position, names = [], data_start, set()
        for name, kind, shape, offset in described:
            if name in names:
                raise self.damaged(f"it has the tensor {name!r} twice")
            if data_start + offset != position:
                raise self.damaged(f"{name!r} is stored at {offset:,}, and {position - data_start:,} is the next place")
            stop = position + stored_bytes(kind, shape)
            if stop > self.size:
                raise self.damaged(f"{name!r} goes beyond its {self.size:,} bytes")
            tensors.append(GgufTensor(name, kind, shape, position, stop))
            names.add(name)
            position = next_aligned(stop, alignment)
        if self.size > position:
            raise self.damaged(f"its tensors end at {position:,}, and it has {self.size:,} bytes")
        return tuple(tensors)


def next_aligned(position: int, alignment: int) -> int:
    """The next multiple of the alignment."""
    return -(-position // alignment) * alignment


def stored_bytes(kind: BlockType, shape: Sequence[int]) -> int:
    """The bytes of a tensor of this shape, whose rows are whole blocks."""
    return math.prod(shape) // kind.elements * kind.nbytes


def gguf_field(key: str, value: str | float) -> bytes:
    """A field with a text, or with a number in fp32, as a header has it."""
    name = key.encode()
    start = struct.pack("<Q", len(name)) + name
    if not isinstance(value, str):
        return start + struct.pack("<If", FLOAT32, value)
    text = value.encode()
    return start + struct.pack("<IQ", STRING, len(text)) + text


def gguf_layout(
    base: GgufFile, tensors: Iterable[tuple[str, BlockType, tuple[int, ...]]], texts: Mapping[str, str]
) -> tuple[bytes, list[GgufTensor]]:
    """Return the header of a file with the fields of `base`, these tensors and these texts, and where its tensors are.

    A text takes the place of a field of this key. Raises InputRefused where the base became shorter.
    """
    kept = (field for key, field in base.fields.items() if key not in texts)
    with base.path.open("rb") as file:
        fields = [_read(base.path, file, field.start, field.stop) for field in kept]
    fields += [gguf_field(key, text) for key, text in texts.items()]
    return header_of(fields, tensors, version=base.version, alignment=base.alignment)


def header_of(
    fields: Sequence[bytes],
    tensors: Iterable[tuple[str, BlockType, tuple[int, ...]]],
    *,
    version: int = _VERSIONS[-1],
    alignment: int = DEFAULT_ALIGNMENT,
) -> tuple[bytes, list[GgufTensor]]:
    """Return the header of a file with these fields and tensors, and where its tensors are."""
    described, position = [], 0
    for name, kind, shape in tensors:
        described.append(GgufTensor(name, kind, shape, position, position + stored_bytes(kind, shape)))
        position = next_aligned(described[-1].stop, alignment)
    parts = list(fields)
    for one in described:
        own = one.name.encode()
        dimensions = struct.pack(f"<I{len(one.shape)}Q", len(one.shape), *one.shape[::-1])
        parts.append(struct.pack("<Q", len(own)) + own + dimensions + struct.pack("<IQ", one.type.number, one.start))
    header = MAGIC + struct.pack("<IQQ", version, len(described), len(fields)) + b"".join(parts)
    header += bytes(next_aligned(len(header), alignment) - len(header))
    return header, [one._replace(start=one.start + len(header), stop=one.stop + len(header)) for one in described]
