"""What a candidate computes, against PyTorch with the adapter attached."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

import lora_export as le
from lora_export.errors import RuntimeRefused
from lora_export.runtime.memory import AVAILABLE
from support.api import MODEL
from support.exporters import checkpoint_of, torchscript


def test_another_adapter_is_different_and_returned(place: Path) -> None:
    result = le.verify(place / "m.onnx", MODEL, adapters=place / "stronger")
    assert not result and result.verdict.outcome == "different" and result.exit_code == 4


def test_modules_are_not_compared_where_memory_is_missing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = le.verify(place / "m.onnx", MODEL, adapters=place / "stronger")
    monkeypatch.setenv(AVAILABLE, "1")
    result = le.verify(place / "m.onnx", MODEL, adapters=place / "stronger")
    assert compared.exit_code == result.exit_code == 4
    note = "modules were not compared: this needs 0.0 GiB of memory, and 0.0 GiB are available"
    assert note in result.verdict.notes and note not in compared.verdict.notes


def test_a_graph_of_bert_without_token_types_is_judged_with_zeros(tmp_path: Path) -> None:
    base = checkpoint_of("bert")
    torchscript("bert", tmp_path / "right.onnx")
    result = le.verify(tmp_path / "right.onnx", base)
    text = "token_type_ids: the candidate does not take them; all are 0"
    assert result.exit_code == 0 and result.verdict.not_judged == (text,)
    assert le.verify(tmp_path / "right.onnx", base, strict=True).verdict.outcome == "undecided"
    graph = onnx.load(tmp_path / "right.onnx")
    table = next(one for one in graph.graph.initializer if "token_type_embeddings" in one.name)
    table.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(table)[::-1].copy(), table.name))
    onnx.save(graph, tmp_path / "others.onnx")
    assert le.verify(tmp_path / "others.onnx", base).exit_code == 4
    mask = graph.graph.input[1]
    assert mask.name == "attention_mask"
    mask.name = "mask"
    for node in graph.graph.node:
        node.input[:] = ["mask" if name == "attention_mask" else name for name in node.input]
    onnx.save(graph, tmp_path / "renamed.onnx")
    with pytest.raises(RuntimeRefused, match="has no input attention_mask; the graph has no input token_type_ids"):
        le.verify(tmp_path / "renamed.onnx", base)
