"""The names that PyTorch keeps to itself are what they were: each function fails under its own name."""

from __future__ import annotations

import torch
from torch import nn

from lora_export.layers import torch_internals
from lora_export.layers.torch_internals import own_buffers, own_modules, own_parameters, unsaved_buffers


def test_parameters_buffers_and_children_are_those_of_the_module_itself() -> None:
    module = nn.BatchNorm1d(2)
    module.register_buffer("mask", torch.ones(2), persistent=False)
    module.add_module("child", nn.Linear(2, 2))
    assert own_parameters(module)["weight"] is module.weight and set(own_parameters(module)) == {"weight", "bias"}
    assert set(own_buffers(module)) == {"running_mean", "running_var", "num_batches_tracked", "mask"}
    assert own_modules(module) == {"child": module.child} and unsaved_buffers(module) == {"mask"}
    own_parameters(module)["weight"] = own_buffers(module)["mask"] = None
    unsaved_buffers(module).clear()
    assert module.weight is None and module.mask is None and "mask" not in dict(module.named_buffers())


def test_results_are_plain_without_the_rules_of_a_subclass() -> None:
    class Own(torch.Tensor):
        pass

    tensor = torch.ones(2).as_subclass(Own)
    assert type(tensor.detach()) is Own
    with torch_internals.without_subclass_rules():
        assert type(tensor.detach()) is torch.Tensor


def test_reshaped_values_are_no_view() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    reshaped = torch_internals.reshaped_alone(x * 2, [3, 2])
    assert reshaped.shape == (3, 2) and not reshaped._is_view() and (x * 2).view(3, 2)._is_view()
