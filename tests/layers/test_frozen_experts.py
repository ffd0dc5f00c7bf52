"""Experts in training: the products of their rows, and W + ΔW where a model computes with it in another way."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import nn

from lora_export import layers, plan
from lora_export.layers import adapted_layers, attachments
from lora_export.layers.attachments import adapted_weight, is_attached, pairs_of_experts
from lora_export.layers.frozen_experts import ExpertsWeight
from lora_export.layers.torch_internals import grouped_products
from support import experts
from support.experts import experts_adapter, gates_of, some_experts_of
from support.small_layers import count_calls

IDS = torch.tensor([[3, 9, 27, 17, 51], [5, 15, 45, 7, 21]])


@pytest.fixture(autouse=True)
def _for_tiny_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attachments, "LEAST_OF_AN_EXPERT", 16)


def trained(model: nn.Module, *adapters: Any) -> nn.Module:
    module = copy.deepcopy(model)
    changes = plan.make(list(adapters or [experts_adapter(model)]), layers.specs(model))
    layers.attach(module, changes, trainable=True)
    return module


def experts_of(module: nn.Module) -> nn.Module:
    (owner,) = (one for one in module.modules() if is_attached(one))
    return owner


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    module(IDS).logits.square().sum().backward()
    return {name: one.grad for name, one in module.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_steps_are_those_of_the_sum_in_fp64(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = experts.tiny_model(family)
    model.set_experts_implementation("grouped_mm")
    wide = copy.deepcopy(model).double()
    wide.set_experts_implementation("eager")  # PyTorch's product of experts has no fp64
    module, wide = trained(model), trained(wide, experts_adapter(model))
    sums = count_calls(monkeypatch, adapted_layers, "adapted_weight")
    found = gradients(module)
    assert not sums
    exact = gradients(wide)
    assert len(sums) == 2 and found.keys() == exact.keys() and len(found) == 4 * experts.COUNT
    torch.testing.assert_close(module(IDS).logits.double(), wide(IDS).logits, rtol=0, atol=1e-6)
    for name, gradient in exact.items():
        torch.testing.assert_close(found[name].double(), gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
    assert max(float(gradient.abs().max()) for gradient in exact.values()) > 0.01


def test_rows_of_no_expert_are_zero_and_give_no_gradient() -> None:
    pairs = pairs_of_experts(experts_of(trained(experts.tiny_model("mixtral"))), "down_proj")
    assert pairs is not None
    x = torch.randn(6, pairs.weight.shape[2], requires_grad=True)
    ends = torch.tensor([2, 2, *[5] * (experts.COUNT - 2)])  # none of expert 1, and a last row of nobody
    y = pairs.product(x, ends)
    a, b = torch.autograd.grad(y.square().sum(), [pairs.a, pairs.b], retain_graph=True)
    (of_x,) = torch.autograd.grad(y.square().sum(), x)
    assert not y[5].any() and not of_x[5].any() and y[:5].any(1).all() and of_x[:5].any(1).all()
    assert [bool(one.any()) for one in a] == [bool(one.any()) for one in b] == [n in (0, 2) for n in range(len(a))]


def test_anywhere_else_the_weight_is_the_sum() -> None:
    owner = experts_of(trained(experts.tiny_model("mixtral")))
    pairs, total = pairs_of_experts(owner, "down_proj"), adapted_weight(owner, "down_proj")
    assert pairs is not None and total is not None and not torch.allclose(total, pairs.weight)
    weight = ExpertsWeight.of(pairs, lambda: total)
    x = torch.randn(3, total.shape[2])
    turned = weight.transpose(-2, -1)
    assert (weight.shape, weight.dtype, turned.shape) == (total.shape, total.dtype, total.mT.shape)
    others = [
        (weight[1], total[1]),
        (weight.mT, total.mT),
        (turned.mT, total),
        (weight.data, total),
        (turned[0], total[0].T),
    ]
    others += [(F.linear(x, weight[0]), F.linear(x, total[0])), (x @ turned, x @ total.mT), (2 * weight, 2 * total)]
    others += [(weight.transpose(0, 1), total.transpose(0, 1)), (torch.stack([weight])[0], total)]
    for found, wanted in others:
        assert type(found) is torch.Tensor and torch.equal(found, wanted)


def test_a_first_use_without_gradients_cuts_none(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = experts_of(trained(experts.tiny_model("mixtral")))
    token = adapted_layers._SUMMED.set({})
    try:
        weight = owner.down_proj
        assert type(weight) is ExpertsWeight
        with torch.no_grad():
            weight.abs()
        assert (2 * weight).requires_grad
    finally:
        adapted_layers._SUMMED.reset(token)


@pytest.mark.parametrize("ends", [torch.tensor([2, 3]), torch.tensor([3], dtype=torch.int32)], ids=["int64", "few"])
def test_ends_that_pytorch_refuses_are_refused(ends: torch.Tensor) -> None:
    owner = experts_of(trained(experts.tiny_model("mixtral")))
    pairs, total = pairs_of_experts(owner, "down_proj"), adapted_weight(owner, "down_proj")
    assert pairs is not None and total is not None
    turned = ExpertsWeight.of(pairs, lambda: total).transpose(-2, -1)
    with pytest.raises(RuntimeError):
        grouped_products()(torch.randn(3, total.shape[2]), turned, offs=ends)


@pytest.mark.parametrize("adapters", [[gates_of], [some_experts_of], [experts_adapter, some_experts_of]])
def test_pairs_of_some_experts_or_parts_are_summed(adapters: list[Any]) -> None:
    model = experts.tiny_model("mixtral")
    owner = experts_of(trained(model, *(make(model) for make in adapters)))
    assert pairs_of_experts(owner, "gate_up_proj") is None


@pytest.mark.parametrize(
    "context",
    [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16), layers.recorded_branches],
    ids=["no_grad", "autocast", "recorded"],
)
def test_only_steps_of_training_in_fp32_take_it(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = trained(experts.tiny_model("mixtral"))
    owner = experts_of(module)
    for where, is_taken in ((contextlib.nullcontext(), True), (context(), False)):
        with where:
            assert (pairs_of_experts(owner, "down_proj") is not None) is is_taken
    with layers.scale_adapters(module, 0.0):
        assert pairs_of_experts(owner, "down_proj") is None
    module.set_experts_implementation("eager")
    assert pairs_of_experts(owner, "down_proj") is None
    module.set_experts_implementation("grouped_mm")
    monkeypatch.setattr(attachments, "LEAST_OF_AN_EXPERT", 1 << 16)
    assert pairs_of_experts(owner, "down_proj") is None
    monkeypatch.setattr(attachments, "LEAST_OF_AN_EXPERT", 16)
    frozen = trained(experts.tiny_model("mixtral").bfloat16())
    assert pairs_of_experts(experts_of(frozen), "down_proj") is None
