"""One case, and what ran it: weights by name, values with inputs changed, and without adapters."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from lora_export import layers, plan
from lora_export.errors import InputRefused
from lora_export.graph.exporter_names import FOLDED_FROM
from lora_export.graph.onnx_file import writing
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.models import export_program
from lora_export.models.load import from_module
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.torch_runners import Fp64Runner, ModuleRunner
from lora_export.runtime.torchscript.runner import ScriptRunner
from lora_export.verification.against_pytorch import PyTorchReferences
from lora_export.verification.diagnose.module_calls import ModuleCall
from lora_export.verification.diagnose.traced_candidate import DiagnosisCase, outputs_renamed, trace
from lora_export.verification.parity import Case, Outcome
from lora_export.verification.proof import Proof, prove
from lora_export.verification.references.attached_module import attach_adapters
from support.diagnosed_graphs import DOWN, SHAPES, VALUE, bert, delta, half_value, make, proven, the_adapter
from support.proofs import attached_copy
from support.small_layers import PAIR, a_model, an_adapter, plan_for

CALL = ModuleCall("0.weight", 0)
ROWS = np.float32([[1, 1, 2]])  # W x + bias = [10, 20], ΔW x = [-2, -4]


class NamedInput(torch.nn.Module):
    """The layer of `a_model`, with a named input."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("0", a_model()[0])

    def forward(self, rows: torch.Tensor) -> Any:
        return {"y": self.get_submodule("0")(rows)}


def a_case(**fields: Any) -> DiagnosisCase:
    base, deployed, attached = NamedInput(), NamedInput(), NamedInput().double()
    adapter = an_adapter({"0": PAIR})
    attach_adapters(attached, [adapter], None)
    attach_adapters(deployed, [adapter], None)
    reference = Fp64Runner(attached, set())
    outputs = Case("first", "", {"y": ROWS}, {"y": ROWS}, {"logits": ROWS})
    parts = {
        "candidate": ModuleRunner(deployed), "reference": reference, "attached": reference,
        "deployed": ModuleRunner(deployed), "base": base, "plan": plan_for(base, adapter), "inputs": {"rows": ROWS},
        "outputs": outputs,
    }  # fmt: skip
    return DiagnosisCase(**(parts | fields))


def test_values_of_a_call_are_those_of_each_run() -> None:
    case = a_case()
    assert case.reference_values([CALL])[CALL].y.tolist() == [[8, 16]]
    assert case.reference_values([CALL])[CALL].y.dtype == np.float64
    assert case.deployed_values([CALL])[CALL].y.dtype == np.float32
    assert case.base_values([CALL])[CALL].y.tolist() == [[10, 20]]
    assert case.reference_values([CALL])[CALL].y.tolist() == [[8, 16]], "the adapter is on again"


def test_inputs_can_be_replaced() -> None:
    case = a_case()
    for values in (case.reference_values([CALL], rows=0 * ROWS), case.deployed_values([CALL], rows=0 * ROWS)):
        assert values[CALL].y.tolist() == [[1, -1]]
    assert case.inputs["rows"] is ROWS


def test_without_a_plan_there_is_no_base_to_compare() -> None:
    assert a_case(plan=None).base_values([CALL]) == {}


def test_weights_are_found_by_name() -> None:
    case = a_case()
    assert list(case.base_weights) == list(case.attached_weights) == ["0.weight"]
    assert case.rounded_weights == {}
    rounded = NamedInput().double()
    layers.attach(rounded, plan_for(rounded, an_adapter({"0": PAIR})))
    assert list(a_case(reference=Fp64Runner(rounded, set())).rounded_weights) == ["0.weight"]


@pytest.mark.parametrize(
    ("names", "expected"), [(["y"], ["logits"]), (["logits"], ["logits"]), (["y", "z"], ["y", "z"])]
)
def test_outputs_get_the_names_of_the_case_by_order(names: list[str], expected: list[str]) -> None:
    outputs = dict.fromkeys(names, ROWS)
    assert list(outputs_renamed(outputs, {"logits": ROWS})) == expected


# --- traced candidate ---


def test_external_weights_remain_in_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "MAX_INLINE_BYTES", 0)
    made = half_value(make("merged", tmp_path, the_adapter()))
    result = proven(made, the_adapter())
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".data", ".onnx"]  # and nothing else
    assert max(path.stat().st_size for path in tmp_path.iterdir() if path.suffix == ".onnx") < 60_000
    assert result.diagnosis is not None and result.diagnosis.first == VALUE
    assert "has 0.5 times the correct strength" in result.diagnosis.why


@pytest.mark.parametrize("defect", [True, False])
def test_graph_fused_by_onnxruntime_is_compared_where_possible(defect: bool, tmp_path: Path) -> None:
    made = make("nodes" if not defect else "merged", tmp_path, the_adapter())
    if defect:
        half_value(made)
    save_graph(made.graph, tmp_path, "graph.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "fused.onnx"), 3
    onnxruntime.InferenceSession(tmp_path / "graph.onnx", options, providers=["CPUExecutionProvider"])
    operators = {node.op_type for node in load_graph(tmp_path / "fused.onnx").graph}
    assert {"BiasGelu", "FusedGemm", "SkipLayerNormalization"} <= operators
    result = prove(OnnxRunner(tmp_path / "fused.onnx"), PyTorchReferences(bert(), [the_adapter()]), trace=True)
    assert result.diagnosis is not None and result.diagnosis.first == (VALUE if defect else None)
    assert "10 of 11 modules were compared" in result.diagnosis.why  # the pooler's is fused with its tanh
    assert not defect or "none is wrong" in result.diagnosis.why


def test_graph_whose_names_lost_their_prefix_is_diagnosed(tmp_path: Path) -> None:
    made = half_value(make("merged", tmp_path, the_adapter()))
    for value in list(made.graph.graph.initializers.values()):
        origin = value.metadata_props.pop(FOLDED_FROM, None)
        name = origin[2:-2] if origin else value.name
        if name and name.startswith("bert."):
            value.name = name.removeprefix("bert.")
    for node in made.graph.graph:
        node.metadata_props.clear()
    result = proven(made, the_adapter())
    assert result.diagnosis is not None and result.diagnosis.first == VALUE


def half_merged() -> torch.nn.Module:
    """The merged module, whose layer DOWN has half of its change."""
    module = copy.deepcopy(bert().module)
    layers.fold(module, plan.make([the_adapter()], layers.specs(module)))
    with torch.no_grad():
        module.get_submodule(DOWN).weight.sub_(torch.from_numpy(delta(DOWN) / 2))  # type: ignore[union-attr, operator]
    return module


def assert_half(result: Proof, also: str = "") -> None:
    assert result.diagnosis is not None and result.diagnosis.first == DOWN
    assert "has 0.5 times the correct strength" in result.diagnosis.why and also in result.diagnosis.why


def test_merged_module_is_diagnosed_by_hooks() -> None:
    assert_half(prove(ModuleRunner(half_merged()), PyTorchReferences(bert(), [the_adapter()])))


def test_bf16_merge_is_compared_with_bf16_weights() -> None:
    module = half_merged()
    with torch.no_grad():
        for name in SHAPES:
            weight = module.get_submodule(name).weight
            weight.copy_(weight.bfloat16())  # type: ignore[union-attr, operator]
    stored = {f"{name}.weight": "bfloat16" for name in SHAPES}
    result = prove(ModuleRunner(module, stored_dtypes=stored), PyTorchReferences(bert(), [the_adapter()]))
    assert_half(result, also="none is wrong")


def scripted(module: torch.nn.Module, folder: Path) -> ScriptRunner:
    export_program.save_torchscript(
        export_program.to_torchscript(module, bert().example_inputs()), folder / "script.pt", extra={}
    )
    return ScriptRunner(folder / "script.pt", bert().input_names)


@pytest.mark.slow
def test_torchscript_is_diagnosed_by_its_weights(tmp_path: Path) -> None:
    assert_half(prove(scripted(half_merged(), tmp_path), PyTorchReferences(bert(), [the_adapter()])))


@pytest.mark.slow
def test_torchscript_with_branches_is_diagnosed_by_a_and_b(tmp_path: Path) -> None:
    wrong = the_adapter()
    pair = wrong.pairs[DOWN.removesuffix(".weight")]
    halved = dataclasses.replace(
        wrong, pairs={**wrong.pairs, DOWN.removesuffix(".weight"): dataclasses.replace(pair, b=pair.b / 2)}
    )
    assert_half(prove(scripted(attached_copy(bert(), [halved]), tmp_path), PyTorchReferences(bert(), [wrong])))


def test_torchscript_with_outputs_of_other_names_is_not_traced() -> None:
    class Stored(ScriptRunner):
        def __init__(self) -> None:
            pass

        def state(self) -> Any:
            return {name: tensor.numpy() for name, tensor in NamedInput().state_dict().items()}

    outputs = Case("first", "", {"y": ROWS}, {"y": ROWS}, {"output_0": ROWS, "output_1": ROWS})
    with pytest.raises(InputRefused, match="computes another output_0 than the file"):
        trace(a_case(candidate=Stored(), outputs=outputs))


@pytest.mark.slow
def test_torchscript_that_lacks_an_output_is_no_fault_of_onnxruntime(tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self, outputs: int) -> None:
            super().__init__()
            self.layer, self.outputs = a_model()[0], outputs

        def forward(self, rows: torch.Tensor) -> Any:
            y = self.layer(rows)
            return y if self.outputs == 1 else (y, y + 1)

    inputs = {"rows": torch.randn(2, 3)}
    path = tmp_path / "script.pt"
    export_program.save_torchscript(export_program.to_torchscript(Net(1).eval(), inputs), path, extra={})
    result = prove(ScriptRunner(path, ["rows"]), PyTorchReferences(from_module(Net(2).eval(), inputs)))
    assert result.diagnosis is not None and "the fault is after layer" in result.diagnosis.why


@pytest.mark.slow
def test_torchscript_with_other_tensors_is_not_diagnosed(tmp_path: Path) -> None:
    candidate = scripted(attached_copy(bert(), [the_adapter("de", 1)]), tmp_path)
    result = prove(candidate, PyTorchReferences(bert(), [the_adapter()]))
    assert result.verdict.outcome is Outcome.DIFFERENT and result.diagnosis is None
    assert any("its modules cannot be traced" in note for note in result.verdict.notes)
