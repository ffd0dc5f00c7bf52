"""Copying parts of files: literal bytes, copied tensors, and the hash of all of the source."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from lora_export.graph.merge.copy_parts import MergeRun, copy_parts
from lora_export.graph.merge.file_parts import FilePart, MovedTensor
from lora_export.storage import block_copy
from lora_export.storage.block_copy import RunningHashes
from lora_export.storage.hashes import file_hash
from lora_export.storage.safetensors_file import Entry
from lora_export.weights.apply_step import Backend
from lora_export.weights.tensor_blocks import OutputTensor

SOURCE = bytes(range(200)) * 3


def tensor(path: Path, start: int, stop: int) -> MovedTensor:
    entry = Entry("t", np.dtype(np.uint8), (stop - start,), start, stop)
    return MovedTensor(ir.Value(name="t"), path, OutputTensor(entry, None, "t", entry.dtype))


@pytest.mark.parametrize("block", [7, 1 << 20])
@pytest.mark.parametrize(
    "pieces",
    [
        [(10, 50), b"literal", (50, 90)],
        [(100, 120), (120, 140), b"", (400, 500)],
        [(300, 310), (20, 40), (300, 310)],  # out of order, and one tensor twice
        [b"only literal bytes"],
    ],
)
def test_parts_are_written_and_source_is_hashed_once(
    pieces: list[bytes | tuple[int, int]], block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_copy, "BLOCK", block)
    source = tmp_path / "source"
    source.write_bytes(SOURCE)
    parts: list[FilePart] = []
    expected = b""
    for piece in pieces:
        content = piece if isinstance(piece, bytes) else SOURCE[slice(*piece)]
        moved = None if isinstance(piece, bytes) else tensor(source, *piece)
        start = len(expected)
        expected += content
        parts.append(FilePart(start, len(expected), moved, piece if isinstance(piece, bytes) else b""))
    written: list[int] = []
    run = MergeRun("xxh3_128", written.append, Backend())
    hashes = RunningHashes("xxh3_128")
    with (tmp_path / "target").open("xb") as target:
        digest = copy_parts(source, target, parts, hashes, run)
    assert (tmp_path / "target").read_bytes() == expected
    assert digest == file_hash(source, "xxh3_128")
    assert hashes.target.hexdigest() == file_hash(tmp_path / "target", "xxh3_128")
    assert sum(written) == len(expected)
