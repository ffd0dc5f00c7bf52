"""The protobuf wire format: messages without their large tensors, and with them again."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from lora_export.errors import InputRefused
from lora_export.graph.onnx_file import protobuf_wire
from lora_export.graph.onnx_file.protobuf_wire import LARGE_TENSOR_BYTES, split_at_tensors, without_large_tensors

SIZES = st.lists(st.sampled_from([1, 255, 256, 300, 4000]), max_size=4)  # floats: 1024 bytes are LARGE_TENSOR_BYTES


def a_graph(name: str, sizes: list[int], *inner: onnx.GraphProto) -> onnx.GraphProto:
    tensors = [
        numpy_helper.from_array(np.arange(size, dtype=np.float32), f"{name}{number}")
        for number, size in enumerate(sizes)
    ]
    nodes = [helper.make_node("Relu", [f"{name}0"], ["r"], doc_string="of no use" * 200)]
    nodes += [helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body) for body in inner]
    return helper.make_graph(nodes, name, [], [], tensors)


def numbered(message: bytes, place: str) -> tuple[bytes, list[tuple[int, int]]]:
    """The message with the numbers of external tensors as their offsets, and the former offsets and lengths."""
    model = onnx.ModelProto.FromString(message)
    found = []
    graphs = [model.graph]
    for graph in graphs:
        graphs += [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
        found += [tensor for tensor in graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    message = []
    for number, tensor in enumerate(found):
        fields = {entry.key: entry for entry in tensor.external_data}
        assert fields["location"].value == place
        message.append((int(fields["offset"].value), int(fields["length"].value)))
        fields["offset"].value = str(number)
    return model.SerializeToString(), message


@settings(max_examples=60, deadline=None)
@given(outer=SIZES, inner=SIZES, innermost=SIZES)
def test_graph_is_split_and_joined_again(
    tmp_path_factory: pytest.TempPathFactory, outer: list[int], inner: list[int], innermost: list[int]
) -> None:
    path = tmp_path_factory.mktemp("wire") / "m.onnx"
    model = helper.make_model(a_graph("a", outer, a_graph("b", inner, a_graph("c", innermost))))
    data = model.SerializeToString()
    path.write_bytes(data)
    hollow = without_large_tensors(path, "here")
    message, extents = numbered(hollow, "here")
    # Both branches of an If hold the inner graphs.
    large = [4 * size for size in (*outer, *inner * 2, *innermost * 4) if 4 * size >= LARGE_TENSOR_BYTES]
    assert sorted(length for _, length in extents) == sorted(large)
    assert len(hollow) <= len(data) - sum(large) + 100 * len(large)
    parts = split_at_tensors(message, "here", [length for _, length in extents])
    whole = b"".join(part if isinstance(part, bytes) else data[extents[part][0] : sum(extents[part])] for part in parts)
    assert onnx.ModelProto.FromString(whole) == model
    assert all(isinstance(one, bytes) != isinstance(other, bytes) for one, other in itertools.pairwise(parts))


def test_message_without_weights_is_one_piece() -> None:
    message = helper.make_model(a_graph("a", [1])).SerializeToString()
    assert split_at_tensors(message, "nowhere", []) == [message]


def test_weights_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(helper.make_model(a_graph("a", [1 << 20])).SerializeToString())
    longest = []
    read = protobuf_wire._Reader.bytes
    monkeypatch.setattr(protobuf_wire._Reader, "bytes", lambda self, count: longest.append(count) or read(self, count))
    without_large_tensors(path, "here")
    assert max(longest) < 10_000


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"\x3a\x05abc", "longer than the message around it"),
        (b"\x3b", "a field of an unknown kind"),
        (b"\x08" + b"\xff" * 11, "a number of more than ten bytes"),
        (b"\x08", "ends in the middle of a field"),
        (b"\x02\x00", "longer than the message around it"),  # the field with the number 0
    ],
)
def test_invalid_message_is_refused(tmp_path: Path, data: bytes, problem: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    with pytest.raises(InputRefused, match=rf"m.onnx is no ONNX file, or a damaged one: .*{problem} at byte"):
        without_large_tensors(path, "here")


def test_deeply_nested_messages_are_refused(tmp_path: Path) -> None:
    message = bytes(LARGE_TENSOR_BYTES)  # the parser does not reach its content
    for level in range(3 * protobuf_wire.MAX_NESTING):
        message = protobuf_wire._field((6, 5, 1)[level % 3], message)
    path = tmp_path / "m.onnx"
    path.write_bytes(protobuf_wire._field(7, message))
    with pytest.raises(InputRefused, match=f"more than {protobuf_wire.MAX_NESTING} messages in each other"):
        without_large_tensors(path, "here")
