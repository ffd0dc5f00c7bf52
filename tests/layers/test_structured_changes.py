"""LoHa, LoKr and whole changes in a module: attached and folded, each computes W + ΔW."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lora_export import layers
from lora_export.pairs.structured import HadamardPair, KroneckerPair, WholePair
from support.small_layers import an_adapter, plan_for


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


LOHA = {"a1": numbers(2, 6), "b1": numbers(8, 2), "a2": numbers(2, 6), "b2": numbers(8, 2)}
CHANGES = {
    "LoKr": ("fc", KroneckerPair({"w1": numbers(2, 3), "w2": numbers(4, 2)}, 0.5)),
    "LoHa": ("fc", HadamardPair(LOHA, 0.5)),
    "whole": ("fc", WholePair({"change": numbers(8, 6)}, 0.5)),
    "LoKr of a convolution": ("conv", KroneckerPair({"w1": numbers(2, 1), "w2": numbers(4, 3, 3, 3)}, 0.5)),
    "whole kernel": ("conv", WholePair({"change": numbers(8, 3, 3, 3)}, 0.5)),
    "LoKr, DoRA": ("fc", KroneckerPair({"w1": numbers(2, 3), "w2": numbers(4, 2)}, 0.5, np.abs(numbers(8)) + 1)),
}


@pytest.fixture
def module() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.ModuleDict({"fc": nn.Linear(6, 8), "conv": nn.Conv2d(3, 8, 3)})


@pytest.mark.parametrize("name", CHANGES)
def test_attached_and_folded_compute_the_changed_weight(name, module):
    owner, pair = CHANGES[name]
    x = torch.randn(2, 6) if owner == "fc" else torch.randn(2, 3, 5, 5)
    expected = copy.deepcopy(module[owner])
    with torch.no_grad():
        total = expected.weight.double() + torch.from_numpy(pair.delta().astype(np.float64))
        if pair.magnitude is not None:
            norms = torch.linalg.vector_norm(total.flatten(1), dim=1)
            total *= (torch.from_numpy(pair.magnitude.astype(np.float64)) / norms).reshape(-1, 1)
        expected.weight.copy_(total)
        base = module[owner](x)
        plan = plan_for(module, an_adapter({owner: pair}))
        layers.attach(module, plan)
        assert torch.allclose(module[owner](x), expected(x), atol=1e-5)
        assert not torch.allclose(base, expected(x), atol=1e-2)
        layers.detach(module)
        layers.fold(module, plan)
        assert torch.allclose(module[owner].weight, expected.weight, atol=1e-6)
