"""A failure of a model's own code has the model's name; a machine without memory is no failure of the model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lora_export.errors import InputRefused, RuntimeRefused
from lora_export.models.export import to_onnx
from lora_export.models.failures import exporter_refusals, named_failures
from lora_export.runtime.torch_runners import Fp64Runner, ModuleRunner


def test_the_message_names_model_inputs_and_innermost_cause() -> None:
    with (
        pytest.raises(RuntimeRefused, match=r"^Linear itself fails on the inputs \(x, y\): 7 of 8$"),
        named_failures(nn.Linear(1, 1), ["x", "y"]),
    ):
        raise KeyError("outer") from ValueError("7 of 8\n\nmore")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("can't start new thread"),
        InputRefused("an input of ours"),
    ],
)
def test_other_failures_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, named_failures(nn.Linear(1, 1), ["x"]):
        raise error
    assert raised.value is error


def test_runners_name_the_model_that_fails() -> None:
    x = {"input": torch.ones(2, 3).numpy()}
    for runner in (ModuleRunner(nn.Linear(4, 4)), Fp64Runner(nn.Linear(4, 4).double())):
        with pytest.raises(RuntimeRefused, match=r"^Linear itself fails on the inputs \(input\): mat1 and mat2 shapes"):
            runner.run(x)


class Rotation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svdvals(x)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(4, 4), Rotation()])

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


def test_an_operator_that_onnx_lacks_is_named_with_its_module_and_line() -> None:
    with pytest.raises(RuntimeRefused) as caught:
        to_onnx(Stack().eval(), {"x": torch.ones(4, 4)}, axes={})
    first, remedy = str(caught.value).splitlines()
    assert first.startswith(
        "the exporter refused Stack: ONNX has no operator for aten._linalg_svd (in the module parts.1;"
    )
    assert "test_failures.py, line 48, in forward: `return torch.linalg.svdvals(x)`)" in first
    assert remedy.startswith("Compute it there with operators that ONNX has")


def test_other_refusals_have_their_cause_and_the_ways_out() -> None:
    cause = ValueError("no such thing\n\nand much more")
    with pytest.raises(RuntimeRefused) as caught, exporter_refusals(nn.Linear(1, 1), "Another way."):
        raise RuntimeError("wrapped") from cause
    first, way, remedy = str(caught.value).splitlines()
    assert (first, way) == ("the exporter refused Linear: no such thing", "Another way.")
    assert "a graph cannot contain Python code that depends on values" in remedy
    assert caught.value.__cause__ is not None and caught.value.__cause__.__cause__ is cause


def test_a_missing_operator_without_a_node_has_no_place() -> None:
    message = "No ONNX function found for <OpOverload(op='aten.strange', overload='default')>."
    with (
        pytest.raises(RuntimeRefused, match=r"refused Linear: ONNX has no operator for aten\.strange\n"),
        exporter_refusals(nn.Linear(1, 1)),
    ):
        raise RuntimeError(message)
