"""Writing graphs: one file or two, limits, and appended metadata."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from lora_export.errors import RuntimeRefused
from lora_export.graph.onnx_file import writing
from lora_export.graph.onnx_file.protobuf_wire import MAX_MESSAGE_BYTES
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.graph.onnx_file.writing import append_metadata, in_memory, save_graph
from support.graphs import a_graph, run, stored
from support.small_graphs import LINEAR, LINEAR_WEIGHT, graph_with_external_data


def test_small_graph_is_one_file(tmp_path: Path) -> None:
    model = load_graph(graph_with_external_data(tmp_path))
    out = tmp_path / "out"
    out.mkdir()
    assert save_graph(model, out, "model.onnx", metadata={"made_by": "a test"}) == [out / "model.onnx"]
    assert list(out.iterdir()) == [out / "model.onnx"]
    again = load_graph(out / "model.onnx")
    assert again.metadata_props["made_by"] == "a test"
    assert np.array_equal(run(again, x=np.float32([[1, 0, 0]]))["y"], [[(1 + 10) * 7, (4 + 20) * 8]])


@pytest.mark.fault(36, 39)
def test_large_weights_go_into_file_named_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "MAX_INLINE_BYTES", 100)
    monkeypatch.setattr(writing, "MIN_EXTERNAL_BYTES", 16)
    model = a_graph(LINEAR)
    model.graph.initializers["m.weight"].const_value = ir.Tensor(np.float32(LINEAR_WEIGHT).repeat(9, 1)[:, ::9])
    assert len(save_graph(model, tmp_path, "small.onnx")) == 1
    monkeypatch.setattr(writing, "MAX_INLINE_BYTES", 40)
    data, graph = save_graph(model, tmp_path, "model.onnx")
    assert graph == tmp_path / "model.onnx"
    assert re.fullmatch(r"model\.onnx\.[0-9a-f]{16}\.data", data.name)
    assert data.stat().st_size == 24
    assert np.array_equal(stored(load_graph(graph), "m.weight"), LINEAR_WEIGHT)
    assert save_graph(model, tmp_path, "model.onnx")[0] == data
    assert data.stat().st_size == 24  # nothing was appended
    model.graph.initializers["m.weight"].const_value = ir.Tensor(np.float32(LINEAR_WEIGHT) + 1)
    assert save_graph(model, tmp_path, "model.onnx")[0] != data


def test_weights_in_memory_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    class Weight(ir.Tensor[Any]):
        def tobytes(self) -> bytes:
            raise AssertionError("copied")

    monkeypatch.setattr(writing, "MIN_EXTERNAL_BYTES", 16)
    model, weight = a_graph(LINEAR), np.float32(LINEAR_WEIGHT)
    model.graph.initializers["m.weight"].const_value = Weight(weight, name="m.weight")
    message, weights = in_memory(model)
    assert weights["m.weight"] is weight and weight.tobytes() not in message


def test_weights_of_branches_run_in_memory(tmp_path: Path) -> None:
    values = ",".join(["2"] * 300)
    (path,) = save_graph(
        a_graph(f"""g (float[300] x, bool c) => (float[300] y) {{ y = If (c) <
            then_branch = t () => (float[300] a) <float[300] w = {{{values}}}> {{ a = Mul(x, w) }},
            else_branch = e () => (float[300] b) {{ b = Identity(x) }}> }}"""),
        tmp_path,
        "model.onnx",
    )
    message, _ = in_memory(load_graph(path))
    session = onnxruntime.InferenceSession(message, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": np.ones(300, np.float32), "c": np.array(True)})
    assert np.array_equal(y, np.full(300, 2))


def test_appended_metadata_changes_no_existing_bytes(tmp_path: Path) -> None:
    (path,) = save_graph(a_graph(LINEAR), tmp_path, "model.onnx", metadata={"made_by": "a test"})
    proven = path.read_bytes()
    append_metadata(path, {"verdict": "same"})
    assert path.read_bytes().startswith(proven)
    again = load_graph(path)
    assert dict(again.metadata_props) == {"made_by": "a test", "verdict": "same"}
    assert run(again, x=np.float32([[1, 0, 0]]))["y"].tolist() == [[(1 + 10) * 7, (4 + 20) * 8]]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map == {"made_by": "a test", "verdict": "same"}


def test_invalid_graph_is_refused(tmp_path: Path) -> None:
    model = a_graph(LINEAR)
    model.graph[0].op_type = "MadMul"
    with pytest.raises(RuntimeRefused, match=r"not valid ONNX: .*MadMul"):
        save_graph(model, tmp_path, "model.onnx")


@pytest.mark.fault(36)
@pytest.mark.parametrize("inline", [40, 1000], ids=["beside", "inside"])
def test_weights_leave_graph_before_serialisation(inline: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "MAX_INLINE_BYTES", inline)
    monkeypatch.setattr(writing, "MIN_EXTERNAL_BYTES", 16)
    serialised: list[int] = []
    serialise = ir.serde.serialize_model

    def watched(model: ir.Model) -> onnx.ModelProto:
        proto = serialise(model)
        serialised.append(max(len(tensor.raw_data) for tensor in proto.graph.initializer))
        return proto

    monkeypatch.setattr(ir.serde, "serialize_model", watched)
    model = a_graph(LINEAR)
    model.graph.initializers["m.weight"].const_value = ir.Tensor(np.float32(LINEAR_WEIGHT))
    model.graph.initializers["m.bias"].const_value = ir.Tensor(np.float32([5, 6, 7, 8, 9])[:2])
    files = save_graph(model, tmp_path, "model.onnx", metadata={"x": "y" * 40})
    assert len(files) == (2 if inline == 40 else 1)
    assert serialised and max(serialised) <= 16
    assert model.graph.initializers["m.weight"].const_value.numpy().tolist() == LINEAR_WEIGHT
    assert np.array_equal(stored(load_graph(files[-1]), "m.weight"), LINEAR_WEIGHT)


class _Short(ir.Tensor[Any]):
    """A tensor that writes too few bytes."""

    def tofile(self, file: BinaryIO) -> None:
        file.write(self.tobytes()[1:])


def test_tensor_of_too_few_bytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "MIN_EXTERNAL_BYTES", 16)
    model = a_graph(LINEAR)
    model.graph.initializers["m.weight"].const_value = _Short(np.float32(LINEAR_WEIGHT), name="m.weight")
    with pytest.raises(RuntimeRefused, match=r"m\.weight has 23 bytes, and the graph declares 24"):
        save_graph(model, tmp_path, "model.onnx")


@pytest.mark.fault(36)
def test_constants_above_limit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "MAX_MESSAGE_BYTES", 100)
    model = a_graph(LINEAR)
    value = ir.AttrTensor("value", ir.Tensor(np.zeros(25, np.float32)))
    model.graph.insert_before(model.graph[0], ir.Node("", "Constant", [], [value]))
    with pytest.raises(
        RuntimeRefused, match="hold 100 bytes of constants, which ONNX stores in the graph; a graph must have less"
    ):
        save_graph(model, tmp_path, "model.onnx")
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.fault(36)
def test_tensor_above_2_gib_is_saved_and_read(tmp_path: Path) -> None:
    rows = (MAX_MESSAGE_BYTES >> 12) + 1  # of 4 KiB
    model = a_graph(LINEAR)
    big = tmp_path / "zeros"
    with big.open("wb") as file:
        file.truncate(rows << 12)
    zeros = np.memmap(big, np.float32, "r+", shape=(rows, 1024))
    zeros[-1] = 3
    model.graph.initializers["m.weight"].const_value = ir.Tensor(zeros)
    model.graph.initializers["m.weight"].shape = ir.Shape(zeros.shape)
    data, graph = save_graph(model, tmp_path, "model.onnx")
    assert data.stat().st_size == rows << 12 and graph.stat().st_size < 1000
    assert np.array_equal(stored(load_graph(graph), "m.weight")[-1], np.full(1024, 3))
