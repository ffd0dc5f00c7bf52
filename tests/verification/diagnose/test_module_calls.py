"""Recorded calls of a module's layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lora_export import layers
from lora_export.verification.diagnose import module_calls
from lora_export.verification.diagnose.module_calls import CallValues, ModuleCall, record_calls


class CallsTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.fc.weight.copy_(torch.tensor([[0.0, 1.0], [2.0, 0.0]]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.fc(self.fc(x)).add_(1)


def test_each_call_is_recorded_before_in_place_changes() -> None:
    module, x = CallsTwice(), torch.tensor([[3.0, 5.0]])
    calls = [ModuleCall("fc.weight", number) for number in (0, 1)]
    first, second = record_calls(module, lambda: module(x), calls).values()
    assert first.x is not None and (first.x.tolist(), first.y.tolist()) == ([[3, 5]], [[5, 6]])
    assert second.x is not None and (second.x.tolist(), second.y.tolist()) == ([[5, 6]], [[6, 10]])
    assert [str(call) for call in calls] == ["fc", "fc (call 2)"]
    assert not module.fc._forward_hooks


def test_projections_of_multihead_attention_are_recorded() -> None:
    attention = nn.MultiheadAttention(4, 2, batch_first=True).eval()
    x = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    calls = [ModuleCall("in_proj_weight", 0), ModuleCall("out_proj.weight", 0)]
    with torch.no_grad():
        values = record_calls(attention, lambda: attention(x, x, x, need_weights=False), calls)
    for call, bias in zip(calls, (attention.in_proj_bias, attention.out_proj.bias), strict=True):
        x_of, y_of = values[call]
        expected = x_of @ attention.get_parameter(call.weight).detach().numpy().T + bias.detach().numpy()
        np.testing.assert_allclose(y_of, expected, atol=1e-6)


# --- layer products ---


@pytest.mark.parametrize(
    "options",
    [
        *({}, {"stride": 2}, {"padding": 2, "dilation": 2}, {"padding": (1, 0)}),
        *({"padding": "valid"}, {"padding": "same", "dilation": 2}, {"padding": "same"}),
    ],
)
@pytest.mark.parametrize("kind", [torch.nn.Conv1d, torch.nn.Conv2d])
def test_convolution_is_a_product_of_the_inputs_under_its_kernel(kind: Any, options: dict[str, Any]) -> None:
    if kind is torch.nn.Conv1d:
        options = {name: value[0] if isinstance(value, tuple) else value for name, value in options.items()}
    layer = kind(3, 4, 2 if kind is torch.nn.Conv1d else (2, 3), bias=False, **options).double()
    x = torch.randn(2, 3, *([9] if kind is torch.nn.Conv1d else [9, 8]), dtype=torch.float64)
    y = layer(x).detach().numpy()
    found = module_calls.convolution_rows(x.numpy(), y, layer)
    assert found is not None
    rows, outputs = found
    expected = rows @ layer.weight.detach().numpy().reshape(4, -1).T
    np.testing.assert_allclose(outputs, expected, rtol=1e-12)


def test_grouped_convolution_is_no_matrix_product() -> None:
    layer = torch.nn.Conv1d(4, 4, 2, groups=2)
    x = np.zeros((1, 4, 5))
    assert module_calls.convolution_rows(x, np.zeros((1, 4, 4)), layer) is None


def test_rows_of_a_linear_layer_and_an_embedding() -> None:
    module = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 2))
    table, linear = layers.find_matrix_weights(module)
    ids = np.array([[4, 0], [1, 1]])
    rows = module_calls.product_rows(CallValues(ids, np.ones((2, 2, 3), np.float32)), table)
    assert rows is not None and rows[0].tolist() == [4, 0, 1, 1] and rows[1].shape == (4, 3)
    assert module_calls.weight_matrix(table).shape == (3, 5)  # (out, in): the embedding's table is stored (in, out)
    rows = module_calls.product_rows(CallValues(np.ones((2, 2, 3)), np.ones((2, 2, 2))), linear)
    assert rows is not None and (rows[0].shape, rows[1].shape) == ((4, 3), (4, 2))
    assert module_calls.product_rows(CallValues(None, np.ones((2, 2, 2))), linear) is None
    bias = module_calls.bias_of(linear)
    assert bias is not None and bias.dtype == np.float64
