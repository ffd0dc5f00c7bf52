"""When a candidate is diagnosed, and how: in groups of modules, with the outcome unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from lora_export.errors import RuntimeRefused
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.verification.against_pytorch import PyTorchReferences
from lora_export.verification.diagnose import localize, traced_candidate
from lora_export.verification.parity import Outcome
from lora_export.verification.proof import prove
from support.diagnosed_graphs import QUERY, VALUE, WORDS, bert, half_value, make, proven, the_adapter, the_dora
from support.graphs import stored


def test_fault_after_the_last_module_is_located(tmp_path: Path) -> None:
    made = make("merged", tmp_path, the_adapter())
    (output,) = made.graph.graph.outputs
    scaled = ir.node("Add", [output, output])
    scaled.outputs[0].type, scaled.outputs[0].shape = output.type, output.shape
    made.graph.graph.append(scaled)
    scaled.outputs[0].name, output.name = output.name, "inner"
    made.graph.graph.outputs[0] = scaled.outputs[0]
    result = proven(made, the_adapter())
    assert result.diagnosis is not None and result.diagnosis.first is None
    assert "the fault is after classifier, or outside these modules" in result.diagnosis.why


@pytest.mark.parametrize("mode", ["merged", "nodes", "inputs", "rows", "dora"])
def test_correct_graph_agrees_in_every_module(mode: str, tmp_path: Path) -> None:
    adapter = the_dora() if mode == "dora" else the_adapter()
    made = make("nodes" if mode == "dora" else mode, tmp_path, adapter)
    result = proven(made, adapter, trace=True)
    assert result.verdict.same and result.diagnosis is not None
    assert result.diagnosis.first is None and "11 of 11 modules were compared" in result.diagnosis.why
    assert [layer.name for layer in result.diagnosis.layers[:4]] == [
        WORDS, "bert.embeddings.token_type_embeddings", "bert.embeddings.position_embeddings", QUERY,
    ]  # fmt: skip
    for layer in result.diagnosis.layers:
        assert layer.error <= 8 * layer.deployed_error or layer.error < 1e-8  # PyTorch looks embeddings up exactly
        assert layer.effect is not None and (layer.effect > 1e-5) == ("embeddings" not in layer.name)


def test_a_candidate_without_comparable_values_is_not_said_to_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(localize, "compare_calls", lambda *_: {})
    monkeypatch.setattr(localize, "find_first_difference", lambda *_: None)
    result = proven(half_value(make("merged", tmp_path, the_adapter())), the_adapter())
    assert result.verdict.outcome is Outcome.DIFFERENT and result.diagnosis is None
    assert any("no module of the candidate gave values" in note for note in result.verdict.notes)


def test_small_difference_is_blamed_on_no_module(tmp_path: Path) -> None:
    made = make("merged", tmp_path, the_adapter())
    made.put(made.factor("classifier.weight"), stored(made.graph, "classifier.weight") * (1 + 2.0**-16))
    result = proven(made, the_adapter())
    assert result.verdict.outcome is Outcome.DIFFERENT and result.diagnosis is not None
    assert result.diagnosis.first is None and "the difference is small and no module stands out" in result.diagnosis.why


def test_difference_that_vanishes_when_traced_is_the_optimisers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fusing(OnnxRunner):
        def run(self, inputs: Any, names: Any = None) -> Any:
            answer = super().run(inputs, names)
            return answer if len(self.session.get_outputs()) > 1 else {key: 1.1 * v for key, v in answer.items()}

    save_graph(make("merged", tmp_path, the_adapter()).graph, tmp_path, "graph.onnx")
    result = prove(Fusing(tmp_path / "graph.onnx"), PyTorchReferences(bert(), [the_adapter()]))
    assert result.verdict.outcome is Outcome.DIFFERENT and result.diagnosis is not None
    assert result.diagnosis.first is None and "the difference comes from its optimisations" in result.diagnosis.why


def test_large_models_are_compared_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(localize, "MAX_HELD_NUMBERS", 3000)  # numbers: two or three modules
    made = half_value(make("merged", tmp_path, the_adapter()))
    groups: list[int] = []
    run = traced_candidate.TracedGraph.run

    def recording(self: Any, inputs: Any, calls: Any) -> Any:
        groups.append(len(calls))
        return run(self, inputs, calls)

    monkeypatch.setattr(traced_candidate.TracedGraph, "run", recording)
    result = proven(made, the_adapter())
    assert result.diagnosis is not None and result.diagnosis.first == VALUE
    assert "has 0.5 times the correct strength" in result.diagnosis.why
    assert len(groups) > 1 and sum(groups) < 11 and max(groups) <= 3  # it stops at the first difference
    groups.clear()
    result = proven(made, the_adapter(), trace=True)
    assert result.diagnosis is not None and result.diagnosis.first == VALUE
    assert sum(groups) == len(result.diagnosis.layers) == 11


# --- diagnosed module.py ---


def test_same_candidate_is_not_diagnosed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(localize, "diagnose", unexpected)
    assert proven(make("merged", tmp_path, the_adapter()), the_adapter()).diagnosis is None


def test_failed_diagnosis_leaves_the_verdict_and_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeRefused("onnxruntime: no", "more")

    monkeypatch.setattr(traced_candidate, "expose", failing)
    result = proven(half_value(make("merged", tmp_path, the_adapter())), the_adapter())
    assert result.verdict.outcome is Outcome.DIFFERENT and result.diagnosis is None
    assert "modules could not be compared: onnxruntime: no" in result.verdict.notes
