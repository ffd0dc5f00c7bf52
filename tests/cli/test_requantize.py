"""The command `merge --requantize`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from lora_export import cli
from lora_export.graph.onnx_file.reading import load_graph
from support.cli import Capture
from support.folder_contents import folder_contents
from support.graphs import quantised, record_of
from support.handmade import base_file, peft_adapter
from support.requantised_graphs import (
    A,
    B,
    W,
    dequantised_weight,
    expected_retention_and_noise,
    float_graph,
    merge_command,
    save_model,
)


def test_a_layer_that_would_lose_its_change_is_promoted_and_reported(tmp_path: Path, capsys: Capture) -> None:
    base = quantised(float_graph(tmp_path / "f.onnx"))
    path = save_model(base, tmp_path / "q.onnx")
    adapter = peft_adapter(tmp_path / "ad", {"fc": (A, B * 0.003)})
    assert cli.run(merge_command(path, adapter, "--requantize")) == 0
    screen = capsys.readouterr().out
    assert (
        "quantised layers with a change: 0 kept in their scheme, 1 promoted; " in screen and "times the base" in screen
    )
    assert "0.0% of its change would be left" in screen
    # With nothing asked for, the layer is kept, and the reported statistics are those of the written file.
    assert (
        cli.run([*merge_command(path, adapter, "--requantize", "--min-retention", "0", "--json"), "--overwrite"]) == 3
    )
    assert "change no entry of any weight" in capsys.readouterr().err
    adapter = peft_adapter(tmp_path / "more", {"fc": (A, B * 0.1)})
    assert (
        cli.run([*merge_command(path, adapter, "--requantize", "--min-retention", "0", "--json"), "--overwrite"]) == 0
    )
    report = json.loads(capsys.readouterr().out)
    after = dequantised_weight(load_graph(tmp_path / "merged.onnx"))
    expected = expected_retention_and_noise(dequantised_weight(base), B @ A * 0.1, after)
    (result,), (layer,) = report["results"], report["layers"]
    np.testing.assert_allclose((result["retention"], result["noise"]), expected, rtol=1e-3)
    assert result["retention"] < 0.5 and layer["why"] == "" and layer["retention"] == result["retention"]
    assert report["base_bytes"] == path.stat().st_size


def test_a_change_that_no_form_holds_is_refused_with_advice(tmp_path: Path, capsys: Capture) -> None:
    path = save_model(quantised(float_graph(tmp_path / "f.onnx", W.astype(np.float16))), tmp_path / "q.onnx")
    adapter = peft_adapter(tmp_path / "ad", {"fc": (A, B * 1e-5)})
    before = folder_contents(tmp_path)
    assert cli.run(merge_command(path, adapter, "--requantize")) == 3
    message = capsys.readouterr().err
    assert "1 of 1 quantised weights cannot hold their change, and neither can floats of the type" in message
    assert "fc.weight (4 bits in blocks of 32): 0.0% of its change" in message
    assert "onnx MODEL.onnx --lora nodes" in message and "merge into the float model" in message
    assert folder_contents(tmp_path) == before


def test_quantised_weight_without_option_is_refused_with_advice(tmp_path: Path, capsys: Capture) -> None:
    path = save_model(quantised(float_graph(tmp_path / "f.onnx")), tmp_path / "q.onnx")
    adapter = peft_adapter(tmp_path / "ad", {"fc": (A, B)})
    assert cli.run(merge_command(path, adapter)) == 3
    message = capsys.readouterr().err
    assert "fc.weight is quantised (4 bits in blocks of 32)" in message
    assert "onnx MODEL.onnx --lora nodes" in message and "merge --requantize" in message and "float model" in message
    assert cli.run(merge_command(path, adapter, "--requantize", "--dry-run")) == 0
    assert "note: quantised again: 1 of the weights, 4 bits in blocks of 32" in capsys.readouterr().err
    assert cli.run(merge_command(path, adapter, "--requantize")) == 0
    record = record_of(tmp_path / "merged.onnx")
    assert record["settings"]["requantize"] is True
    assert (
        cli.run(merge_command(tmp_path / "merged.onnx", adapter, "--requantize")) == 3
    )  # the same adapter a second time
    base = base_file(tmp_path / "b.safetensors", {"fc.weight": W.T})
    assert cli.run([*merge_command(base, adapter)[:-1], str(tmp_path / "m.safetensors"), "--requantize"]) == 2


def test_onnx_merges_into_quantised_weights_and_proves_it(tmp_path: Path, capsys: Capture) -> None:
    path = save_model(quantised(float_graph(tmp_path / "f.onnx")), tmp_path / "q.onnx")
    adapter, out = peft_adapter(tmp_path / "ad", {"fc": (A, B * 0.05)}), tmp_path / "out.onnx"
    command = ["onnx", str(path), "-a", str(adapter), "-o", str(out)]
    assert cli.run(command) == 3
    assert "merge --requantize" in capsys.readouterr().err
    assert cli.run([*command, "--requantize"]) == 0
    screen = capsys.readouterr().out
    assert "0 kept in their scheme, 1 promoted" in screen and "\nsame: " in screen
    record = record_of(out)
    assert record["settings"]["requantize"] is True and record["verdict"]["outcome"] == "same"
    assert (
        cli.run([*command, "--requantize", "--min-retention", "0", "--json", "--overwrite"]) == 5
    )  # too little is left
    capsys.readouterr()
    assert cli.run([*command, "--requantize", "--json", "--overwrite"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["merge"]["layers"][0]["stored"] == "8 bits in blocks of 32"
    for more, message in (
        (["--requantize", "--lora", "nodes"], "--requantize is for --lora merged"),
        (["--min-retention", "0.9", "--lora", "rows"], "--min-retention is for --lora merged"),
    ):
        assert cli.run([*command, *more]) == 2
        assert message in capsys.readouterr().err
