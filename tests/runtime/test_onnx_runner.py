"""Graphs under onnxruntime: what they compute, where it ran, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from lora_export.errors import EnvironmentLacking, RuntimeRefused
from lora_export.isolation.limits import MIB, memory_for
from lora_export.runtime.onnx_runner import OnnxRunner, token_positions
from lora_export.runtime.ort_session import InMemoryGraph

A_MATMUL = """
<ir_version: 8, opset_import: ["" : 17]>
twice (float[batch, 2] x) => (float[batch, 2] y) <float[2, 2] w = {2.0, 0.0, 0.0, 2.0}> { [product] y = MatMul (x, w) }
"""


@pytest.fixture
def a_graph(tmp_path: Path) -> Path:
    path = tmp_path / "twice.onnx"
    onnx.save(onnx.parser.parse_model(A_MATMUL), path)
    return path


def test_graph_runs_and_its_placement_is_recorded(a_graph: Path) -> None:
    runner = OnnxRunner(a_graph, "cpu")
    for value in (np.array([[1, 2]], np.float32), [[1.0, 2.0]]):  # onnxruntime takes lists, too
        assert runner.run({"x": value})["y"].tolist() == [[2, 4]]
    assert runner.axes == {"x": (None, 2)}
    assert runner.placement.by_provider == {"CPUExecutionProvider": (("product", "MatMul"),)}
    assert runner.placement.compute_nodes == 1
    runner.placement.require_provider()


def test_missing_cuda_never_falls_back_to_the_cpu(a_graph: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: the refusal cannot be seen here")
    with pytest.raises(EnvironmentLacking, match="CUDAExecutionProvider"):
        OnnxRunner(a_graph, "cuda")


def test_inputs_that_the_graph_lacks_are_named(a_graph: Path) -> None:
    runner = OnnxRunner(a_graph)
    with pytest.raises(RuntimeRefused, match="the candidate has no input mask"):
        runner.run({"x": np.zeros((1, 2), np.float32), "mask": np.zeros(1)})
    with pytest.raises(RuntimeRefused, match="the candidate needs x"):
        runner.run({})


def test_positions_are_counted_where_the_inputs_have_none(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (int64[batch, length] input_ids, int64[batch, length] position_ids) => (int64[batch, length] y)
    { y = Add (input_ids, position_ids) }
    """
    onnx.save(onnx.parser.parse_model(text), tmp_path / "positions.onnx")
    runner = OnnxRunner(tmp_path / "positions.onnx")
    ids = np.array([[10, 10, 10], [20, 20, 20]])
    assert runner.run({"input_ids": ids})["y"].tolist() == [[10, 11, 12], [20, 21, 22]]
    assert runner.run({"input_ids": ids, "position_ids": ids})["y"].tolist() == (2 * ids).tolist()
    with pytest.raises(RuntimeRefused, match="the candidate needs position_ids"):
        OnnxRunner(tmp_path / "positions.onnx").run({})
    with pytest.raises(RuntimeRefused, match="the candidate needs position_ids"):
        runner.run({"input_ids": ids, "past_key_values.0.key": np.zeros((2, 1, 4, 8), np.float32)})


def test_file_without_a_graph_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "noise.onnx"
    path.write_bytes(b"this is no graph")
    with pytest.raises(RuntimeRefused, match="onnxruntime refused"):
        OnnxRunner(path)


def test_wrong_input_shape_is_refused(a_graph: Path) -> None:
    with pytest.raises(RuntimeRefused, match="onnxruntime"):
        OnnxRunner(a_graph).run({"x": np.zeros((1, 3), np.float32)})


def test_tensors_beside_an_in_memory_graph_are_used() -> None:
    model = onnx.parser.parse_model(A_MATMUL)
    (weight,) = model.graph.initializer
    weight.ClearField("float_data")
    weight.raw_data = b""
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="nowhere")
    tripled = np.array([[3, 0], [0, 3]], np.float32)
    runner = OnnxRunner(InMemoryGraph("tripled", model.SerializeToString(), {"w": tripled}))
    assert runner.run({"x": np.array([[1, 2]], np.float32)})["y"].tolist() == [[3, 6]]


def test_external_data_of_another_graph_is_read_from_its_folder(a_graph: Path, tmp_path: Path) -> None:
    model = onnx.parser.parse_model(A_MATMUL)
    (weight,) = model.graph.initializer
    weight.CopyFrom(onnx.numpy_helper.from_array(np.array([[5, 0], [0, 5]], np.float32), "w"))
    (tmp_path / "weights").mkdir()
    onnx.save(model, tmp_path / "weights" / "five.onnx", save_as_external_data=True, location="data", size_threshold=0)
    message = onnx.load(tmp_path / "weights" / "five.onnx", load_external_data=False).SerializeToString()
    runner = OnnxRunner(a_graph).with_graph(message, tmp_path / "weights")
    assert runner.run({"x": np.array([[1, 2]], np.float32)})["y"].tolist() == [[5, 10]]
    assert runner.path == a_graph


@pytest.mark.parametrize(("name", "inside"), [("data", 0), ("d" * 127, 0), ("d" * 200, 0), ("data", 65 * MIB)])
def test_a_graph_may_take_memory_for_all_its_weights(name: str, inside: int, tmp_path: Path) -> None:
    model = onnx.parser.parse_model(A_MATMUL)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(inside, np.int8), "more"))
    (weight,) = model.graph.initializer[:1]
    weight.CopyFrom(onnx.numpy_helper.from_array(np.eye(2, dtype=np.float32), "w"))
    (tmp_path / name).write_bytes(weight.raw_data + bytes(1000))
    onnx.external_data_helper.set_external_data(weight, location=name, length=16)
    weight.ClearField("raw_data")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    own = (tmp_path / "m.onnx").stat().st_size
    assert OnnxRunner(tmp_path / "m.onnx")._memory == memory_for(own + 1016)


def test_executed_nodes_are_those_after_fusion(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[2, 2] x) => (float[2, 2] y) <float[2, 2] w = {1.0, 2.0, 3.0, 4.0}, float[2] b = {5.0, 6.0}>
    { [product] h = MatMul (x, w) [sum] y = Add (h, b) }
    """
    onnx.save(onnx.parser.parse_model(text), tmp_path / "g.onnx")
    runner, x = OnnxRunner(tmp_path / "g.onnx"), np.eye(2, dtype=np.float32)
    fused = runner.executed_nodes(lambda other: other.run({"x": x}))
    assert [operator for _, operator in fused] == ["Gemm"]
    plain = runner.unoptimised()
    assert plain.placement.by_provider["CPUExecutionProvider"] == (("product", "MatMul"), ("sum", "Add"))
    assert plain.run({"x": x})["y"].tolist() == runner.run({"x": x})["y"].tolist()


ENDLESS = """
<ir_version: 8, opset_import: ["" : 17]>
endless (float[batch, 2] x) => (float[batch, 2] y) {
    most = Constant <value_int: int = 9223372036854775807> ()
    true = Constant <value: tensor = bool {1}> ()
    y = Loop <body: graph = once (int64 i, bool go, float[batch, 2] before) => (bool again, float[batch, 2] after) {
        again = Identity (go)
        after = Neg (before)
    }> (most, true, x)
}
"""


def test_loop_without_end_is_stopped_and_the_next_run_is_not(tmp_path: Path, a_graph: Path) -> None:
    onnx.save(onnx.parser.parse_model(ENDLESS), tmp_path / "endless.onnx")
    runner = OnnxRunner(tmp_path / "endless.onnx", timeout=0.3)
    for _ in range(2):
        with pytest.raises(RuntimeRefused, match=r"endless\.onnx did not finish within 0\.3 seconds.*timeout="):
            runner.run({"x": np.ones((1, 2), np.float32)})
    quick = OnnxRunner(a_graph, timeout=30)
    assert quick.run({"x": np.ones((1, 2), np.float32)})["y"].tolist() == [[2, 2]]
    assert quick.unoptimised().timeout == 30


def test_closed_graph_is_opened_again_by_the_next_run(a_graph: Path) -> None:
    runner = OnnxRunner(a_graph)
    other = copy.copy(runner)
    inputs = {
        name: np.ones([2 if size is None else size for size in sizes], np.float32)
        for name, sizes in runner.axes.items()
    }
    before, session = runner.run(inputs), runner.session
    assert runner.session is session
    runner.close()
    after = other.run(inputs)
    assert other.session is not session
    assert other.session is runner.session
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], value) for name, value in after.items())


MASK = np.array([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 0, 0]])


def test_only_the_ones_of_the_mask_count() -> None:
    assert token_positions(MASK).tolist() == [[0, 1, 2, 3], [0, 0, 1, 2], [0, 1, 1, 1]]
