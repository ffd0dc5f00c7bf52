"""The weights whose products can be observed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_export import layers
from support.small_layers import PAIR, a_linear, a_model, an_adapter, equal, plan_for


def test_every_kind_of_layer_is_found_with_its_matrix_shape() -> None:
    module = nn.ModuleDict(
        {
            "linear": nn.Linear(3, 2),
            "conv": nn.Conv2d(2, 4, (1, 5), bias=False),
            "fan": Conv1D(5, 3),
            "words": nn.Embedding(7, 3),
            "norm": nn.LayerNorm(3),
        }
    )
    found = {weight.name: (weight.matrix_shape, weight.has_bias) for weight in layers.find_matrix_weights(module)}
    assert found == {
        "linear.weight": ((2, 3), True),
        "conv.weight": ((4, 10), False),
        "fan.weight": ((5, 3), True),
        "words.weight": ((3, 7), False),
    }


def test_attention_weights_name_the_module_that_computes_with_them() -> None:
    attention = nn.MultiheadAttention(4, 2)
    found = {weight.name: weight for weight in layers.find_matrix_weights(nn.ModuleDict({"attn": attention}))}
    assert list(found) == ["attn.in_proj_weight", "attn.out_proj.weight"]
    assert all(weight.attention is attention for weight in found.values())
    assert found["attn.in_proj_weight"].matrix_shape == (12, 4)
    assert found["attn.in_proj_weight"].bias is attention.in_proj_bias


def test_a_layer_with_a_forward_of_its_own_is_left_out() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    assert layers.find_matrix_weights(nn.Sequential(Doubled(3, 2))) == []


def test_an_attached_layer_has_its_stored_tensor_and_its_shifted_bias() -> None:
    model = a_model()
    shift = torch.tensor([10.0, 20.0])
    layers.attach(model, plan_for(model, an_adapter({"0": PAIR}, biases={"0": shift.numpy()})))
    (weight,) = layers.find_matrix_weights(model)
    assert equal(weight.tensor.detach(), a_linear().weight.detach())
    assert weight.bias is not None and equal(weight.bias.detach(), torch.tensor([11.0, 19.0]))
