"""`lora-export inspect`: graphs, adapters and checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_export import cli
from lora_export.graph.onnx_file.writing import save_graph
from support.cli import answer
from support.content_graphs import GEMM, OTHER, PACKED, QKV, WEIGHT, K, base_checkpoint, product_graph
from support.handmade import base_file, peft_adapter


def test_sites_and_naming_attempts_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_graph(product_graph(PACKED.T), tmp_path, "model.onnx")
    base_checkpoint(tmp_path, {**QKV, "other.weight": K})
    assert cli.run(["inspect", str(tmp_path / "model.onnx"), "--all"]) == 0
    assert "MatMul `n`: no certain name (tried its initializer `W`" in capsys.readouterr().out
    assert cli.run(["inspect", str(tmp_path / "model.onnx"), "--base", str(tmp_path / "base.safetensors"), "-v"]) == 0
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


# --- other files ---


def test_an_adapter_is_shown_with_rank_and_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = peft_adapter(tmp_path / "fr", {"fc": ([[1.0, 2.0]], [[1.0], [2.0], [3.0]])}, lora_alpha=3)
    assert cli.run(["inspect", str(adapter)]) == 0
    assert "fc" in capsys.readouterr().out
    code, document = answer(capsys, "inspect", adapter)
    assert (code, document["pairs"]["fc"]["scale"], document["name"]) == (0, 3.0, "fr")


def test_an_adapter_of_another_format_is_shown_with_its_facts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {"lora_down": np.ones((2, 3), np.float32), "lora_up": np.ones((4, 2), np.float32)}
    named = {f"lora_unet_fc.{name}.weight": value for name, value in tensors.items()}
    path = tmp_path / "style.safetensors"
    header = {"modelspec.trigger_phrase": "ohwx\n\x1b[2K"}
    save_file({**named, "lora_unet_fc.alpha": np.array(1, np.float32)}, path, header)
    for more in ((), ("--all",)):
        assert cli.run(["inspect", str(path), *more]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith("style: kohya, 1 low-rank pair, 14 parameters")
        assert "scales: alpha / rank, by the alpha of each pair; 1 where the file has none" in shown
        assert "trigger words: ohwx" in shown and "\x1b" not in shown
    code, document = answer(capsys, "inspect", path)
    assert (code, document["format"], document["bytes"]) == (0, "kohya", path.stat().st_size)
    assert document["metadata"]["header"] == header
    (pair,) = document["pairs"].values()
    assert (pair["scale"], document["parameters"]) == (0.5, 14)


def test_a_checkpoint_is_shown_with_shapes_and_unknown_layouts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = base_file(tmp_path / "base.safetensors", {"square.weight": np.ones((4, 4)), "bias": np.ones(4)})
    size = f"{path.stat().st_size:,}"
    assert cli.run(["inspect", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"2 tensors, {size} bytes",
        "  bias  4 float32",
        "  square.weight  4 x 4 float32",
        "the layout of 1 square matrices is unknown: a merge needs --layout, or an adapter that records it",
    ]
    code, document = answer(capsys, "inspect", path)
    assert (code, {spec["name"]: spec["shape"] for spec in document["tensors"]}) == (
        0, {"bias": [4], "square.weight": [4, 4]},
    )  # fmt: skip


def test_a_tied_tensor_is_shown_with_its_other_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = base_file(tmp_path / "base.safetensors", {"emb": np.ones((2, 3))}, metadata={"head": "emb"})
    assert cli.run(["inspect", str(path)]) == 0
    assert "  emb  2 x 3 float32, also head" in capsys.readouterr().out.splitlines()


def test_options_for_another_kind_of_file_end_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = peft_adapter(tmp_path / "fr", {"fc": ([[1.0, 2.0]], [[1.0], [2.0]])})
    assert cli.run(["inspect", str(adapter), "--base", "x"]) == 2
    assert cli.run(["inspect", str(adapter), "--check"]) in (2, 3)
    assert "Error: " in capsys.readouterr().err
