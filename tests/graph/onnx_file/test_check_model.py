"""ONNX's checker with onnxruntime's operators, and without external data."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from lora_export.errors import OutputFailed
from lora_export.graph.onnx_file.check_model import check_file, check_message, innermost_error
from lora_export.graph.onnx_file.writing import save_graph
from support.graphs import a_graph
from support.small_graphs import LINEAR, graph_with_external_data

NORM = """
g (float[N,2] x) => (float[N,2] y)
<float[2] w = {1,2}>
{ y = SimplifiedLayerNormalization(x, w) }
"""


def message_of(body: str) -> bytes:
    return ir.to_proto(a_graph(body)).SerializeToString()


def test_path_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"m\xff.onnx")
    with pytest.raises(OutputFailed, match=r"m\\udcff\.onnx is not UTF-8"):
        save_graph(a_graph(LINEAR), tmp_path, path.name)


@pytest.mark.parametrize("body", [LINEAR, NORM])
def test_graphs_of_onnx_and_of_onnxruntime_are_accepted(body: str, tmp_path: Path) -> None:
    check_message(message_of(body))
    (tmp_path / "m.onnx").write_bytes(message_of(body))
    check_file(tmp_path / "m.onnx")


def test_unknown_operator_is_refused(tmp_path: Path) -> None:
    message = message_of(LINEAR.replace("Mul(k", "MadMul(k"))
    with pytest.raises(onnx.checker.ValidationError, match="MadMul"):
        check_message(message)
    (tmp_path / "m.onnx").write_bytes(message)
    with pytest.raises(onnx.checker.ValidationError, match="MadMul"):
        check_file(tmp_path / "m.onnx")


def test_message_is_checked_without_its_external_data(tmp_path: Path) -> None:
    path = graph_with_external_data(tmp_path, location="missing.data")
    check_message(path.read_bytes())
    with pytest.raises(onnx.checker.ValidationError, match="missing"):
        check_file(path)


def test_innermost_error_is_the_first_cause() -> None:
    try:
        try:
            raise KeyError("cause")
        except KeyError as cause:
            raise ValueError("effect") from cause
    except ValueError as error:
        assert repr(innermost_error(error)) == "KeyError('cause')"
