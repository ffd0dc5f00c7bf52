"""The command `inspect` on a graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_export import cli
from lora_export.graph.onnx_file.writing import save_graph
from support.content_graphs import GEMM, OTHER, PACKED, QKV, WEIGHT, K, base_checkpoint, product_graph


def test_sites_and_naming_attempts_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_graph(product_graph(PACKED.T), tmp_path, "model.onnx")
    base_checkpoint(tmp_path, {**QKV, "other.weight": K})
    assert cli.run(["inspect", str(tmp_path / "model.onnx")]) == 0
    assert "MatMul `n`: no certain name (tried its initializer `W`" in capsys.readouterr().out
    assert cli.run(["inspect", str(tmp_path / "model.onnx"), "--base", str(tmp_path / "base.safetensors")]) == 0
    shown = capsys.readouterr().out
    assert "q.weight  2 x 2 float32\n    MatMul `n` [0:2], stored in_out, named by content, [0:2] of W" in shown
    assert "MatMul `n` [2:3]: no certain name" in shown
    assert "which equals k.weight and other.weight" in shown


def test_json_contains_sites_and_unnamed_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_graph(product_graph(PACKED.T), tmp_path, "model.onnx")
    base_checkpoint(tmp_path, {**QKV, "other.weight": K})
    line = ["inspect", str(tmp_path / "model.onnx"), "--base", str(tmp_path / "base.safetensors"), "--json"]
    assert cli.run(line) == 0
    document = json.loads(capsys.readouterr().out)
    assert [tensor["name"] for tensor in document["tensors"]] == ["q.weight", "v.weight"]
    assert document["sites"][0] == {
        "name": "q.weight", "how": "content", "operator": "MatMul", "node": "n", "input": 1, "initializer": "W",
        "layout": "in_out", "shape": [2, 2], "dtype": "float32", "stored_as": "float", "block": [0, 2],
        "quantised": None, "obstacle": "",
    }  # fmt: skip
    assert [site["equals"] for site in document["unnamed"]] == [["k.weight", "other.weight"]]


@pytest.mark.parametrize(
    ("tensors", "arguments", "code", "message"),
    [
        ({"a.weight": OTHER}, [], 3, "a.weight by initializer, no tensor by content"),
        ({"a.weight": WEIGHT}, ["base.safetensors"], 2, "--base names the weights of an .onnx file"),
    ],
)
def test_base_that_does_not_fit_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tensors: Any, arguments: list[str], code: int, message: str
) -> None:
    save_graph(product_graph(WEIGHT, GEMM, name="a.weight"), tmp_path, "model.onnx")
    checkpoint = base_checkpoint(tmp_path, tensors)
    path = tmp_path / (arguments[0] if arguments else "model.onnx")
    assert cli.run(["inspect", str(path), "--base", str(checkpoint.path)]) == code
    out, err = capsys.readouterr()
    assert message in err and not out
