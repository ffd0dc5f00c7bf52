"""Fold a plan into the weights of a module."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_export import layers
from lora_export.errors import InputRefused
from lora_export.lora import LoraPair
from support.handmade import rounded_sum
from support.small_layers import (
    PAIR,
    a_linear,
    a_model,
    an_adapter,
    an_encoder_layer,
    by_hand,
    encoder_changes,
    equal,
    plan_for,
)


def test_fold_adds_in_place() -> None:
    model = nn.Sequential(a_linear(), Conv1D(2, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, 2], [3, 4]]))
    conv = LoraPair(a=np.array([[1, 2]]), b=np.array([[1], [0]]), scale=1.0)  # ΔW (in, out) = [[1, 0], [2, 0]]
    adapter = an_adapter(
        {"0": PAIR, "1": conv},
        biases={"0": np.array([10, 20], np.float32)},
        replaced={"1.bias": np.array([5, 6], ml_dtypes.bfloat16)},
    )
    weight = model[0].weight
    layers.fold(model, plan_for(model, adapter))
    assert model[0].weight is weight
    assert equal(weight.detach(), torch.tensor([[3.0, 2, 1], [8, 5, 2]]))
    assert equal(model[0].bias.detach(), torch.tensor([11.0, 19.0]))
    assert equal(model[1].weight.detach(), torch.tensor([[2.0, 2], [5, 4]]))
    assert equal(model[1].bias.detach(), torch.tensor([5.0, 6.0]))
    assert type(model[0]) is nn.Linear


def test_a_folded_encoder_is_w_plus_sba() -> None:
    base = an_encoder_layer().double().eval()
    pairs, changes = encoder_changes()
    expected = by_hand(base, changes)
    layers.fold(base, plan_for(base, an_adapter(pairs)))
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(base.state_dict()[name], tensor, rtol=1e-15, atol=1e-15)


def test_fold_in_bf16_gives_the_bits_of_a_checkpoint_merge() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32)).to(torch.bfloat16)
    rng = np.random.default_rng(0)
    pairs = [
        LoraPair(a=rng.normal(size=(4, 32)), b=rng.normal(size=(32, 4)) / 50, scale=0.3),
        LoraPair(a=rng.normal(size=(4, 32)), b=rng.normal(size=(32, 4)) / 50, scale=0.7),
    ]
    weight = model[0].weight.detach().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    expected = rounded_sum(weight, pairs[0].delta() + pairs[1].delta())
    layers.fold(
        model, plan_for(model, an_adapter({"0": pairs[0]}, name="one"), an_adapter({"0": pairs[1]}, name="two"))
    )
    assert (weight.view(np.uint16) == expected.view(np.uint16)).all()


def test_fold_in_fp64_computes_the_change_in_fp64() -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False)).double()
    nn.init.zeros_(model[0].weight)
    pair = LoraPair(a=np.full((1, 3), 0.1), b=np.full((2, 1), 0.1), scale=0.1)
    layers.fold(model, plan_for(model, an_adapter({"0": pair})))
    tenth = float(np.float32(0.1))
    expected = torch.full((2, 3), tenth * tenth * 0.1, dtype=torch.float64)
    torch.testing.assert_close(model[0].weight.detach(), expected, rtol=1e-15, atol=0)


def test_an_overflow_is_refused_before_anything_changes() -> None:
    model = nn.Sequential(a_linear(torch.float16), a_linear(torch.float16))
    huge = LoraPair(a=np.array([[1e3, 0, 0]]), b=np.array([[1e3], [0]]), scale=1.0)
    with pytest.raises(InputRefused, match=r"1\.weight: 1 values would not be finite: the largest is 1e\+06, float16"):
        layers.fold(model, plan_for(model, an_adapter({"0": PAIR, "1": huge})))
    assert equal(model[0].weight.detach(), a_linear(torch.float16).weight.detach())


def test_a_base_that_is_not_finite_is_refused() -> None:
    model = a_model()
    with torch.no_grad():
        model[0].weight[1, 2] = float("-inf")
    with pytest.raises(InputRefused, match=r"0\.weight: 1 values .*: the base's own tensor has some"):
        layers.fold(model, plan_for(model, an_adapter({"0": PAIR})))
