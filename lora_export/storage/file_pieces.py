"""Pieces of a file that are read by their positions, without an opened file. Objects in a store are read ahead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.storage import block_copy
from lora_export.storage.store_file import CHUNK, Chunks
from lora_export.storage.store_path import StorePath

OF_PART_AHEAD = 1  # chunks, of each part of an object: threads have parts of their own
MOST_PARTS = 4  # that are read at a time
# Bytes of memory, of all threads: each reads of two files at a time, and has two chunks of each
OF_CHUNKS = 64 << 20
LEAST_CHUNK = 1 << 20  # bytes: the threads of many cores hide the latency of each other


def read_piece(source: Path, buffer: NDArray[Any], position: int) -> None:
    """Fill a buffer from a position of a file; of an object in a store, by one request of these bytes alone.

    Raises InputRefused where the file ends before.
    """
    if isinstance(source, StorePath):
        content = source.bucket.read(source.key, position, position + len(buffer))
        if len(content) < len(buffer):
            raise _shorter(source)
        buffer.data[:] = content
        return
    with source.open("rb") as file:
        block_copy.read(source, file.fileno(), buffer, position)


class PiecesAhead:
    """Reads parts of files, each piece by piece in its order. One thread at a time may use it."""

    def __init__(self) -> None:
        self._parts: dict[tuple[Path, int], Chunks] = {}  # by the ends of the parts, the last used is last

    def read(self, source: Path, buffer: NDArray[Any], position: int, until: int) -> None:
        """As `read_piece`. The next pieces are read, too, up to `until`: of an object, some of them are requested."""
        part = self._parts.pop((source, until), None)
        is_last = position + len(buffer) >= until
        if not isinstance(source, StorePath) or (part is None and is_last):
            read_piece(source, buffer, position)
            return
        if part is None or position < part.start:
            ahead = {"ahead": OF_PART_AHEAD, "kept": OF_PART_AHEAD + 1, "chunk": _chunk()}
            part = Chunks(source.bucket, source.key, position, until, **ahead)
        rest, place = buffer.data, position
        while rest:
            count = part.read_at(rest, place)
            if not count:
                raise _shorter(source)
            rest, place = rest[count:], place + count
        if not is_last:
            self._parts[source, until] = part
        while len(self._parts) > MOST_PARTS:
            del self._parts[next(iter(self._parts))]


def _chunk() -> int:
    return max(LEAST_CHUNK, min(CHUNK, OF_CHUNKS // (4 * block_copy.default_threads())))


def _shorter(source: Path) -> InputRefused:
    return InputRefused(f"{source} became shorter while it was being read")
