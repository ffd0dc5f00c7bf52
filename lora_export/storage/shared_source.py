"""The bytes of a source of which several copies are made at the same time: each is read once.

The copies' blocks may be cut in different places. A piece is what a block needs and no earlier one has read. It stays
until all copies have passed it: no more of the source is in memory than a few blocks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.storage.hashes import Hash

_Bytes = NDArray[np.uint8]


class SourcePiece:
    """Bytes [start, stop) of the source, read by the first thread that needs them."""

    def __init__(self, start: int, stop: int, buffer: _Bytes, *, is_hashed: bool):
        self.start, self.stop, self.buffer = start, stop, buffer
        self.users = 0  # blocks that are not in their targets yet
        self._has_hash = not is_hashed
        self._lock, self._is_read, self._error = threading.Lock(), False, list[Exception]()

    def bytes(self, start: int, stop: int) -> _Bytes:
        """Those of its bytes that are in [start, stop) of the source."""
        return self.buffer[max(start, self.start) - self.start : min(stop, self.stop) - self.start]

    def read(self, read: Callable[[_Bytes, int], None]) -> None:
        """Read the bytes, unless they are there. What fails fails for all: the hash of the source needs every byte."""
        with self._lock:
            if self._error:
                raise self._error[0]
            if self._is_read:
                return
            try:
                read(self.bytes(self.start, self.stop), self.start)
            except Exception as error:
                self._error.append(error)
                raise
            self._is_read = True

    def add_to(self, source: Hash) -> None:
        """Take the bytes into the hash of the source, once."""
        if self._is_read and not self._has_hash:
            source.update(self.bytes(self.start, self.stop))
            self._has_hash = True


class SharedSource:
    """The pieces that copies may still need."""

    def __init__(self, buffers: list[_Bytes], new_buffer: Callable[[], _Bytes], *, is_shared: bool):
        self._free, self._new_buffer, self._is_shared = buffers, new_buffer, is_shared
        self._pieces: list[SourcePiece] = []  # in the order of the source
        self._read_to = 0

    def pieces_of(self, start: int, stop: int, *, repeated: bool) -> list[SourcePiece]:
        """The pieces with these bytes. `repeated` ones were passed already: they are read again, and not hashed."""
        is_apart = repeated or not self._is_shared
        found = [] if is_apart else [one for one in self._pieces if one.start < stop and start < one.stop]
        first = start if is_apart else max(start, self._read_to)
        if first < stop:
            buffer = self._free.pop() if self._free else self._new_buffer()
            found.append(SourcePiece(first, stop, buffer, is_hashed=not repeated))
            if not is_apart:
                self._pieces.append(found[-1])
                self._read_to = stop
        for one in found:
            one.users += 1
        return found

    def forget_before(self, position: int) -> None:
        """Let go of the pieces that all copies have passed."""
        past = [one for one in self._pieces if one.stop <= position]
        self._pieces = self._pieces[len(past) :]
        self._reuse(past)

    def release(self, pieces: Sequence[SourcePiece]) -> None:
        """A block of these pieces is in its target."""
        for one in pieces:
            one.users -= 1
        self._reuse(one for one in pieces if one not in self._pieces)

    def _reuse(self, pieces: Iterable[SourcePiece]) -> None:
        self._free += [one.buffer for one in pieces if not one.users]


def joined_pieces(pieces: Sequence[SourcePiece], start: int, stop: int) -> _Bytes:
    """Bytes [start, stop) of the source: where one piece has all of them, they are not copied."""
    parts: list[Any] = [one.bytes(start, stop) for one in pieces]
    return parts[0] if len(parts) == 1 else np.concatenate([*parts, np.empty(0, np.uint8)])
