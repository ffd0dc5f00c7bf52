"""One case, and what ran it: weights by name, values with inputs changed, and without adapters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lora_export import layers
from lora_export.runtime.torch_runners import Fp64Runner, ModuleRunner
from lora_export.verification.diagnose.diagnosis_case import DiagnosisCase, outputs_renamed
from lora_export.verification.diagnose.module_calls import ModuleCall
from lora_export.verification.parity import Case
from lora_export.verification.references.attached_module import attach_adapters
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
    assert list(a_case().aligned(outputs)) == list(outputs_renamed(outputs, {"logits": ROWS})) == expected
