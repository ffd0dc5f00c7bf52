"""An ONNX file as what it says and what it weighs: the message without its large tensors, and where their bytes lie.

Protobuf reads and writes a graph whole. Here a graph is read past its weights: the *hollow* message is the same
graph in which every large tensor says that its data lies in a file, the graph's own, which ONNX can express (external
data). Going back, `pieces` cuts a message where such data is to be put in again.

The wire format is a sequence of fields, each a tag (number and kind) and a value; a message in a field is preceded
by its length. Field numbers are onnx.proto's.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from lora_export.errors import InputRefused

LARGE = 1024  # bytes of a tensor from which it is left in its file
VARINT, FIXED64, DELIMITED, FIXED32 = 0, 1, 2, 5
MOST_LEVELS = 100  # of messages in each other; protobuf's own limit

# Which fields of a message hold a message in which tensors may be.
MODEL, GRAPH, NODE, ATTRIBUTE, FUNCTION, TENSOR = "model", "graph", "node", "attribute", "function", "tensor"
WITHIN: Mapping[str, Mapping[int, str]] = {
    MODEL: {7: GRAPH, 25: FUNCTION},
    GRAPH: {1: NODE, 5: TENSOR},
    NODE: {5: ATTRIBUTE},
    ATTRIBUTE: {6: GRAPH, 11: GRAPH},  # a node's own tensors stay with it
    FUNCTION: {7: NODE, 11: ATTRIBUTE},
}
RAW_DATA, EXTERNAL_DATA, DATA_LOCATION = 9, 13, 14  # of a TensorProto
KEY, VALUE = 1, 2  # of an entry of external data
EXTERNAL = 1  # a DataLocation


class Extent(NamedTuple):
    """Bytes [start, stop) of a file."""

    start: int
    stop: int


# --- reading -------------------------------------------------------------------------------------


def hollow(path: Path, place: str) -> bytes:
    """The message in a file with its large tensors left where they are, as external data whose place is called `place`.

    Reads nothing of those tensors. Raises InputRefused where the file is no sequence of fields.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        return _hollow(_Reader(path, file, place), MODEL, size, 0)


class _Reader:
    """A file, read forwards, field by field."""

    def __init__(self, path: Path, file: BinaryIO, place: str = ""):
        self.path, self.file, self.place = path, file, place

    def damaged(self, what: str) -> InputRefused:
        return InputRefused(f"{self.path} is no ONNX file, or a damaged one: {what} at byte {self.file.tell():,}")

    def bytes(self, count: int) -> bytes:
        read = self.file.read(count)
        if len(read) != count:
            raise self.damaged("it ends in the middle of a field")
        return read

    def varint(self) -> int:
        value = shift = 0
        while True:
            (byte,) = self.bytes(1)
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise self.damaged("a number of more than ten bytes")

    def fields(self, stop: int) -> Iterator[tuple[int, int, int]]:
        """Number, kind, and length in bytes (of a varint: 0, it is not read yet) of every field up to a position."""
        while (place := self.file.tell()) < stop:
            tag = self.varint()
            number, kind = tag >> 3, tag & 7
            if kind == DELIMITED:
                length = self.varint()
            elif kind in (VARINT, FIXED64, FIXED32):
                length = {VARINT: 0, FIXED64: 8, FIXED32: 4}[kind]
            else:
                raise self.damaged("a field of an unknown kind")
            if not number or self.file.tell() + length > stop:
                raise self.damaged("a field that is longer than what it is part of")
            yield number, kind, length
        if place != stop:
            raise self.damaged("a field that is longer than what it is part of")


def _hollow(reader: _Reader, message: str, stop: int, level: int) -> bytes:
    if level > MOST_LEVELS:
        raise reader.damaged(f"more than {MOST_LEVELS} messages in each other")
    parts = []
    for number, kind, length in reader.fields(stop):
        inner = WITHIN.get(message, {}).get(number) if kind == DELIMITED and length >= LARGE else None
        end = reader.file.tell() + length
        if inner == TENSOR:
            parts.append(_field(number, _hollow_tensor(reader, end)))
        elif inner is not None:
            parts.append(_field(number, _hollow(reader, inner, end, level + 1)))
        else:
            parts.append(_copied(reader, number, kind, b"" if kind == VARINT else reader.bytes(length)))
    return b"".join(parts)


def _hollow_tensor(reader: _Reader, stop: int) -> bytes:
    parts, extent = [], None
    for number, kind, length in reader.fields(stop):
        if number == RAW_DATA and kind == DELIMITED and length >= LARGE:
            extent = Extent(reader.file.tell(), reader.file.tell() + length)  # of several, the last one holds
            reader.file.seek(extent.stop)
        else:
            parts.append(_copied(reader, number, kind, b"" if kind == VARINT else reader.bytes(length)))
    if extent is not None:
        where = {"location": reader.place, "offset": str(extent.start), "length": str(extent.stop - extent.start)}
        parts += [_field(EXTERNAL_DATA, _entry(key, value)) for key, value in where.items()]
        parts += [_varint(DATA_LOCATION << 3 | VARINT), _varint(EXTERNAL)]
    return b"".join(parts)


# --- writing -------------------------------------------------------------------------------------


def pieces(message: bytes, mark: str, sizes: Sequence[int]) -> list[bytes | int]:
    """A model's message, cut where tensors' data belongs: bytes, and numbers of tensors, whose bytes come there.

    A tensor whose external data lies in the place called `mark` becomes one with its data inside; the offset that it
    states is its number, and `sizes` are the bytes of each number's data.
    """
    reader = _Reader(Path("a message"), io.BytesIO(message))
    parts, _ = _filled(reader, MODEL, len(message), _Data(mark.encode(), sizes))
    joined: list[bytes | int] = []
    literal: list[bytes] = []
    for part in [*parts, -1]:
        if isinstance(part, bytes):
            literal.append(part)
        else:
            joined += [b"".join(literal), part]
            literal = []
    return joined[:-1]


class _Data(NamedTuple):
    mark: bytes
    sizes: Sequence[int]


def _filled(reader: _Reader, message: str, stop: int, data: _Data) -> tuple[list[bytes | int], int]:
    """The parts of a message, and its length once they are put together."""
    parts: list[bytes | int] = []
    total = 0
    for number, kind, length in reader.fields(stop):
        content = b"" if kind == VARINT else reader.bytes(length)
        inner = WITHIN.get(message, {}).get(number) if kind == DELIMITED and data.mark in content else None
        if inner is None:
            whole = _copied(reader, number, kind, content)
            parts.append(whole)
            total += len(whole)
            continue
        within = _Reader(reader.path, io.BytesIO(content))
        more, size = (_filled_tensor if inner == TENSOR else _filled)(within, inner, length, data)
        head = _varint(number << 3 | DELIMITED) + _varint(size)
        parts += [head, *more]
        total += len(head) + size
    return parts, total


def _filled_tensor(reader: _Reader, _: str, stop: int, data: _Data) -> tuple[list[bytes | int], int]:
    kept, entries = [], {}
    for number, kind, length in reader.fields(stop):
        content = b"" if kind == VARINT else reader.bytes(length)
        if number == EXTERNAL_DATA:
            key, value = _read_entry(content)
            entries[key] = value
        elif number == DATA_LOCATION:
            reader.varint()
        else:
            kept.append(_copied(reader, number, kind, content))
    number = int(entries[b"offset"])
    size = data.sizes[number]
    head = b"".join([*kept, _varint(RAW_DATA << 3 | DELIMITED), _varint(size)])
    return [head, number], len(head) + size


def _read_entry(content: bytes) -> tuple[bytes, bytes]:
    reader = _Reader(Path("an entry"), io.BytesIO(content))
    fields = {number: reader.bytes(length) for number, _, length in reader.fields(len(content))}
    return fields[KEY], fields[VALUE]


def _copied(reader: _Reader, number: int, kind: int, content: bytes) -> bytes:
    """A field as it was; a varint is still to be read."""
    if kind == VARINT:
        return _varint(number << 3 | kind) + _varint(reader.varint())
    return _field(number, content) if kind == DELIMITED else _varint(number << 3 | kind) + content


def _entry(key: str, value: str) -> bytes:
    return _field(KEY, key.encode()) + _field(VALUE, value.encode())


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | DELIMITED) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
