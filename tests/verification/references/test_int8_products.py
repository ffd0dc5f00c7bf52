"""PyTorch has the error of products whose inputs are rounded to int8."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from lora_export.errors import Undecided
from lora_export.verification.parity import Wide
from lora_export.verification.references.int8_products import round_activations
from lora_export.verification.references.quantisation_error import NearestNumbers
from lora_export.verification.references.quantised_weights import DequantisedWeight


def in_int8(weight: NDArray[np.float32]) -> DequantisedWeight:
    def rounding(_: Wide) -> NearestNumbers:
        raise AssertionError("activations are rounded, not weights")

    return DequantisedWeight("4 bits", weight, 0.0, activation_block=2, rounding=rounding)


def test_activations_round_to_127_levels_of_each_block() -> None:
    module = nn.Module()
    module.layer = nn.Linear(4, 4, bias=False)
    nn.init.eye_(module.layer.weight)
    weight = np.eye(4, dtype=np.float32)
    round_activations(
        module,
        {"layer.weight": in_int8(weight)},
    )
    answer = module.layer(torch.tensor([[127.0, 3.4, 0.0, 0.0], [1.0, 0.5, -12.7, 0.34]]))
    expected = [[127, 3, 0, 0], [1, 64 / 127, -12.7, 0.3]]
    np.testing.assert_allclose(answer.detach().numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["attn.in_proj_weight", "attn.out_proj.weight"])
def test_multihead_attention_in_int8_is_undecided(name: str) -> None:
    module = nn.Module()
    module.attn = nn.MultiheadAttention(4, 2)
    weight = module.get_parameter(name).detach().numpy()
    weights = {name: in_int8(weight)}
    with pytest.raises(Undecided, match=rf"{name} is multiplied in int8, .*an accuracy_level below 4"):
        round_activations(module, weights)
    round_activations(module, {name: dataclasses.replace(weights[name], activation_block=0)})
