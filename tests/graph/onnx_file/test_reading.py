"""Reading ONNX files: what is refused, and what stays in its file."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import pytest

from lora_export.errors import InputRefused
from lora_export.graph.onnx_file.protobuf_wire import MAX_MESSAGE_BYTES
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.graph.onnx_file.writing import save_graph
from support.graphs import a_graph
from support.small_graphs import LINEAR


@pytest.mark.parametrize("content", [b"", b"\x08", b"no protobuf at all", bytes(100)])
def test_file_that_is_not_onnx_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(InputRefused, match="is no ONNX file"):
        load_graph(path)


@pytest.mark.fault(37)
@pytest.mark.parametrize("where", ["property", "operator"])
def test_text_that_is_not_utf8_is_refused(tmp_path: Path, where: str) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[N] x) => (float[N] y) { y = Identity(x) }'
    )
    proto.metadata_props.add(key="maker", value="somebody")
    content = proto.SerializeToString()
    word = b"somebody" if where == "property" else b"Identity"
    (tmp_path / "m.onnx").write_bytes(content.replace(word, b"\x80" + word[1:]))
    with pytest.raises(InputRefused, match=r"is a damaged ONNX file: b'.x80.* is not UTF-8 text"):
        load_graph(tmp_path / "m.onnx")


def test_truncated_graph_is_refused(tmp_path: Path) -> None:
    (path,) = save_graph(a_graph(LINEAR), tmp_path, "model.onnx")
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(InputRefused, match="is no ONNX file, or a damaged one"):
        load_graph(path)


@pytest.mark.fault(41)
def test_missing_file_folder_and_fifo_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.onnx")
    for name, problem in [("none.onnx", "No such file"), (".", "not a regular file"), ("fifo.onnx", "not a regular")]:
        with pytest.raises(InputRefused, match=problem):
            load_graph(tmp_path / name)


@pytest.mark.fault(36)
def test_graph_longer_than_protobuf_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with path.open("wb") as file:
        file.truncate(MAX_MESSAGE_BYTES)
    with pytest.raises(
        InputRefused,
        match=r"has 2,147,483,648 bytes\. An ONNX graph must have less than .*external data",
    ):
        load_graph(path)
