"""Count trainable parameters, and read a trained adapter back."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from lora_export import layers, plan
from lora_export.errors import InputRefused
from support.small_layers import PAIR, a_model, a_pair, an_adapter, plan_for


def test_trainable_parameters_are_counted() -> None:
    model = a_model()
    layers.attach(model, plan_for(model, an_adapter({"0": PAIR})), trainable=True)
    count = layers.count_parameters(model)
    assert (count.trained, count.total) == (5, 13)
    assert str(count) == "trainable parameters: 5 of 13 (38.5 %)"
    assert str(layers.ParameterCount(12_288, 22_713_216)) == "trainable parameters: 12,288 of 22,713,216 (0.0541 %)"


def test_trained_values_are_read_back() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2), "head": nn.Linear(4, 2).to(torch.bfloat16)})
    adapter = layers.create_adapter(
        model, targets=["attn", "out_proj"], rank=1, alpha=2, seed=0, modules_to_save=["head"]
    )
    other = an_adapter({"attn.out_proj": a_pair(4, 4)}, name="other")
    layers.attach(model, plan_for(model, adapter, other, identity_ok=True, strengths=[3.0, 1.0]), trainable=True)
    with torch.no_grad():
        model.get_parameter("attn.lora_B.default").fill_(2)
        model.get_parameter("attn.out_proj.lora_A.default").fill_(3)
        model["head"].weight.fill_(5)
    trained = layers.read_back(model, adapter)
    assert (trained.pairs["attn"].b == 2).all()
    assert (trained.pairs["attn"].a == adapter.pairs["attn"].a).all()
    assert (trained.pairs["attn.out_proj"].a == 3).all()
    assert {pair.scale for pair in trained.pairs.values()} == {2.0}
    assert trained.replaced["head.weight"].dtype == ml_dtypes.bfloat16
    assert (trained.replaced["head.weight"] == 5).all()
    with torch.no_grad():
        model["head"].weight.fill_(6)
    assert (trained.replaced["head.weight"] == 5).all()  # a copy, not a window


def test_names_read_back_are_the_adapters_own() -> None:
    model = nn.ModuleDict({"bert": a_model()})
    bare = an_adapter({"0": PAIR}, replaced={"0.bias": np.zeros(2, np.float32)})
    layers.attach(model, plan_for(model, bare))
    trained = layers.read_back(model, bare)
    assert (list(trained.pairs), list(trained.replaced)) == (["0"], ["0.bias"])


def test_a_value_that_is_not_finite_is_refused() -> None:
    model = a_model()
    adapter = an_adapter({"0": PAIR})
    layers.attach(model, plan_for(model, adapter))
    with torch.no_grad():
        model.get_parameter("0.lora_B.default")[0] = float("nan")
    with pytest.raises(InputRefused, match="0: B holds 1 value that is not finite"):
        layers.read_back(model, adapter)


def test_an_adapter_that_is_not_attached_is_refused() -> None:
    model = a_model()
    layers.attach(model, plan_for(model, an_adapter({"0": PAIR}, name="one")))
    with pytest.raises(InputRefused, match="the adapter two is not attached"):
        layers.read_back(model, an_adapter({"0": PAIR}, name="two"))


def test_a_trainable_base_is_refused_and_adapters_and_heads_are_not() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    adapter = layers.create_adapter(module, targets=["0"], rank=2, alpha=4, seed=0, modules_to_save=["1"])
    layers.attach(module, plan.make([adapter], layers.specs(module), identity_ok=True), trainable=True)
    layers.refuse_trainable_base(module)
    module[0]._parameters["weight"].requires_grad_(True)
    with pytest.raises(InputRefused, match=r"these of its parameters would be trained:\n  0\.weight"):
        layers.refuse_trainable_base(module)


def test_what_is_trained_is_widened_and_the_frozen_rest_is_not() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.LayerNorm(4), nn.Linear(4, 2)).bfloat16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapter = layers.create_adapter(
        model, targets=["0"], rank=1, alpha=2, seed=0, modules_to_save=["3"], bias="all", exclude=["3"]
    )
    layers.attach(model, plan_for(model, adapter, identity_ok=True), trainable=True)
    model[2].requires_grad_(False)
    layers.widen_trained(model)
    wide = {name for name, tensor in model.named_parameters() if tensor.dtype is torch.float32}
    assert wide == {*("0.lora_A.default", "0.lora_B.default", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias")}
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.ones(2, 4, dtype=torch.bfloat16)).sum().backward()
    assert model[1].bias.grad.dtype is torch.float32
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name].to(tensor.dtype), tensor)


def test_fp64_is_no_half_precision() -> None:
    model = nn.Linear(2, 2).double()
    layers.widen_trained(model)
    assert model.weight.dtype is torch.float64
