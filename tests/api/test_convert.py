"""`lora_export.convert`: next week's adapter for an existing graph."""

from __future__ import annotations

from pathlib import Path

import pytest

import lora_export as le
from lora_export.errors import InputRefused
from support.api import MODEL, Recorder, an_adapter
from support.handmade import peft_adapter


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "m.onnx"
    le.export_onnx(MODEL, path, lora="inputs", target="dense", verify=False)
    return path


def test_a_converted_adapter_runs_in_the_graph(graph: Path, tmp_path: Path) -> None:
    seen = Recorder()
    adapter = an_adapter(tmp_path / "next")
    result = le.convert(adapter, tmp_path / "next.onnx_adapter", graph=graph, on_message=seen.messages.append)
    assert (result.weights, result.of) == (1, 1) and result.output.is_file()
    verdict = le.verify(graph, MODEL, adapters=adapter, onnx_adapter=result.output)
    assert verdict.verdict.same


def test_a_layer_without_inputs_is_refused(graph: Path, tmp_path: Path) -> None:
    adapter = peft_adapter(tmp_path / "other", {"elsewhere": ([[1.0] * 8], [[1.0]] * 8)})
    with pytest.raises(InputRefused, match="elsewhere"):
        le.convert(adapter, tmp_path / "x.onnx_adapter", graph=graph)
    assert not (tmp_path / "x.onnx_adapter").exists()
