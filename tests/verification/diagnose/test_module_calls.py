"""Recorded calls of a module's layers."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from lora_export.verification.diagnose.module_calls import ModuleCall, record_calls


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
