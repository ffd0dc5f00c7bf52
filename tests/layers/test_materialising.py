"""Turn attached adapters into plain, rounded weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_export import layers
from lora_export.layers import materialising
from lora_export.lora import LoraPair
from lora_export.models.stored_parameter import StoredParameter
from support.small_layers import PAIR, a_linear, a_model, an_adapter, delta, equal, plan_for


def test_sums_are_rounded_once_and_layers_are_plain() -> None:
    module = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 256.0]]))
    pair = LoraPair(a=np.array([[1, 1]]), b=np.array([[0.625]]), scale=1.0)
    holder = nn.Sequential(module)
    adapter = an_adapter({"0": pair})
    layers.attach(holder, plan_for(holder, adapter))
    layers.materialise(holder, {"0.weight": "bfloat16"}, preferred={})
    assert type(holder[0]) is nn.Linear
    # bf16 has steps of 1/128 at 1.625, which it holds, and of 2 at 256.625, which it rounds to 256.
    assert holder[0].weight.tolist() == [[1.625, 256.0]]
    assert holder[0].weight.dtype == torch.bfloat16


def test_a_preferred_value_is_taken_only_within_fp32_error() -> None:
    holder = nn.Sequential(nn.Linear(3, 1, bias=False)).double()
    with torch.no_grad():
        holder[0].weight.copy_(torch.tensor([[256.0, 256.0, 256.0]]))
    # The middle of bf16's 256 and 258 is 257: one sum is equal to it, one a little and one well above.
    pair = LoraPair(a=np.array([[1.0, 1.0005, 1.25]]), b=np.array([[1.0]]), scale=1.0)
    adapter = an_adapter({"0": pair})
    for preferred in (256.0, 258.0):
        model = copy.deepcopy(holder)
        layers.attach(model, plan_for(model, adapter))
        layers.materialise(model, {"0.weight": "bfloat16"}, preferred={"0.weight": torch.full((1, 3), preferred)})
        assert model[0].weight.tolist() == [[preferred, preferred, 258.0]]


def _stored_by_columns() -> nn.Linear:
    """A layer whose weight is the transpose of another, as that of a decoder whose encoder shares it."""
    layer = nn.Linear(5, 7, bias=False)
    layer.weight = nn.Parameter(torch.randn(5, 7).T)
    return layer


@pytest.mark.parametrize(
    ("make", "is_transposed", "fields", "names"),
    [
        (lambda: nn.Linear(5, 7, bias=False), False, {}, ("a",)),
        (lambda: nn.Linear(5, 7, bias=False), False, {}, ("a", "b")),
        (_stored_by_columns, False, {}, ("a",)),
        (lambda: Conv1D(7, 5), True, {}, ("a", "b")),
        (lambda: nn.Embedding(5, 7), True, {"embedding": True}, ("a",)),
        (lambda: nn.Linear(5, 7, bias=False), False, {"magnitude": np.linspace(1, 2, 7, dtype=np.float32)}, ("a",)),
    ],
    ids=["linear", "two adapters", "stored by columns", "conv1d", "embedding", "dora"],
)
def test_a_large_weight_is_rounded_part_by_part(
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], nn.Module],
    is_transposed: bool,
    fields: dict[str, Any],
    names: tuple[str, ...],
) -> None:
    torch.manual_seed(0)
    holder = nn.Sequential(make()).double().requires_grad_(False)
    pairs = {
        name: LoraPair(a=torch.randn(2, 5).numpy(), b=torch.randn(7, 2).numpy(), scale=0.5, **fields) for name in names
    }
    weight = holder[0].weight.numpy()
    exact = (weight.T if is_transposed else weight) + sum(map(delta, pairs.values()))
    if "magnitude" in fields:
        exact *= (fields["magnitude"] / np.linalg.norm(exact, axis=1))[:, None]
    exact = torch.from_numpy(exact.T.copy() if is_transposed else exact)
    in_fp32 = exact.float().bfloat16().double()
    preferred = in_fp32.clone()
    preferred[3, 1] *= 1.5  # too far away to be taken
    monkeypatch.setattr(materialising, "ROUNDED_AT_ONCE", 11)
    adapters = [an_adapter({"0": pair}, name=name) for name, pair in pairs.items()]
    layers.attach(holder, plan_for(holder, *adapters))
    reads = []
    stored = StoredParameter(preferred.shape, lambda: reads.append(1) or preferred.float())
    layers.materialise(holder, {"0.weight": "bfloat16"}, preferred={"0.weight": stored})
    assert holder[0].weight.dtype == torch.bfloat16
    assert equal(holder[0].weight.detach().double(), in_fp32)
    assert len(reads) == 1  # not once for each part


def test_a_bare_layer_takes_preferred_values_too() -> None:
    layer = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(layer.weight, 256)
    pair = LoraPair(a=np.array([[1.0]]), b=np.array([[1.0]]), scale=1.0)  # the sum, 257, is in the middle
    for preferred in (256.0, 258.0):
        model = copy.deepcopy(layer)
        layers.attach(model, plan_for(model, an_adapter({"weight": pair})))
        layers.materialise(model, {"weight": "bfloat16"}, preferred={"weight": torch.full((1, 1), preferred)})
        assert model.weight.item() == preferred


def test_a_rounding_function_replaces_the_dtype() -> None:
    model = a_model()
    layers.attach(model, plan_for(model, an_adapter({"0": PAIR})))
    layers.materialise(model, {"0.weight": lambda sums: 4 * np.round(sums / 4)}, preferred={})
    assert model[0].weight.tolist() == [[4, 0, 0], [8, 4, 0]]  # of [[3, 2, 1], [8, 5, 2]]


def test_tensors_that_no_adapter_changes_are_rounded_too_and_stay_tied() -> None:
    model = nn.ModuleDict({"words": nn.Embedding(1, 1), "head": nn.Linear(1, 1, bias=False), "linear": a_linear()})
    nn.init.constant_(model["words"].weight, 257.5)
    model["head"].weight = model["words"].weight
    layers.attach(model, plan_for(model, an_adapter({"linear": PAIR})))
    layers.materialise(model, dict.fromkeys(("words.weight", "head.weight"), "bfloat16"), preferred={})
    assert model["words"].weight.item() == 258
    assert model["head"].weight is model["words"].weight


@pytest.mark.parametrize(("scale_replaced", "bias"), [(False, [0.0, 0.0]), (True, [0.5, -0.5])])
def test_factor_scales_pairs_and_replaced_tensors_where_asked(scale_replaced: bool, bias: list[float]) -> None:
    model = a_model()
    layers.attach(model, plan_for(model, an_adapter({"0": PAIR}, replaced={"0.bias": np.zeros(2, np.float32)})))
    layers.materialise(model, {}, preferred={}, factor=0.5, scale_replaced=scale_replaced)
    assert model[0].weight.tolist() == [[2, 2, 2], [6, 5, 4]]
    assert model[0].bias.tolist() == bias
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
