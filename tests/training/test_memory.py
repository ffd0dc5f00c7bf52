"""Where the memory of a training goes."""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from torch import nn

from lora_export.training.memory import PeakMemory, SavedActivations, memory_use


def test_weights_gradients_optimiser_and_activations_are_counted_by_hand() -> None:
    module = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, bias=False))
    module[0].requires_grad_(False)
    optimizer = torch.optim.AdamW([module[2].weight])
    saved = SavedActivations(module)
    with saved.counted():
        out = module(torch.ones(10, 8))
    out.sum().backward()
    optimizer.step()
    use = memory_use(module, optimizer, saved.bytes)
    assert use.weights == 4 * (8 * 16 + 16 * 4)
    assert use.gradients == 4 * 16 * 4
    assert use.optimizer == 2 * 4 * 16 * 4 + 4  # two moments and the count of steps
    assert use.activations == 4 * 10 * 16  # the input of the trained layer


def test_weights_that_autograd_keeps_are_no_activations() -> None:
    module = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, bias=False))
    saved = SavedActivations(module)
    with saved.counted():
        module(torch.ones(10, 8))  # the gradient of the first layer needs the second one's weight
    assert saved.bytes == 4 * (10 * 8 + 10 * 16)


def test_shared_weights_count_once() -> None:
    module = nn.ModuleList([nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)])
    module[1].weight = module[0].weight
    assert memory_use(module, torch.optim.AdamW(module.parameters()), 0).weights == 4 * 64


def test_a_weight_in_4_bits_counts_with_its_scales() -> None:
    layer = bnb.nn.Linear4bit(256, 512, bias=False, quant_type="nf4").to("cpu")
    use = memory_use(layer, torch.optim.AdamW([nn.Parameter(torch.ones(1))]), 0)
    blocks = 256 * 512 // 64
    tables = 4 * 16 + 4 * 256  # of the values, and of the scales
    assert use.weights == 256 * 512 // 2 + blocks + 4 * blocks // 256 + 4 + tables


def test_the_peak_is_the_largest_measured() -> None:
    peak = PeakMemory(torch.device("cpu"))
    peak.measure()
    assert peak.peak > 2**20
