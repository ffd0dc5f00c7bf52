"""Copying parts of files: literal bytes, copied tensors, and the hash of all of the source."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from lora_export.graph.merge.copy_parts import FilePart, MergeRun, MovedTensor, copy_parts
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.storage import block_copy
from lora_export.storage.block_copy import RunningHashes
from lora_export.storage.hashes import file_hash
from lora_export.storage.safetensors_file import Entry
from lora_export.weights.tensor_blocks import OutputTensor
from support.graphs import stored
from support.handmade import graph_file
from support.merged_graphs import WEIGHTS, A, B, merge_into, saved_adapter

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
    reserved: list[int] = []
    monkeypatch.setattr(block_copy, "reserve", lambda _, count: reserved.append(count))
    run = MergeRun(file_name="m.onnx", progress=written.append)
    hashes = RunningHashes("xxh3_128")
    with (tmp_path / "target").open("xb") as target:
        digest = copy_parts(source, target, parts, hashes, run)
    assert (tmp_path / "target").read_bytes() == expected
    assert digest == file_hash(source, "xxh3_128")
    assert hashes.target.hexdigest() == file_hash(tmp_path / "target", "xxh3_128")
    assert sum(written) == len(expected) and reserved == [len(expected)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_copy, "BLOCK", 1000)


def test_tensors_keep_page_offsets_and_unused_bytes_go(tmp_path: Path) -> None:
    (tmp_path / "all.data").write_bytes(b"dead" * 2500)
    path = graph_file(tmp_path / "m.onnx", WEIGHTS, data="all.data")
    merge_into(path, tmp_path / "out", saved_adapter(tmp_path / "ad", "up"))
    places = [
        {name: value.const_value.offset % 4096 for name, value in load_graph(file).graph.initializers.items()}
        for file in (path, tmp_path / "out/m.onnx")
    ]
    assert places[0] == places[1] and len(set(places[0].values())) == 3
    (data,) = (tmp_path / "out").glob("*.data")
    assert data.stat().st_size == (tmp_path / "all.data").stat().st_size - 2 * 4096
    assert b"dead" not in data.read_bytes()


def test_bytes_between_two_copied_weights_are_removed(tmp_path: Path) -> None:
    path = graph_file(tmp_path / "m.onnx", WEIGHTS, data="all.data")
    model, data = onnx.load(path, load_external_data=False), tmp_path / "all.data"
    tensor = {tensor.name: tensor for tensor in model.graph.initializer}["kept.weight"]
    start = data.stat().st_size + 4096  # a page after `down.weight`, which is the last one
    data.write_bytes(data.read_bytes() + bytes(4096) + WEIGHTS["kept.weight"].tobytes())
    (entry,) = (entry for entry in tensor.external_data if entry.key == "offset")
    entry.value = str(start)
    path.write_bytes(model.SerializeToString())
    merge_into(path, tmp_path / "out", saved_adapter(tmp_path / "ad", "up"))
    after = load_graph(tmp_path / "out/m.onnx")
    assert np.array_equal(stored(after, "down.weight"), WEIGHTS["down.weight"])
    assert np.array_equal(stored(after, "kept.weight"), WEIGHTS["kept.weight"])


def test_initializers_in_unusual_order_are_found(tmp_path: Path) -> None:
    path = graph_file(tmp_path / "m.onnx", WEIGHTS)
    model = onnx.load(path)
    reordered = sorted(model.graph.initializer, key=lambda tensor: tensor.name)
    skeleton, inner = onnx.ModelProto(), onnx.GraphProto()
    skeleton.CopyFrom(model)
    skeleton.ClearField("graph")
    inner.CopyFrom(model.graph)
    inner.ClearField("initializer")
    inner.ClearField("node")
    # Initializers before the nodes that read them, and in two messages, which protobuf joins.
    first, second = (onnx.ModelProto(graph=onnx.GraphProto(initializer=[tensor])) for tensor in reordered[:2])
    rest = onnx.ModelProto(graph=onnx.GraphProto(initializer=reordered[2:], node=model.graph.node))
    inner_model = onnx.ModelProto(graph=inner)
    path.write_bytes(b"".join(part.SerializeToString() for part in (first, skeleton, second, inner_model, rest)))
    merge_into(path, tmp_path / "out", saved_adapter(tmp_path / "ad", "up"))
    after = load_graph(tmp_path / "out/m.onnx")
    assert np.array_equal(stored(after, "up.weight"), WEIGHTS["up.weight"] + (B @ A).T)
    assert np.array_equal(stored(after, "kept.weight"), WEIGHTS["kept.weight"])
    assert np.array_equal(stored(after, "down.weight"), WEIGHTS["down.weight"])
    record = json.loads(after.metadata_props["lora_export"])
    assert record["base"]["m.onnx"]["xxh3_128"] == file_hash(path, "xxh3_128")


def test_merged_graph_above_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = graph_file(tmp_path / "m.onnx", WEIGHTS)
    monkeypatch.setattr("lora_export.graph.merge.copy_parts.MAX_MESSAGE_BYTES", path.stat().st_size - 100)
    with pytest.raises(Exception, match="save the base graph with its weights in a file beside it"):
        merge_into(path, tmp_path / "out", saved_adapter(tmp_path / "ad", "up"))
