"""Weights in 4 bits: their values, products and gradients beside bitsandbytes and plain floats."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor, nn

from lora_export import layers
from lora_export.errors import InputRefused, MatchError
from lora_export.layers.four_bit_weights import (
    FourBitLayer,
    compute_in_input_dtype,
    float_shape,
    float_weight,
    four_bit_layers,
    is_4bit,
    linear,
    scales_of_4bit,
    state_of_4bit,
)
from support.small_layers import a_pair, an_adapter, plan_for


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
