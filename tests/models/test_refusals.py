"""A failure names its innermost cause, the line of the model's code and a way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_export.errors import InputRefused, RuntimeRefused
from lora_export.models.export import to_onnx
from lora_export.models.export_program import to_program
from lora_export.models.refusals import exporter_refusals, named_failures
from lora_export.runtime.torch_runners import Fp64Runner, ModuleRunner

pytestmark = pytest.mark.exports


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
    runners = {r"input \[2, 3\]": ModuleRunner(nn.Linear(4, 4)), "input": Fp64Runner(nn.Linear(4, 4).double())}
    for given, runner in runners.items():
        with pytest.raises(RuntimeRefused, match=rf"^Linear itself fails on the inputs \({given}\): .*mat1 and mat2"):
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
    line = Rotation.forward.__code__.co_firstlineno + 1
    assert f"test_refusals.py, line {line}, in forward: `return torch.linalg.svdvals(x)`)" in first
    assert remedy.startswith("Compute it there with operators that ONNX has")


class Unexported(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return {}[0] if torch.compiler.is_exporting() else x


def test_a_line_is_named_of_which_pytorch_has_none() -> None:
    with pytest.raises(RuntimeRefused) as caught:
        to_onnx(Unexported().eval(), {"x": torch.ones(4, 4)}, axes={})
    line = Unexported.forward.__code__.co_firstlineno + 1
    assert f"refused Unexported: 0 (test_refusals.py, line {line}, in forward: `return " in str(caught.value)


class OfHalf(nn.Linear):
    """As BART's encoder looks for overflow."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float16 and not torch.isfinite(x).all():
            x = x.clamp(-1, 1)
        return super().forward(x)


class TooLarge(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if (x.abs() > torch.finfo(torch.float16).max).any():
            x = x.clamp(-1, 1)
        return super().forward(x)


def test_another_precision_is_a_way_out_of_a_line_for_float16() -> None:
    with pytest.raises(RuntimeRefused, match=r"in forward: `if .*`") as caught:
        to_onnx(OfHalf(4, 4).half().eval(), {"x": torch.ones(4, 4, dtype=torch.float16)}, axes={})
    assert 'Where that line is about float16 alone, export in dtype="float32". Change that line' in str(caught.value)
    to_onnx(OfHalf(4, 4).eval(), {"x": torch.ones(4, 4)}, axes={})
    with pytest.raises(RuntimeRefused, match=r"in forward: `if .*float16.*`") as caught:
        to_onnx(TooLarge(4, 4).eval(), {"x": torch.ones(4, 4)}, axes={})
    assert "float32" not in str(caught.value)


class OfTwo(nn.Linear):
    """It has a batch of two."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return 2 * y if len(x) == 2 else y


class Contrary(OfTwo):
    """It raises no AttributeError for what it lacks."""

    def __getattr__(self, name: str) -> Any:
        if name == "shape_env":
            raise KeyError(name)
        return super().__getattr__(name)


@pytest.mark.parametrize(("export", "kind"), [(to_onnx, OfTwo), (to_program, OfTwo), (to_onnx, Contrary)])
def test_a_fixed_size_is_named_with_its_line(export: Callable[..., Any], kind: type[nn.Linear]) -> None:
    line = OfTwo.forward.__code__.co_firstlineno + 2
    why = rf"\(test_refusals\.py, line {line}, in forward: `return 2 \* y if len\(x\) == 2 else y`\)\nChange that line"
    with pytest.raises(RuntimeRefused, match=why):
        export(kind(4, 4).eval(), {"x": torch.ones(2, 4)}, axes={"x": {0: "batch"}})


def test_a_scripted_module_is_refused() -> None:
    with pytest.raises(RuntimeRefused, match="ScriptModule"):
        to_onnx(torch.jit.script(nn.Linear(2, 2)).eval(), {"input": torch.ones(2, 2)}, axes={})


def test_other_refusals_have_their_cause_and_a_way_out() -> None:
    cause = ValueError("no such thing\n\nand much more")
    with pytest.raises(RuntimeRefused) as caught, exporter_refusals(nn.Linear(1, 1)):
        raise RuntimeError("wrapped") from cause
    first, remedy = str(caught.value).splitlines()
    assert first == "the exporter refused Linear: no such thing"
    assert "a graph cannot contain Python code that depends on values" in remedy
    assert caught.value.__cause__ is not None and caught.value.__cause__.__cause__ is cause


@pytest.mark.parametrize(
    "cause",
    [
        InputRefused("weights changed"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_what_is_no_fault_of_the_model_stays_as_it_is(cause: Exception) -> None:
    with pytest.raises(type(cause)) as caught, exporter_refusals(nn.Linear(1, 1)):
        raise ValueError("wrapped") from cause
    assert caught.value is cause


class Shifted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.roll(x.shape[0] // 2, 0)


def test_an_operator_whose_arguments_onnx_lacks_is_named_with_its_line() -> None:
    with pytest.raises(RuntimeRefused) as caught:
        to_onnx(Shifted().eval(), {"x": torch.ones(4, 4)}, axes={"x": {0: "rows"}})
    first, remedy = str(caught.value).splitlines()
    line = Shifted.forward.__code__.co_firstlineno + 1
    assert first.endswith(f"(test_refusals.py, line {line}, in forward: `return x.roll(x.shape[0] // 2, 0)`)")
    assert remedy.startswith("Compute it there with operators that ONNX has")


def test_a_missing_operator_without_a_node_has_no_place() -> None:
    message = "No ONNX function found for <OpOverload(op='aten.strange', overload='default')>."
    with (
        pytest.raises(RuntimeRefused, match=r"refused Linear: ONNX has no operator for aten\.strange\n"),
        exporter_refusals(nn.Linear(1, 1)),
    ):
        raise RuntimeError(message)
