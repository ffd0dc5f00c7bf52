"""The graph that a candidate was made from as the measure: its inputs, its outputs, and the error of the peer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from lora_export import plan
from lora_export.graph.find_sites import find_sites
from lora_export.graph.merge.fold import fold_graph
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.lora import Adapter, LoraPair
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.runner import Arrays
from lora_export.verification import against_graph, proof
from lora_export.verification.against_graph import GraphReferences
from lora_export.verification.pair_controls import PairControls
from lora_export.verification.parity import Outcome, Verdict
from lora_export.verification.proof import Proof, prove

WIDTH, LAYERS, RANK = 256, 2, 2


def tower(path: Path, shape: Sequence[Any] = ("batch", WIDTH)) -> Path:
    """Wide layers, each on the output of the one before."""
    rng = np.random.default_rng(0)
    nodes, tensors = [], []
    for layer in range(LAYERS):
        weight = (rng.standard_normal((WIDTH, WIDTH)) / 16).astype(np.float32)
        tensors.append(numpy_helper.from_array(weight, f"l{layer}.weight"))
        names = [f"x{layer}", f"l{layer}.weight"], [f"x{layer + 1}"]
        nodes.append(helper.make_node("MatMul", *names, name=f"l{layer}"))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x0", f"x{LAYERS}")]
    graph = helper.make_graph(nodes, "tower", ends[:1], ends[1:], tensors)
    imports = [helper.make_opsetid("", 21)]
    path.write_bytes(helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString())
    return path


def an_adapter(std: float) -> Adapter:
    rng = np.random.default_rng(1)
    pairs = {
        f"l{layer}": LoraPair(
            a=std * rng.standard_normal((RANK, WIDTH)), b=std * rng.standard_normal((WIDTH, RANK)), scale=1.0
        )
        for layer in range(LAYERS)
    }
    return Adapter(name="a", format="test", pairs=pairs, sha256="0a")


def merged_graph(folder: Path, std: float, strength: float = 1.0) -> Path:
    """The tower with the adapter merged at this strength."""
    model = ir.load(tower(folder / "tower.onnx"))
    found = find_sites(model)
    fold_graph(model, found, plan.make([an_adapter(std)], found.specs, strengths=[strength]))
    save_graph(model, folder, "merged.onnx")
    return folder / "merged.onnx"


def judged(folder: Path, std: float, strength: float = 1.0) -> Proof:
    """The proof of a merge with this strength, as of one with strength 1."""
    candidate = OnnxRunner(merged_graph(folder, std, strength))
    return prove(candidate, GraphReferences.open(folder / "tower.onnx", "merged", [an_adapter(std)]))


def judged_without_second(folder: Path, scale: float, strength: float) -> Verdict:
    """The verdict on a merge whose second pair has `scale`, and `strength` times it in the candidate."""
    base = ir.load(tower(folder / "tower.onnx", ["batch", "sequence", WIDTH]))
    whole = an_adapter(0.05)
    first, second = whole.pairs.items()
    right, own = (
        replace(whole, pairs=dict([first, (second[0], replace(second[1], scale=factor))]))
        for factor in (scale, scale * strength)
    )
    found = find_sites(base)
    fold_graph(base, found, plan.make([own], found.specs))
    save_graph(base, folder, "merged.onnx")
    references = GraphReferences.open(folder / "tower.onnx", "merged", [right])
    return prove(OnnxRunner(folder / "merged.onnx"), references).verdict


@pytest.mark.parametrize("scale", [pytest.param(1e-5, marks=pytest.mark.slow), 3e-6])
def test_candidate_without_a_pair_below_the_gates_is_different(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    assert judged_without_second(tmp_path, scale, 1.0).same
    verdict = judged_without_second(tmp_path, scale, 0.0)
    assert [reason.text.partition(":")[0] for reason in verdict.reasons] == ["l1"]
    assert verdict.outcome is Outcome.DIFFERENT and "the candidate lacks" in str(verdict)
    monkeypatch.setattr(against_graph, "control_graph_pairs", lambda *_, **__: PairControls())
    assert judged_without_second(tmp_path, scale, 0.0).same, "the gates see this pair: nothing else was tested"


def test_a_pair_far_below_rounding_is_listed_as_not_judged(tmp_path: Path) -> None:
    verdict = judged_without_second(tmp_path, 1e-8, 1.0)
    assert verdict.same and "1 of the 2 pairs of the adapters, whose effect is much smaller" in verdict.not_judged[0]


def test_a_doubt_names_the_pytorch_model_as_remedy(tmp_path: Path) -> None:
    verdict = judged(tmp_path, 1e-5).verdict
    assert verdict.outcome is Outcome.UNDECIDED
    assert all(
        reason.remedy.startswith('the PyTorch model that the graph was exported from (model="MODEL")')
        for reason in verdict.reasons
    )


@pytest.mark.slow
def test_right_merge_of_a_large_adapter_is_same_beside_a_merged_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = 1.0
    verdict = judged(tmp_path, large).verdict
    assert verdict.same and against_graph.MERGED_GRAPH in verdict.notes, str(verdict)
    assert judged(tmp_path, large, 1.0001).verdict.outcome is Outcome.DIFFERENT
    assert against_graph.MERGED_GRAPH not in judged(tmp_path, 0.02).verdict.notes
    monkeypatch.setattr(proof, "differs_in_precision_alone", lambda _: False)
    assert judged(tmp_path, large).verdict.outcome is Outcome.DIFFERENT


def test_other_adapters_share_inputs_and_outputs_of_the_base(tmp_path: Path) -> None:
    references = GraphReferences.open(tower(tmp_path / "tower.onnx"), "merged")
    references.check()
    others = references.with_adapters([an_adapter(0.1)], [0.5])
    candidate = OnnxRunner(tmp_path / "tower.onnx")
    assert others.inputs(candidate) is references.inputs(candidate)
    assert others.base.fp64 is references.base.fp64
    assert (len(references.adapters), len(others.adapters), others.strengths) == (0, 1, [0.5])


def test_each_input_is_drawn_again(tmp_path: Path) -> None:
    inputs = GraphReferences.open(tower(tmp_path / "tower.onnx"), "merged").base.inputs
    assert len(inputs.cases) == 3 and inputs.perturbed.keys() == {"x0"}
    assert not np.array_equal(inputs.perturbed["x0"]["x0"], inputs.varied["x0"])
    verdict = judged(tmp_path, 0.02).verdict
    assert [(tested.input, tested.candidate_changed) for tested in verdict.sensitivity] == [("x0", True)]


class LosesItsAdapter(OnnxRunner):
    """Right in three runs, and wrong in every later one."""

    calls = 0

    def run(self, inputs: Arrays, names: Sequence[str] | None = None) -> Arrays:
        self.calls += 1
        outputs = super().run(inputs, names)
        return outputs if self.calls <= 3 else {name: 0.5 * value for name, value in outputs.items()}


def test_candidate_with_other_outputs_when_run_again_is_different(tmp_path: Path) -> None:
    candidate = LosesItsAdapter(merged_graph(tmp_path, 0.02))
    result = prove(candidate, GraphReferences.open(tmp_path / "tower.onnx", "merged", [an_adapter(0.02)]))
    assert result.verdict.outcome is Outcome.DIFFERENT
    assert {reason.case for reason in result.verdict.reasons} == {f"{result.cases[0].name}, run again"}


def test_candidate_with_another_output_is_different(tmp_path: Path) -> None:
    graph = ir.load(tower(tmp_path / "tower.onnx"))
    inner = graph.graph.node(0).outputs[0]
    inner.type, inner.shape = graph.graph.outputs[0].type, graph.graph.outputs[0].shape
    graph.graph.outputs.append(inner)
    save_graph(graph, tmp_path, "two.onnx")
    result = prove(OnnxRunner(tmp_path / "two.onnx"), GraphReferences.open(tmp_path / "tower.onnx", "merged"))
    assert result.verdict.outcome is Outcome.DIFFERENT
