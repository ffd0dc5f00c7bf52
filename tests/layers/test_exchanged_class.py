"""A module of another class keeps its tensors and its copies; the class before can come back."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import nn

from lora_export.layers.exchanged_class import exchange_class, exchange_forward, subclass


def test_copies_compute_with_the_new_forward_until_the_class_comes_back() -> None:
    module, x = nn.Linear(2, 1), torch.ones(1, 2)
    weight, own = module.weight, module(x)

    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        return nn.Linear.forward(self, input) + self.shift

    exchange_forward(module, forward, shift=2)
    assert isinstance(module, nn.Linear) and module.weight is weight and list(module.state_dict()) == ["weight", "bias"]
    assert (type(module).__name__, type(module).__module__) == ("Linear", nn.Linear.__module__)
    assert list(inspect.signature(module.forward).parameters) == ["input"]
    for each in (module, copy.deepcopy(module)):
        assert torch.equal(each(x), own + 2)
    exchange_class(module, nn.Linear)
    assert type(module) is nn.Linear and torch.equal(module(x), own)


def test_a_subclass_is_made_once_for_its_bases_and_attributes() -> None:
    made = subclass("Mine", (nn.Linear,))
    assert made is subclass("Mine", (nn.Linear,)) and issubclass(made, nn.Linear)
    others = {subclass("Mine", (nn.Conv1d,)), subclass("Mine", (nn.Linear,), {"a": 1}), subclass("Own", (nn.Linear,))}
    assert len(others | {made}) == 4
