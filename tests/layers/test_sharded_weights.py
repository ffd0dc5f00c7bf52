"""What a process holds of a weight."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

from lora_export import layers
from lora_export.layers.sharded_weights import is_in_shares, own_share
from support.small_layers import PAIR, a_model, an_adapter, plan_for


def test_a_plain_tensor_is_whole() -> None:
    tensor = torch.ones(2)
    assert own_share(tensor) is tensor and not is_in_shares(tensor)


@pytest.mark.usefixtures("process_group")
def test_a_weight_in_shares_is_read_as_it_is() -> None:
    model = a_model()
    layers.attach(model, plan_for(model, an_adapter({"0": PAIR})))
    weight = model[0]._parameters["weight"]
    in_shares = torch.nn.Parameter(distribute_tensor(weight.detach(), init_device_mesh("cpu", (1,)), [Replicate()]))
    assert not torch.equal(model[0].weight, weight)  # W + ΔW
    model[0]._parameters["weight"] = in_shares
    assert model[0].weight is in_shares
    assert is_in_shares(in_shares) and torch.equal(own_share(in_shares), weight)
