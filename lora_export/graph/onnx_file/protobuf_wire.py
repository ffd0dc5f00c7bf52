"""The protobuf wire format of an ONNX file, read and written without its large tensors.

Protobuf itself reads and writes a graph as a whole. `without_large_tensors` reads the message past its weights: each
large tensor becomes external data in the graph's own file, which ONNX can express. `split_at_tensors` does the reverse:
it cuts a message where the data of such tensors belongs.

The wire format is a sequence of fields. Each field is a tag (number and kind) and a value. A nested message is preceded
by its length. The field numbers are those of onnx.proto. This is our own code because protobuf has no interface for
byte positions, and because its memory grows with the file.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from lora_export.errors import InputRefused
from lora_export.storage import input_files

MAX_MESSAGE_BYTES = 1 << 31  # protobuf neither writes nor reads longer messages
LARGE_TENSOR_BYTES = 1024  # data from this size on stays in the file
VARINT, DELIMITED = 0, 2  # kinds of fields
FIXED_BYTES: Mapping[int, int] = {1: 8, 5: 4}  # further kinds, whose values all have as many bytes
MAX_NESTING = 100  # messages in each other; protobuf's own limit

# The fields of each message that hold a message in which tensors may be.
MODEL, GRAPH, NODE, ATTRIBUTE, TENSOR = "model", "graph", "node", "attribute", "tensor"
NESTED_MESSAGES: Mapping[str, Mapping[int, str]] = {
    MODEL: {7: GRAPH},  # not its functions, whose initializers no graph of the model has
    GRAPH: {1: NODE, 5: TENSOR},
    NODE: {5: ATTRIBUTE},
    ATTRIBUTE: {6: GRAPH, 11: GRAPH},  # not the attribute's own tensors, which stay in it
}
RAW_DATA, EXTERNAL_DATA, DATA_LOCATION = 9, 13, 14  # fields of a TensorProto
ENTRY_KEY, ENTRY_VALUE = 1, 2  # fields of an entry of external data
EXTERNAL = 1  # a DataLocation


class Extent(NamedTuple):
    """Bytes [start, stop) of a file."""

    start: int
    stop: int


def unused_location() -> str:
    """The name of a file that no graph can contain."""
    return os.urandom(8).hex()


def refuse_no_message(path: Path) -> None:
    """Raise InputRefused for a file that is not regular, or too long for protobuf."""
    input_files.must_be_regular(path)
    size = path.stat().st_size
    if size >= MAX_MESSAGE_BYTES:
        raise InputRefused(
            f"{path} has {size:,} bytes. An ONNX graph must have less than {MAX_MESSAGE_BYTES:,}: save it "
            "with its weights in a file beside it (external data)"
        )


# --- reading -------------------------------------------------------------------------------------


def without_large_tensors(path: Path, location: str) -> bytes:
    """Read the message of a file, with its large tensors as external data at `location`.

    Their offsets are positions in this file. Reads none of their bytes. Raises InputRefused where the file is not a
    sequence of fields.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        return _without_large_tensors(_Reader(path, file, location), MODEL, size, 0)


class _Reader:
    """A file, read forwards, field by field."""

    def __init__(self, path: Path, file: BinaryIO, location: str = ""):
        self.path, self.file, self.location = path, file, location

    def damaged(self, problem: str) -> InputRefused:
        return InputRefused(f"{self.path} is no ONNX file, or a damaged one: {problem} at byte {self.file.tell():,}")

    def bytes(self, count: int) -> bytes:
        read = self.file.read(count)
        if len(read) != count:
            raise self.damaged("it ends in the middle of a field")
        return read

    def varint(self) -> int:
        value = shift = 0
        while True:
            (byte,) = self.file.read(1) or self.bytes(1)
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise self.damaged("a number of more than ten bytes")

    def fields(self, stop: int) -> Iterator[_Field]:
        """Every field up to a position, with the reader at its content. The caller may read from there, or not."""
        position = self.file.tell()
        while position < stop:
            tag = self.varint()
            number, kind = tag >> 3, tag & 7
            length = self.varint() if kind == DELIMITED else FIXED_BYTES.get(kind, 0)
            content = self.file.tell()
            if kind == VARINT:
                self.varint()
                length = self.file.tell() - content
            elif kind != DELIMITED and kind not in FIXED_BYTES:
                raise self.damaged("a field of an unknown kind")
            if not number or content + length > stop:
                raise self.damaged("a field that is longer than the message around it")
            yield _Field(number, kind, position, content, content + length)
            position = self.file.seek(content + length)


class _Field(NamedTuple):
    """A field of a message: its tag and, from `content` on, its value are bytes [start, stop) of the file."""

    number: int
    kind: int
    start: int
    content: int
    stop: int

    @property
    def is_large(self) -> bool:
        """Whether its value has the size of a large tensor."""
        return self.kind == DELIMITED and self.stop - self.content >= LARGE_TENSOR_BYTES


def _between(reader: _Reader, start: int, stop: int) -> bytes:
    reader.file.seek(start)
    return reader.bytes(stop - start)


def _without_large_tensors(reader: _Reader, message: str, stop: int, level: int) -> bytes:
    if level > MAX_NESTING:
        raise reader.damaged(f"more than {MAX_NESTING} messages in each other")
    parts, copied_to = [], reader.file.tell()
    for field in reader.fields(stop):
        inner = NESTED_MESSAGES.get(message, {}).get(field.number) if field.is_large else None
        if inner is None:
            continue
        before = _between(reader, copied_to, field.start)
        reader.file.seek(field.content)
        if inner == TENSOR:
            content = _tensor_without_data(reader, field.stop)
        else:
            content = _without_large_tensors(reader, inner, field.stop, level + 1)
        parts += [before, _field(field.number, content)]
        copied_to = field.stop
    return b"".join([*parts, _between(reader, copied_to, stop)])


def _tensor_without_data(reader: _Reader, stop: int) -> bytes:
    parts, copied_to, extent = [], reader.file.tell(), None
    for field in reader.fields(stop):
        if field.number == RAW_DATA and field.is_large:
            parts.append(_between(reader, copied_to, field.start))
            extent, copied_to = Extent(field.content, field.stop), field.stop  # of several, the last one is valid
    parts.append(_between(reader, copied_to, stop))
    if extent is not None:
        length = extent.stop - extent.start
        for key, value in (("location", reader.location), ("offset", extent.start), ("length", length)):
            entry = _field(ENTRY_KEY, key.encode()) + _field(ENTRY_VALUE, str(value).encode())
            parts.append(_field(EXTERNAL_DATA, entry))
        parts += [_varint(DATA_LOCATION << 3 | VARINT), _varint(EXTERNAL)]
    return b"".join(parts)


# --- writing -------------------------------------------------------------------------------------


def split_at_tensors(message: bytes, location: str, sizes: Sequence[int]) -> list[bytes | int]:
    """Cut a model's message where the data of tensors belongs: bytes, and numbers of tensors.

    A tensor whose external data is at `location` becomes one with its data inside. Its offset is its number, and
    `sizes` holds the bytes of each number's data.
    """
    reader = _Reader(Path("a message"), io.BytesIO(message))
    parts, _ = _split(reader, MODEL, len(message), _InlineData(message, location.encode(), sizes))
    joined: list[bytes | int] = []
    literal: list[bytes] = []
    for part in [*parts, -1]:
        if isinstance(part, bytes):
            literal.append(part)
        else:
            joined += [b"".join(literal), part]
            literal = []
    return joined[:-1]


class _InlineData(NamedTuple):
    """The tensors whose data becomes part of a message."""

    message: bytes
    location: bytes
    sizes: Sequence[int]

    def is_for(self, field: _Field) -> bool:
        """Whether data becomes part of this field of the message."""
        return field.kind == DELIMITED and self.message.find(self.location, field.content, field.stop) >= 0


def _split(reader: _Reader, message: str, stop: int, data: _InlineData) -> tuple[list[bytes | int], int]:
    """The parts of a message, and their total length with the data of tensors."""
    parts: list[bytes | int] = []
    total, copied_to = 0, reader.file.tell()
    for field in reader.fields(stop):
        inner = NESTED_MESSAGES.get(message, {}).get(field.number) if data.is_for(field) else None
        if inner is None:
            continue
        inner_parts, size = (_split_tensor if inner == TENSOR else _split)(reader, inner, field.stop, data)
        head = data.message[copied_to : field.start] + _varint(field.number << 3 | DELIMITED) + _varint(size)
        parts += [head, *inner_parts]
        total += len(head) + size
        copied_to = field.stop
    rest = data.message[copied_to:stop]
    return [*parts, rest], total + len(rest)


def _split_tensor(reader: _Reader, _: str, stop: int, data: _InlineData) -> tuple[list[bytes | int], int]:
    fields, entries = [], {}
    for field in reader.fields(stop):
        if field.number == EXTERNAL_DATA:
            reader.file.seek(field.content)
            entry = {one.number: data.message[one.content : one.stop] for one in reader.fields(field.stop)}
            entries[entry[ENTRY_KEY]] = entry[ENTRY_VALUE]
        elif field.number != DATA_LOCATION:
            fields.append(data.message[field.start : field.stop])
    number = int(entries[b"offset"])
    size = data.sizes[number]
    head = b"".join([*fields, _varint(RAW_DATA << 3 | DELIMITED), _varint(size)])
    return [head, number], len(head) + size


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | DELIMITED) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
