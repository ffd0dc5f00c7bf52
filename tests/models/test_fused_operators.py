"""Onnxruntime's own operators in a decoder's graph: the same values, for batches with padding too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from lora_export.errors import RuntimeRefused
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.models.fused_operators import fuse_operators, read_past_length_from_mask, takes_shared_buffer
from lora_export.runtime.kv_cache import CacheRunner, with_cache
from lora_export.runtime.onnx_runner import OnnxRunner
from support.generators import assert_same_logits, exported_decoder


def operators(graph: ir.Model) -> set[str]:
    return {node.op_type for node in graph.graph}


@pytest.mark.parametrize("provider", ["cpu", pytest.param("cuda", marks=pytest.mark.slow)])
def test_fused_graph_computes_the_same_in_batches_with_padding(provider: str, tmp_path: Path) -> None:
    module, graph = exported_decoder("llama")
    declared = [value.shape for value in (*graph.graph.inputs, *graph.graph.outputs)]
    assert "GroupQueryAttention" not in operators(graph)
    fuse_operators(graph, provider)
    assert {"RotaryEmbedding", "SkipSimplifiedLayerNormalization"} <= operators(graph)
    assert ("GroupQueryAttention" in operators(graph)) == (provider == "cpu")  # CUDA has it in half precision only
    assert takes_shared_buffer(graph) == (provider == "cpu")
    assert [value.shape for value in (*graph.graph.inputs, *graph.graph.outputs)] == declared
    *_, path = save_graph(graph, tmp_path, "model.onnx")
    runner = with_cache(OnnxRunner(path))
    assert isinstance(runner, CacheRunner)
    assert runner.takes_padding  # its mask is a bias of the attention, which knows where the padding is
    assert_same_logits(runner, module)


def test_optional_inputs_are_no_constants() -> None:
    rank = ir.SymbolicDim("rank")
    x, b = (
        ir.Value(name=name, shape=ir.Shape([2, size]), type=ir.TensorType(ir.DataType.FLOAT))
        for name, size in (("x", 2), ("b", rank))
    )
    b.const_value = ir.tensor(np.zeros((2, 0), np.float32), name="b")
    product = ir.node("MatMul", [x, b])
    graph = ir.Graph([x, b], product.outputs, nodes=[product], initializers=[b], opset_imports={"": 20})
    model = ir.Model(graph, ir_version=10)
    fuse_operators(model, "cpu")
    assert [node.op_type for node in model.graph] == ["MatMul"]
    assert model.graph.initializers["b"].const_value is not None
    assert b in model.graph.inputs


@pytest.mark.parametrize("number", [1e-8, 1 + 2.0**-17])
def test_numbers_that_are_nearly_zero_or_one_stay(number: float) -> None:
    shape, dtype = ir.Shape([2]), ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", shape=shape, type=dtype)
    c = ir.Value(name="c", shape=ir.Shape([]), type=dtype, const_value=ir.tensor(np.float32(number), name="c"))
    node = ir.node("Add" if number < 1 else "Mul", [x, c])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[c], opset_imports={"": 20})
    model = ir.Model(graph, ir_version=10)
    fuse_operators(model, "cpu")
    assert [each.op_type for each in model.graph] == [node.op_type]
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert model.graph.initializers["c"].const_value is not None


def test_failure_of_a_rewrite_tells_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: object) -> None:
        raise ValueError("no such axis")

    monkeypatch.setattr("transformers.exporters.onnxruntime_fusions._STEPS", ((fails, None),))
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 20}), ir_version=10)
    with pytest.raises(RuntimeRefused, match="cannot be fused for cpu: no such axis") as refused:
        fuse_operators(model, "cpu")
    assert "Without fuse=" in str(refused.value)


def test_attention_without_a_bias_is_known_to_count_the_mask(tmp_path: Path) -> None:
    _, graph = exported_decoder("llama")
    fuse_operators(graph, "cpu")
    for node in graph.graph:
        if node.op_type == "GroupQueryAttention":
            node.replace_input_with(10, None)
    *_, path = save_graph(graph, tmp_path, "model.onnx")
    runner = with_cache(OnnxRunner(path))
    assert isinstance(runner, CacheRunner)
    assert not runner.takes_padding
    assert "its GroupQueryAttention takes no padding within a sequence: none was tried" in runner.notes


CACHE = ("past_key_values.0.key", "past_key_values.0.value")
# One head of 8 features. The lengths are read as transformers' rewrites do: from the past and the ids.
ATTENTION = """
<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
attention (int64[b, s] input_ids, int64[b, t] attention_mask, float[b, s, 8] x, float[b, 1, p, 8] past_key,
           float[b, 1, p, 8] past_value) => (float[b, s, 8] y, float[b, 1, q, 8] present_key,
           float[b, 1, q, 8] present_value)
<int64[1] one = {1}> {
  batch = Shape <start = 0, end = 1> (past_key)
  length = Shape <start = 2, end = 3> (past_value)
  new = Shape <start = 1, end = 2> (input_ids)
  sum = Add (length, new)
  last = Sub (sum, one)
  each = Expand (last, batch)
  lengths = Cast <to = 6> (each)
  all = Squeeze (sum)
  total = Cast <to = 6> (all)
  y, present_key, present_value = com.microsoft.GroupQueryAttention <num_heads = 1, kv_num_heads = 1>
    (x, x, x, past_key, past_value, lengths, total)
}
"""


def parsed(text: str = ATTENTION) -> ir.Model:
    model = onnx.parser.parse_model(text)
    called = dict(zip(("past_key", "past_value"), CACHE, strict=True))
    for node in model.graph.node:
        node.input[:] = [called.get(name, name) for name in node.input]
    for value in model.graph.input:
        value.name = called.get(value.name, value.name)
    return ir.from_proto(model)


def run(model: ir.Model, past: np.ndarray) -> list[np.ndarray]:
    """One token behind 5 others, whose keys and values are at the begin of `past`."""
    rng = np.random.default_rng(1)
    feeds = {
        "input_ids": np.ones((2, 1), np.int64),
        "attention_mask": np.ones((2, 6), np.int64),
        "x": rng.standard_normal((2, 1, 8)).astype(np.float32),
        **dict.fromkeys(CACHE, past),
    }
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(None, {name.name: feeds[name.name] for name in session.get_inputs()})
    return found


def test_a_longer_buffer_gives_what_its_content_gives() -> None:
    past = np.random.default_rng(0).standard_normal((2, 1, 5, 8)).astype(np.float32)
    buffer = np.concatenate([past, np.full((2, 1, 4, 8), 9, np.float32)], axis=2)
    right, key, value = run(parsed(), past)
    assert not takes_shared_buffer(parsed())
    assert not np.allclose(run(parsed(), buffer)[0], right)
    model = parsed()
    read_past_length_from_mask(model)
    assert takes_shared_buffer(model)
    for given in (past, buffer):
        found, new_key, new_value = run(model, given)
        np.testing.assert_array_equal(found, right)
        np.testing.assert_array_equal(new_key[:, :, :6], key)
        np.testing.assert_array_equal(new_value[:, :, :6], value)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("all = Squeeze (sum)", "all = Squeeze (sum)\n  kept = Identity (past_key)"),  # another reader of the past
        ("total = Cast", "ignored = Shape (past_key)\n  total = Cast"),  # all sizes at once, the length among them
        ("total = Cast", "ignored = Shape <end = -1> (past_key)\n  total = Cast"),
        ("(x, x, x, past_key, past_value, lengths, total)\n", "(x, x, x, past_key, past_value, lengths, total)\n"
         "  rest = Identity (present_key)\n"),
        ("int64[b, t] attention_mask", "int64[b, t] other"),
    ],
)  # fmt: skip
def test_other_graphs_stay_as_they_are(old: str, new: str) -> None:
    assert old in ATTENTION
    model = parsed(ATTENTION.replace(old, new))
    before = [node.op_type for node in model.graph]
    read_past_length_from_mask(model)
    assert [node.op_type for node in model.graph] == before
    assert not takes_shared_buffer(model)


def test_graph_without_a_cache_takes_no_buffer() -> None:
    x = ir.Value(name="x", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Relu", [x])
    model = ir.Model(ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 20}), ir_version=10)
    read_past_length_from_mask(model)
    assert not takes_shared_buffer(model)
