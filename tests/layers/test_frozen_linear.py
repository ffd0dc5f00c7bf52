"""Frozen weights, in 4 bits or not: their values, products and gradients beside bitsandbytes and plain floats."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_export import layers
from lora_export.errors import InputRefused, MatchError
from lora_export.layers import adapted_layers
from lora_export.layers.frozen_linear import (
    FourBitLayer,
    compute_in_input_dtype,
    float_shape,
    float_weight,
    four_bit_layers,
    is_4bit,
    is_plain,
    linear,
    linear_with_pair,
    scales_of_4bit,
    state_of_4bit,
)
from support.small_layers import a_pair, an_adapter, count_calls, plan_for


def in_4_bits(inner: int = 16, out: int = 8, *, kind: str = "nf4", double: bool = True) -> bnb.nn.Linear4bit:
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(inner, out, quant_type=kind, compress_statistics=double)
    return layer.to("cpu").requires_grad_(False)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_values_are_those_of_bitsandbytes(kind: str, double: bool) -> None:
    weight = in_4_bits(256, 72, kind=kind, double=double).weight  # 288 blocks: more than one of scales
    expected = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    found = float_weight(weight)
    assert type(found) is Tensor and torch.equal(found, expected) and float_shape(weight) == (72, 256)
    assert torch.equal(float_weight(weight, torch.bfloat16), expected.bfloat16())
    assert torch.equal(float_weight(weight, torch.float64), expected.double())
    assert len(list(scales_of_4bit(weight))) == (5 if double else 2)


def test_other_tensors_stay_as_they_are() -> None:
    weight = nn.Parameter(torch.ones(2, 3))
    assert float_weight(weight) is weight and not is_4bit(weight) and state_of_4bit(weight) is None
    assert float_shape(weight) == (2, 3) and not list(scales_of_4bit(weight))
    assert four_bit_layers(nn.Linear(2, 3)) == ""


def test_products_and_gradients_are_those_of_the_floats() -> None:
    layer = in_4_bits()
    x = torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(8, dtype=torch.float64, requires_grad=True)
    values = float_weight(layer.weight, torch.float64)
    torch.testing.assert_close(linear(x, layer.weight, bias), F.linear(x, values, bias), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x, bias: linear(x, layer.weight, bias), (x, bias))
    assert torch.equal(linear(x[0, 0].float(), values.float(), None), F.linear(x[0, 0].float(), values.float()))


def test_only_the_packed_numbers_are_saved() -> None:
    layer, saved = in_4_bits(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tuple(tensor.shape)) or tensor, id):
        linear(torch.ones(3, 16, requires_grad=True), layer.weight, None)
    assert saved == [(8 * 16 // 2, 1)]


def test_autocast_decides_the_dtype() -> None:
    layer = in_4_bits()
    x = torch.randn(3, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, layer.weight, layer.bias)
    expected = F.linear(x.bfloat16(), float_weight(layer.weight, torch.bfloat16), layer.bias.bfloat16())
    assert y.dtype is torch.bfloat16 and torch.equal(y, expected)
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype is torch.float32


def test_a_layer_computes_in_the_dtype_of_its_input() -> None:
    net = nn.Sequential(in_4_bits(), nn.Tanh()).eval()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    compute_in_input_dtype(net)
    compute_in_input_dtype(net)  # nothing is left to do
    assert isinstance(net[0], FourBitLayer) and isinstance(net[0], bnb.nn.Linear4bit)
    x = torch.randn(4, 16)
    with torch.no_grad():
        assert torch.equal(net[0](x), F.linear(x, float_weight(net[0].weight), net[0].bias))
    assert {name: value.tolist() for name, value in net.state_dict().items()} == {
        n: v.tolist() for n, v in state.items()
    }
    assert four_bit_layers(net) == "1 layer in 4 bits (nf4, double quantisation)"
    assert four_bit_layers(nn.ModuleList([in_4_bits(double=False), *net])) == (
        "2 layers in 4 bits (nf4; nf4, double quantisation)"
    )


# --- Adapters beside them ---


def test_an_adapter_fits_the_matrix_and_is_detached_again() -> None:
    net = nn.Sequential(in_4_bits())
    (spec,) = (spec for spec in layers.specs(net) if spec.name == "0.weight")
    assert (spec.shape, spec.dtype) == ((8, 16), "float32")
    assert layers.count_parameters(net).total == 8 * 16 + 8
    pair, x, original = a_pair(8, 16), torch.randn(3, 16), type(net[0])
    compute_in_input_dtype(net)
    layers.attach(net, plan_for(net, an_adapter({"0": pair})))
    total = float_weight(net[0].weight) + torch.from_numpy(pair.delta())
    torch.testing.assert_close(net(x), F.linear(x, total, net[0].bias))
    assert "0.weight.absmax" in net.state_dict()
    layers.detach(net)
    assert isinstance(net[0], original) and torch.equal(net(x), linear(x, net[0].weight, net[0].bias))


def test_what_is_no_float_is_refused() -> None:
    def refused(net: nn.Module, message: str, **fields: object) -> None:
        adapter = an_adapter({} if fields else {"0": a_pair(8, 16)}, **fields)
        with pytest.raises(InputRefused, match=message):
            layers.attach(net, plan_for(net, adapter), trainable=True)

    packed, float_value = nn.Sequential(in_4_bits()), torch.ones(8, 16).numpy()
    refused(packed, "0.weight is in 4 bits: a pair can be trained", replaced={"0.weight": float_value})
    refused(nn.Sequential(bnb.nn.Linear4bit(16, 8)), "is not quantised yet: move the Linear4bit to its device")
    eight = bnb.nn.Linear8bitLt(16, 8, has_fp16_weights=False)
    eight.weight = bnb.nn.Int8Params(torch.ones(8, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(MatchError, match=r"0\.weight is int8: a quantised weight is never merged silently"):
        plan_for(nn.Sequential(eight), an_adapter({"0": a_pair(8, 16)}))
    with pytest.raises(InputRefused, match="nothing is folded into weights in 4 bits"):
        layers.fold(packed, plan_for(packed, an_adapter({"0": a_pair(8, 16)})))
    with pytest.raises(InputRefused, match="weights in 4 bits are not trained as a whole"):
        layers.create_adapter(
            nn.Sequential(in_4_bits(), nn.Linear(8, 8)), targets=["1"], rank=1, alpha=1, seed=0, modules_to_save=["0"]
        )


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
