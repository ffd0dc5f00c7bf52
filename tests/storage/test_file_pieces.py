"""Pieces of files and of objects: the bytes that are stored there, each requested once, some before they are needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lora_export.errors import InputRefused
from lora_export.storage import file_pieces
from lora_export.storage.file_pieces import PiecesAhead, read_piece
from lora_export.storage.object_store import Bucket
from lora_export.storage.store_path import StorePath
from support.stores import Stored

DATA = np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8)
PIECE, CHUNK = 30, 100  # bytes


@pytest.fixture
def requested(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The ranges of bytes that were requested of objects so far; chunks are small."""
    ranges, read = list[tuple[int, int]](), Bucket.read

    def recorded(bucket: Bucket, key: str, start: int, stop: int) -> memoryview:
        ranges.append((start, stop))
        return read(bucket, key, start, stop)

    monkeypatch.setattr(Bucket, "read", recorded)
    monkeypatch.setattr(file_pieces, "CHUNK", CHUNK)
    monkeypatch.setattr(file_pieces, "LEAST_CHUNK", 1)
    return ranges


@pytest.fixture
def path(stored: Stored, requested: list[tuple[int, int]], request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file on the disk, or an object."""
    if getattr(request, "param", "") == "disk":
        (tmp_path / "file").write_bytes(DATA.tobytes())
        return tmp_path / "file"
    stored.put("object", DATA.tobytes())
    return stored / "object"


def read(pieces: PiecesAhead, path: Path, start: int, until: int) -> None:
    buffer = np.zeros(min(PIECE, until - start), np.uint8)
    pieces.read(path, buffer, start, until)
    assert np.array_equal(buffer, DATA[start : start + len(buffer)])


@pytest.mark.parametrize("path", ["disk", "store"], indirect=True)
def test_parts_that_are_read_in_turn_have_the_bytes_of_the_file(path: Path, requested: list[tuple[int, int]]) -> None:
    pieces, ends = PiecesAhead(), range(200, 1000, 100)
    for step in range(0, 200, PIECE):
        for end in ends[: file_pieces.MOST_PARTS]:
            read(pieces, path, end - 200 + step, end)
    assert len(requested) == (2 * file_pieces.MOST_PARTS if isinstance(path, StorePath) else 0)
    for step in range(0, 200, PIECE):  # more than are kept
        for end in ends:
            read(pieces, path, end - 200 + step, end)


def test_each_byte_of_a_part_is_requested_once_and_some_ahead(path: Path, requested: list[tuple[int, int]]) -> None:
    pieces, (first, until) = PiecesAhead(), (50, 420)
    read(pieces, path, first, until)
    assert requested == [(50, 150)]
    for start in range(first + PIECE, until, PIECE):
        read(pieces, path, start, until)
        if start == first + PIECE:
            assert len(pieces._parts[path, until]._chunks) == 2
    assert sorted(requested) == [(50, 150), (150, 250), (250, 350), (350, 420)] and pieces._parts == {}


def test_a_piece_that_is_read_alone_is_one_request_of_its_size(path: Path, requested: list[tuple[int, int]]) -> None:
    read(PiecesAhead(), path, 150, 150 + PIECE)
    assert requested == [(150, 150 + PIECE)]
    with pytest.raises(InputRefused, match="object became shorter while it was being read"):
        read_piece(path, np.zeros(20, np.uint8), 990)


def test_a_piece_before_the_last_one_is_requested_again(path: Path, requested: list[tuple[int, int]]) -> None:
    pieces = PiecesAhead()
    for start in (550, 580, 0, 30):
        read(pieces, path, start, 900)
    assert (0, 100) in requested


@pytest.mark.usefixtures("requested")
def test_an_object_that_is_shorter_than_its_part_is_refused(path: Path) -> None:
    buffer, pieces = np.zeros(PIECE, np.uint8), PiecesAhead()
    pieces.read(path, buffer, 950, 1100)
    with pytest.raises(InputRefused, match="object became shorter while it was being read"):
        pieces.read(path, buffer, 980, 1100)
