"""A frozen linear layer with a trained pair, as one step of autograd: values, gradients, and what is saved."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_export import layers
from lora_export.layers import adapted_layers
from lora_export.layers.four_bit_weights import float_weight, linear
from lora_export.layers.frozen_linear import is_plain, linear_with_pair
from support.small_layers import count_calls, plan_for

TENSORS = ("x", "bias", "a", "b")


def operands(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"x": (2, 3, 5), "weight": (4, 5), "bias": (4,), "a": (2, 5), "b": (4, 2)}
    made = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    return {name: tensor.requires_grad_(name != "weight") for name, tensor in made.items()}


@pytest.mark.parametrize("has_bias", [True, False])
def test_values_and_gradients_are_those_of_the_sum(has_bias: bool) -> None:
    one = operands()
    bias = one["bias"] if has_bias else None

    def step(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return linear_with_pair(x, one["weight"], bias, a, b, 0.75)

    expected = F.linear(one["x"], one["weight"], bias) + 0.75 * F.linear(F.linear(one["x"], one["a"]), one["b"])
    torch.testing.assert_close(step(one["x"], one["a"], one["b"]), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(step, (one["x"], one["a"], one["b"]))
    wanted = [name for name in TENSORS if has_bias or name != "bias"]
    gradients = torch.autograd.grad(expected.square().sum(), [one[name] for name in wanted])
    own = torch.autograd.grad(step(one["x"], one["a"], one["b"]).square().sum(), [one[name] for name in wanted])
    for ours, theirs in zip(own, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_entries_of_the_pairs_input_are_dropped() -> None:
    one = operands()
    wanted = [one[name] for name in TENSORS]
    torch.manual_seed(1)
    own = linear_with_pair(one["x"], one["weight"], one["bias"], one["a"], one["b"], 0.75, 0.4)
    gradients = torch.autograd.grad(own.square().sum(), wanted)
    torch.manual_seed(1)
    kept = F.dropout(one["x"], 0.4)
    assert 0 < (kept == 0).sum() < kept.numel()
    expected = F.linear(one["x"], one["weight"], one["bias"]) + 0.75 * F.linear(F.linear(kept, one["a"]), one["b"])
    torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected.square().sum(), wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_weight_in_4_bits_is_taken_by_its_values() -> None:
    packed = bnb.nn.Linear4bit(6, 4, bias=False, quant_type="nf4").to("cpu").weight
    own = [torch.randn(shape, requires_grad=True) for shape in ((2, 3, 6), (2, 6), (4, 2))]
    assert is_plain(own[0], packed, own[1]) and not is_plain(own[0].double(), packed, own[1])

    def step(weight: Tensor) -> tuple[Tensor, ...]:
        y = linear_with_pair(own[0], weight, None, *own[1:], 0.75)
        return y, *torch.autograd.grad(y.sin().sum(), own)

    for of_packed, of_floats in zip(step(packed), step(float_weight(packed)), strict=True):
        assert torch.equal(of_packed, of_floats)


@pytest.mark.parametrize("in_4_bits", [False, True])
def test_the_output_may_be_changed_in_place(in_4_bits: bool) -> None:
    """Speech models of transformers overwrite frames."""
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(6, 4, quant_type="nf4").to("cpu") if in_4_bits else nn.Linear(6, 4)
    weight = layer.weight.requires_grad_(False)
    x, a, b = (torch.randn(shape, requires_grad=True) for shape in ((2, 3, 6), (2, 6), (4, 2)))
    for y in (linear_with_pair(x, weight, None, a, b, 0.75), linear(x, weight, None)):
        y[:, 1] = 0
        (of_x,) = torch.autograd.grad(y.sum(), x)
        assert not of_x[:, 1].any() and of_x[:, 0].any()


def test_only_x_and_its_product_with_a_are_saved() -> None:
    one = operands()
    saved: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        linear_with_pair(one["x"], one["weight"], None, one["a"], one["b"], 1.0)
    assert sorted(saved) == sorted([(6, 5), (6, 2), (4, 5), (2, 5), (4, 2)])


def test_the_step_is_for_one_dtype_and_a_frozen_weight() -> None:
    one = operands()
    x, weight, a = one["x"], one["weight"], one["a"]
    assert is_plain(x, weight, a)
    assert not is_plain(x.float(), weight, a) and not is_plain(x, weight.clone().requires_grad_(), a)
    with torch.no_grad():
        assert not is_plain(x, weight, a)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_plain(x, weight, a)  # autocast leaves fp64 as it is
        assert is_plain(x.float(), weight.bfloat16(), a.float())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_autocast_decides_the_dtype_and_w_is_kept_as_stored(stored: torch.dtype) -> None:
    one = {name: tensor.detach().float().requires_grad_() for name, tensor in operands().items()}
    weight = one.pop("weight").detach().to(stored)
    saved: dict[tuple[int, ...], torch.dtype] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tuple(tensor.shape)] = tensor.dtype
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        y = linear_with_pair(one["x"], weight, one["bias"], one["a"], one["b"], 0.75)
    gradients = torch.autograd.grad(y.float().square().sum(), list(one.values()))
    assert y.dtype is torch.bfloat16 and saved[4, 5] is stored and saved[6, 5] is torch.bfloat16
    wide = {name: tensor.detach().bfloat16().double().requires_grad_() for name, tensor in one.items()}
    exact = F.linear(wide["x"], weight.bfloat16().double(), wide["bias"])
    exact = exact + 0.75 * F.linear(F.linear(wide["x"], wide["a"]), wide["b"])
    torch.testing.assert_close(y.double(), exact, rtol=2**-7, atol=2**-7)
    wanted = torch.autograd.grad(exact.square().sum(), list(wide.values()))
    for ours, theirs in zip(gradients, wanted, strict=True):
        assert ours.dtype is torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=2**-4, atol=2**-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("layer", [nn.Linear(5, 4), Conv1D(4, 5)], ids=["Linear", "Conv1D"])
def test_attached_layers_take_it_in_training_alone(layer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch, adapted_layers, "linear_with_pair")
    net = nn.Sequential(copy.deepcopy(layer))
    new = layers.create_adapter(net, targets="all-linear", rank=2, alpha=4, seed=0)
    layers.attach(net, plan_for(net, new, identity_ok=True), trainable=True)
    with torch.no_grad():
        net[0].lora_B["default"].normal_()
        x = torch.randn(3, 5)
        expected = net(x)
    assert not calls
    torch.testing.assert_close(net(x), expected)
    assert len(calls) == 1
    with layers.recorded_branches() as recorded:
        net(x)
    assert len(recorded) == 1 and len(calls) == 1
    adapted_layers.attachment_of(net[0]).dropout = 0.5
    assert not torch.equal(net(x), net(x)) and len(calls) == 3
    torch.testing.assert_close(net.eval()(x), expected)
