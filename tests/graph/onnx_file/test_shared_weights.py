"""Weights that graphs share on the disk: each further graph costs its change, and runs in stock onnxruntime."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from lora_export import provenance
from lora_export.artifacts.artifact import open_artifact
from lora_export.artifacts.files import GRAPH_FILES
from lora_export.errors import InputRefused
from lora_export.graph.onnx_file import shared_weights as module
from lora_export.graph.onnx_file.reading import open_graph
from lora_export.graph.onnx_file.shared_weights import SharedTensor, shared_weights
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.storage.hashes import file_hash
from support.graphs import a_graph, stored

SIZE = 64  # of the matrices; one has 16 KiB


def graph_of(seeds: dict[str, int], **other_names: str) -> ir.Model:
    """Three matrices in a row, each drawn by a seed."""
    text = f"g (float[N,{SIZE}] x) => (float[N,{SIZE}] y) {{ h = MatMul(x, a) k = MatMul(h, b) y = MatMul(k, c) }}"
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]> {text}')
    for number, (name, seed) in enumerate(seeds.items()):
        array = np.random.default_rng(seed).standard_normal((SIZE, SIZE)).astype(np.float32) / 8
        own = proto.graph.node[number].input[1] = other_names.get(name, name)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, own))
    return ir.from_proto(proto)


def write_base(folder: Path) -> Path:
    return save_graph(graph_of({"a": 1, "b": 2, "c": 3}), folder, "base.onnx", external_data=True)[-1]


def write_shared(folder: Path, model: ir.Model, name: str = "second.onnx", base: str = "base.onnx", **how: Any) -> Path:
    """Write a graph as an export does: in a stage that then is published."""
    stage = folder / "stage"
    stage.mkdir()
    with shared_weights(folder / base, folder / name, stage) as shared:
        save_graph(model, stage, name, shared=shared, **how)
    for path in stage.iterdir():
        path.rename(folder / path.name)
    stage.rmdir()
    return folder / name


def outputs(path: Path) -> Any:
    x = np.random.default_rng(9).standard_normal((5, SIZE)).astype(np.float32)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0], x


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize("external", [False, True], ids=["inside", "beside"])
@pytest.mark.parametrize("names", [{}, {"a": "val_7", "c": "val_9"}], ids=["same names", "other names"])
def test_second_graph_costs_its_change(tmp_path: Path, names: dict[str, str], external: bool) -> None:
    write_base(tmp_path)
    before, matrix = size_of(tmp_path), 4 * SIZE * SIZE
    model = graph_of({"a": 1, "b": 7, "c": 3}, **names)
    expected = [stored(model, names.get(name, name)) for name in "abc"]
    path = write_shared(tmp_path, model, external_data=external)
    assert matrix <= size_of(tmp_path) - before < matrix + 2000
    got, x = outputs(path)
    np.testing.assert_allclose(got, x @ expected[0] @ expected[1] @ expected[2], rtol=1e-4, atol=1e-5)
    again = open_graph(path).model
    assert all(np.array_equal(stored(again, names.get(n, n)), w) for n, w in zip("abc", expected, strict=True))
    assert not isinstance(model.graph.initializers["b"].const_value, ir.ExternalTensor)  # as it was


def test_graph_without_change_has_no_weights(tmp_path: Path) -> None:
    write_base(tmp_path)
    before = size_of(tmp_path)
    write_shared(tmp_path, graph_of({"a": 1, "b": 2, "c": 3}), external_data=True)
    assert size_of(tmp_path) - before < 2000 and len(list(tmp_path.glob("*.data"))) == 1


def test_shares_what_the_other_graph_shares(tmp_path: Path) -> None:
    write_base(tmp_path)
    write_shared(tmp_path, graph_of({"a": 1, "b": 7, "c": 3}), external_data=True)
    before = size_of(tmp_path)
    third = write_shared(tmp_path, graph_of({"a": 1, "b": 7, "c": 8}), "third.onnx", "second.onnx")
    assert size_of(tmp_path) - before < 4 * SIZE * SIZE + 2000
    record = json.loads({one.key: one.value for one in onnx.load(third, load_external_data=False).metadata_props}[KEY])
    assert record == {path.name: {"xxh3_128": file_hash(path, "xxh3_128")} for path in sorted(tmp_path.glob("*.data"))}
    got, x = outputs(third)
    weights = [stored(graph_of({"a": 1, "b": 7, "c": 8}), name) for name in "abc"]
    np.testing.assert_allclose(got, x @ weights[0] @ weights[1] @ weights[2], rtol=1e-4, atol=1e-5)


KEY = provenance.SHARED_KEY


def test_data_in_a_folder_below_is_shared(tmp_path: Path) -> None:
    write_base(tmp_path)
    (data,) = tmp_path.glob("*.data")
    (tmp_path / "sub").mkdir()
    data.rename(tmp_path / "sub" / "w.data")
    base = onnx.load(tmp_path / "base.onnx", load_external_data=False)
    for tensor in base.graph.initializer:
        next(entry for entry in tensor.external_data if entry.key == "location").value = "sub/w.data"
    (tmp_path / "base.onnx").write_bytes(base.SerializeToString())
    outputs(write_shared(tmp_path, graph_of({"a": 1, "b": 7, "c": 3})))
    assert {path.name for path in tmp_path.iterdir()} == {"base.onnx", "second.onnx", "sub"}


def test_dtype_and_shape_are_the_own_ones(tmp_path: Path) -> None:
    """Equal bytes are enough: here of a table of 32-bit integers."""
    write_base(tmp_path)
    bits = stored(graph_of({"a": 1, "b": 2, "c": 3}), "b").view(np.int32).reshape(-1)
    values = ",".join(map(str, bits))
    model = a_graph(f"g (int64[N] x) => (int32[N] y) <int32[{bits.size}] t = {{{values}}}> {{ y = Gather(t, x) }}")
    path = write_shared(tmp_path, model)
    assert path.stat().st_size < 2000
    got = onnxruntime.InferenceSession(path).run(None, {"x": np.arange(bits.size)})[0]
    assert np.array_equal(got, bits)


def inside(folder: Path) -> Path:
    return save_graph(graph_of({"a": 1, "b": 2, "c": 3}), folder, "base.onnx")[-1]


def elsewhere(folder: Path) -> Path:
    write_base(folder)
    (folder / "other").mkdir()
    for path in list(folder.iterdir()):
        if path.is_file():
            path.rename(folder / "other" / path.name)
    return folder / "other" / "base.onnx"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (inside, r"base\.onnx has its weights inside, .* Write base\.onnx again with external_data"),
        (elsewhere, r"share_with=.*base\.onnx. is not in the folder of the output, .*: onnxruntime reads no weights"),
    ],
)
def test_what_onnxruntime_would_not_read_is_refused(tmp_path: Path, make: Any, message: str) -> None:
    base, stage = make(tmp_path), tmp_path / "stage"
    stage.mkdir()
    with pytest.raises(InputRefused, match=message), shared_weights(base, tmp_path / "out.onnx", stage):
        pass
    assert not list(stage.iterdir())


def test_base_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    base, stage = write_base(tmp_path), tmp_path / "stage"
    stage.mkdir()
    (data,) = tmp_path.glob("*.data")
    with (
        pytest.raises(InputRefused, match=r"\.data changed while it was being read"),
        shared_weights(base, tmp_path / "out.onnx", stage),
    ):
        data.write_bytes(data.read_bytes() + b"\0")
    assert not list(stage.iterdir())


def test_missing_file_is_one_line(tmp_path: Path) -> None:
    write_base(tmp_path)
    path = write_shared(tmp_path, graph_of({"a": 1, "b": 7, "c": 3}))
    (data,) = tmp_path.glob("*.data")
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.move(data, moved)
    with pytest.raises(InputRefused, match=rf"shares the weights in {data.name} with another graph, and this") as found:
        open_graph(path)
    assert "\n" not in str(found.value)


def test_change_below_a_folder_of_graphs_is_found(tmp_path: Path) -> None:
    write_base(tmp_path)
    for name in GRAPH_FILES:
        write_shared(tmp_path, graph_of({"a": 1, "b": 7, "c": 3}), name)
    artifact = open_artifact(tmp_path)
    artifact.refuse_changed_weights()
    (data,) = tmp_path.glob("base*.data")
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    with pytest.raises(InputRefused, match="with another graph, and this file has changed"):
        artifact.refuse_changed_weights()


@pytest.mark.parametrize(
    "record",
    ["[]", '{"../x.data": {"xxh3_128": "0"}}', '{"/x": {"xxh3_128": "0"}}', '{"x": 1}', '{"x": {"md5": "0"}}', "{"],
)
def test_damaged_record_is_refused(tmp_path: Path, record: str) -> None:
    (path,) = save_graph(graph_of({"a": 1, "b": 2, "c": 3}), tmp_path, "m.onnx")
    written = onnx.load(path)
    onnx.helper.set_model_props(written, {KEY: record})
    path.write_bytes(written.SerializeToString())
    with pytest.raises(InputRefused, match=r"lora_export\.shared_weights in .*m\.onnx"):
        open_graph(path)


def test_copy_shares_blocks_where_the_file_system_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that shares the first two blocks; the rest is copied."""
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 40)

    def share(read_fd: int, write_fd: int, start: int, target: int, count: int) -> range:
        assert (start, target, count) == (0, 0, 10240)
        module.os.pwrite(write_fd, source.read_bytes()[:8192], 0)
        return range(8192)

    monkeypatch.setattr(module.block_copy, "share", share)
    module._copy(source, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == source.read_bytes()


def test_unequal_weights_are_written(tmp_path: Path) -> None:
    write_base(tmp_path)
    model = graph_of({"a": 4, "b": 5, "c": 6})
    path = write_shared(tmp_path, model)
    assert path.stat().st_size > 3 * 4 * SIZE * SIZE
    assert not any(isinstance(value.const_value, SharedTensor) for value in model.graph.initializers.values())
    assert KEY not in open_graph(path).model.metadata_props
