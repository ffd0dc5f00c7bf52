"""Graphs are simplified, and no number in them changes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
import pytest
import torch
from torch import Tensor, nn

from lora_export.models import export
from lora_export.models.simplify import simplify
from support.graphs import run

# Within the optimiser's tolerances of 0 and 1
TINY, NEARLY_ONE = 1e-8, 1 + 2.0**-17


class Norm(nn.Module):
    """x / sqrt(mean(x * x) + 1e-8): zeros where x is 0. Helium and others have such a norm."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + TINY)


class NearlyOne(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * NEARLY_ONE / NEARLY_ONE * NEARLY_ONE + 0 - TINY


def graph_of(module: nn.Module) -> ir.Model:
    return export.to_onnx(module, {"x": torch.ones(2, 3)}, axes={"x": {0: "batch"}})


def test_a_number_that_is_nearly_zero_is_not_dropped() -> None:
    outputs = run(graph_of(Norm()), x=np.array([[0, 0, 0], [1e-4, -1e-4, 1e-4]], np.float32))["output_0"]
    assert not outputs[0].any()
    np.testing.assert_allclose(np.abs(outputs[1]), 2**-0.5, rtol=1e-5)


def test_a_number_that_is_nearly_one_is_not_dropped() -> None:
    graph = graph_of(NearlyOne())
    assert [node.op_type for node in graph.graph] == ["Mul", "Div", "Mul", "Sub"]  # the + 0 is gone
    assert [float(value.const_value.numpy()) for value in graph.graph.initializers.values()] == [
        np.float32(NEARLY_ONE),
        np.float32(TINY),
    ]  # each once
    assert run(graph, x=np.ones((1, 3), np.float32))["output_0"][0, 0] == np.float32(NEARLY_ONE)


@pytest.mark.parametrize("number", [TINY, 0.0])
def test_numbers_in_functions_are_seen(number: float) -> None:
    text = f"""
        <ir_version: 10, opset_import: ["" : 20, "local" : 1]>
        graph (float[2] x) => (float[2] y) {{ y = local.shift (x) }}
        <domain: "local", opset_import: ["" : 20]>
        shift (x) => (y) {{ c = Constant <value = float {{{number}}}> ()  y = Add (x, c) }}
    """
    model = ir.from_onnx_text(text)
    simplify(model)
    assert not model.functions
    assert [node.op_type for node in model.graph] == (["Add"] if number else ["Identity"])


def test_the_optimiser_still_drops_what_is_hidden_from_it() -> None:
    """When onnxscript no longer does it, this file's `_hidden_numbers` can go."""
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        graph (float[2] x) => (float[2] y) { c = Constant <value = float {1e-8}> ()  y = Add (x, c) }
    """
    model = ir.from_onnx_text(text)
    onnxscript.optimizer.optimize_ir(model)
    assert "Add" not in [node.op_type for node in model.graph]
