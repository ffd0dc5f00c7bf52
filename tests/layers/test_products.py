"""Products by oneDNN and by PyTorch's own library, beside fp64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor

from lora_export.layers import products
from lora_export.layers.frozen_linear import linear_with_pair
from lora_export.layers.products import fastest_products, product
from lora_export.layers.torch_internals import has_onednn_linear
from lora_export.training.batches import Batch
from lora_export.training.evaluation import HeadLoss
from support.small_layers import count_calls

NAMES = ("x", "bias", "a", "b")
ROUNDING = 2.0**-17  # of the largest value: sums of up to 300 products in fp32


@pytest.fixture(params=[True, False], ids=["onednn", "own"])
def by_onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    if request.param and not has_onednn_linear():
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(products, "IS_ONEDNN_FASTER", request.param)
    with fastest_products():
        yield request.param


def assert_near(found: Tensor, exact: Tensor) -> None:
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=ROUNDING * float(exact.detach().abs().max()))


def large(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("is_view", [False, True])
def test_products_are_those_of_fp64(is_view: bool, by_onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch, products, "onednn_linear")
    x, weight, bias = large(100, 96), large(64, 96), large(64)
    if is_view:
        x, weight = x.T.contiguous().T, weight.T.contiguous().T
    assert_near(product(x, weight, bias), F.linear(x.double(), weight.double(), bias.double()))
    assert_near(product(x, weight), x.double() @ weight.double().T)
    assert len(calls) == 2 * by_onednn


@pytest.mark.parametrize("kind", ["strided", "expanded", "for all outputs"])
def test_a_bias_of_any_strides_is_added(kind: str, by_onednn: bool) -> None:
    x, weight = large(100, 96), large(64, 96)
    bias = {"strided": large(64, 3)[:, 1], "expanded": large(1).expand(64), "for all outputs": large(1)}[kind]
    assert_near(product(x, weight, bias), F.linear(x.double(), weight.double(), bias.double()))


def test_few_numbers_of_rows_reach_onednn(by_onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps code for each of them."""
    seen = set()
    monkeypatch.setattr(products, "onednn_linear", lambda x, *_: seen.add(len(x)) or x)
    for rows in range(100, 4000, 7):
        product(large(1, 256).expand(rows, 256), large(64, 256))
    assert len(seen) <= 45 * by_onednn and all(rows < 4400 for rows in seen)


def test_steps_beside_a_frozen_weight_are_those_of_fp64(by_onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch, products, "onednn_linear")
    shapes = {"x": (300, 128), "weight": (192, 128), "bias": (192,), "a": (16, 128), "b": (192, 16)}
    one = {name: large(*shape) for name, shape in shapes.items()}
    wide = {name: tensor.double().requires_grad_(name in NAMES) for name, tensor in one.items()}
    one = {name: tensor.requires_grad_(name in NAMES) for name, tensor in one.items()}
    y = linear_with_pair(*(one[name] for name in ("x", "weight", "bias", "a", "b")), 0.75)
    exact = F.linear(wide["x"], wide["weight"], wide["bias"]) + 0.75 * wide["x"] @ wide["a"].T @ wide["b"].T
    assert_near(y, exact)
    own = torch.autograd.grad(y.square().mean(), [one[name] for name in NAMES])
    for found, wanted in zip(own, torch.autograd.grad(exact.square().mean(), [wide[n] for n in NAMES]), strict=True):
        assert_near(found, wanted)
    assert len(calls) == 2 * by_onednn  # of W; those of the pair are small


def test_losses_of_a_head_are_those_of_fp64(by_onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch, products, "onednn_linear")
    states, head, labels = large(50, 64).requires_grad_(), torch.nn.Linear(64, 400), torch.arange(50)
    wide = states.detach().double().requires_grad_()
    found = HeadLoss(head.requires_grad_(False)).total(states, Batch({}, labels))
    exact = F.cross_entropy(F.linear(wide, head.weight.double(), head.bias.double()), labels, reduction="sum")
    assert_near(found, exact)
    for own, wanted in zip(torch.autograd.grad(found, states), torch.autograd.grad(exact, wide), strict=True):
        assert_near(own, wanted)
    assert len(calls) == 2 * by_onednn


def test_small_compiled_and_other_products_are_pytorchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch, products, "onednn_linear")
    monkeypatch.setattr(products, "IS_ONEDNN_FASTER", True)
    x, weight = large(100, 96), large(64, 96)
    with fastest_products():
        for dtype in (torch.float64, torch.bfloat16):
            assert torch.equal(product(x.to(dtype), weight.to(dtype)), F.linear(x.to(dtype), weight.to(dtype)))
        assert torch.equal(product(x[:4], weight), F.linear(x[:4], weight)) and not calls
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert torch.equal(product(x, weight), F.linear(x, weight)) and not calls
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    assert torch.equal(product(x, weight), F.linear(x, weight)) and not calls  # no training


@pytest.mark.parametrize(
    ("name", "avx512", "has_mkl", "is_faster"),
    [
        ("AMD EPYC", True, True, True),
        ("AMD EPYC", False, True, False),
        ("AMD EPYC", True, False, False),
        ("Intel(R) Xeon(R)", True, True, False),
    ],
)
def test_onednn_is_for_amd_with_avx512(
    name: str, avx512: bool, has_mkl: bool, is_faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name, "avx512_f": avx512}, raising=False)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: has_mkl)
    monkeypatch.setattr(products, "has_onednn_linear", lambda: True)
    assert products._is_onednn_faster() is is_faster
