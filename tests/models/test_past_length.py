"""The past of a graph as a longer buffer: the length of what it contains is that of the mask minus that of the ids."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from lora_export.models.past_length import read_past_length_from_mask, takes_shared_buffer

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
