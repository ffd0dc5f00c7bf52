"""What an exporter refuses: the module, the line, and what can be done."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lora_export.errors import RuntimeRefused
from lora_export.models.export import to_onnx
from lora_export.models.exporter_refusals import exporter_refusals


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
    assert "test_exporter_refusals.py, line 16, in forward: `return torch.linalg.svdvals(x)`)" in first
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
