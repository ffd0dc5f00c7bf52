"""Pairs that start from the weights: sums by hand. `test_training_against_peft.py` compares them with PEFT's."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from lora_export import layers, plan
from lora_export.errors import InputRefused
from lora_export.layers.initial_factors import (
    STARTING_POINT,
    Init,
    as_plain_lora,
    frozen_start,
    started_from_weights,
)
from lora_export.lora import Adapter, LoraPair
from support import experts
from support.small_layers import Everything, a_model, an_encoder_layer, base_of

IDS = torch.tensor([[1, 5, 0, 3, 3, 10, 2]])


def started(module: nn.Module, init: Init, targets: Any, **options: Any) -> Adapter:
    new = layers.create_adapter(module, **{"targets": targets, "rank": 2, "alpha": 3, "seed": 0, **options})
    return started_from_weights(module, new, init)


def as_matrix(pair: LoraPair) -> NDArray[np.float64]:
    return pair.scale * pair.b.reshape(-1, pair.rank).astype(np.float64) @ pair.a.reshape(pair.rank, -1)


def test_pissa_takes_the_largest_singular_values_in_equal_shares() -> None:
    module = nn.Sequential(nn.Linear(3, 3, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[0.0, 9, 0], [4, 0, 0], [0, 0, 1]]))
    pair = started(module, "pissa", ["0"], rank=2, alpha=2).pairs["0"]
    np.testing.assert_allclose(pair.delta(), [[0, 9, 0], [4, 0, 0], [0, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(np.abs(pair.a), [[0, 3, 0], [2, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(np.abs(pair.b), [[3, 0], [0, 2], [0, 0]], atol=1e-6)


def test_olora_takes_the_first_columns_of_q() -> None:
    module = nn.Sequential(nn.Linear(3, 3, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[2.0, 3, 5], [0, 4, 7], [0, 0, 6]]))  # Q is the identity, up to signs
    pair = started(module, "olora", ["0"], rank=2, alpha=1).pairs["0"]
    np.testing.assert_allclose(np.abs(pair.b), [[1, 0], [0, 1], [0, 0]], atol=1e-6)
    np.testing.assert_allclose(pair.delta(), [[1, 1.5, 2.5], [0, 2, 3.5], [0, 0, 0]], atol=1e-6)  # half of two rows


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_every_kind_of_layer_starts_as_its_base(init: Init) -> None:
    base = base_of(Everything)
    # The convolution `two` has one input channel of 2 x 3 weights: as a matrix (4, 6).
    start = started(base, init, ["words", "fc", "fan", "one", "two"])
    module = copy.deepcopy(base)
    changes = plan.make([start, frozen_start(start)], layers.specs(module), identity_ok=True)
    layers.attach(module, changes, trainable=True, frozen={STARTING_POINT})
    torch.testing.assert_close(module(IDS), base(IDS), rtol=1e-5, atol=1e-5)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.lora_{side}.default" for name in start.pairs for side in "AB"}
    weights = {"words": base.words.weight.T, "fc": base.fc.weight, "fan": base.fan.weight.T}
    weights |= {name: getattr(base, name).weight.flatten(1) for name in ("one", "two")}
    for name, pair in start.pairs.items():
        exact = weights[name].detach().double().numpy()
        if init == "pissa":
            left, values, right = np.linalg.svd(exact, full_matrices=False)
            expected = (left[:, :2] * values[:2]) @ right[:2]
        else:
            q, r = np.linalg.qr(exact)
            expected = 1.5 * q[:, :2] @ r[:2]
        np.testing.assert_allclose(as_matrix(pair), expected, atol=1e-5)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in trained:
                parameter.add_(0.1)
    saved = as_plain_lora(layers.read_back(module, start), start)
    plain = copy.deepcopy(base)
    layers.attach(plain, plan.make([saved], layers.specs(plain)))
    assert (plain(IDS) - base(IDS)).abs().max() > 1e-2
    torch.testing.assert_close(plain(IDS), module(IDS), rtol=1e-4, atol=1e-5)


def test_a_packed_attention_starts_from_its_weights() -> None:
    module = nn.TransformerEncoder(an_encoder_layer(), 1).eval()
    x = torch.randn(2, 5, 8)
    before = module(x)
    start = started(module, "pissa", "all-linear")
    assert len(start.pairs) == 4
    changes = plan.make([start, frozen_start(start)], layers.specs(module), identity_ok=True)
    layers.attach(module, changes, trainable=True, frozen={STARTING_POINT})
    for training in (True, False):
        torch.testing.assert_close(module.train(training)(x), before, rtol=1e-4, atol=1e-5)


def test_without_training_the_saved_adapter_changes_nothing() -> None:
    start = started(a_model(), "pissa", "all-linear")
    saved = as_plain_lora(start, start)
    assert saved.is_identity and saved.pairs["0"].rank == 4
    assert saved.pairs["0"].a[2:].tolist() == start.pairs["0"].a.tolist()


@pytest.mark.parametrize(("rslora", "alpha"), [(False, 6.0), (True, 3 * 2**0.5)])
def test_the_saved_adapter_records_its_own_rank_and_the_start(rslora: bool, alpha: float) -> None:
    start = started(a_model(), "olora", "all-linear", rslora=rslora)
    pair = dataclasses.replace(start.pairs["0"], b=2 * start.pairs["0"].b)
    saved = as_plain_lora(dataclasses.replace(start, pairs={"0": pair}), start)
    assert (saved.metadata["r"], saved.metadata["init"]) == (4, "olora of rank 2")
    assert saved.metadata["lora_alpha"] == pytest.approx(alpha)
    assert saved.pairs["0"].scale == start.pairs["0"].scale
    np.testing.assert_allclose(saved.pairs["0"].delta(), start.pairs["0"].delta(), atol=1e-6)


def test_each_layer_is_reported_and_default_needs_none() -> None:
    module, seen = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), []
    new = layers.create_adapter(module, targets="all-linear", rank=2, alpha=3, seed=0)
    assert started_from_weights(module, new, "default", on_layer=lambda *done: seen.append(done)) is new
    assert seen == []
    started_from_weights(module, new, "pissa", on_layer=lambda *done: seen.append(done))
    assert seen == [(1, 2), (2, 2)]


def test_what_cannot_be_decomposed_is_refused() -> None:
    with pytest.raises(InputRefused, match=r'too few directions .*\(init="pissa"\):\s+`0` is 2 × 3, its rank 3'):
        started(a_model(), "pissa", ["0"], rank=3)
    broken = a_model()
    with torch.no_grad():
        broken[0].weight[0, 0] = float("nan")
    with pytest.raises(InputRefused, match=r"0\.weight has values that are not finite"):
        started(broken, "olora", ["0"])
    with pytest.raises(InputRefused, match=r"only layers start from their weights .*:\s+.*\.experts\.down_proj\[0\]"):
        started(experts.tiny_model("mixtral"), "pissa", [], target_parameters=["experts.down_proj"])


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_weight_without_directions_starts_from_finite_factors(init: Init) -> None:
    module = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        module[0].weight.zero_()
        module[1].weight.copy_(torch.outer(torch.arange(1.0, 5), torch.ones(4)))  # of rank 1
    pairs = started(module, init, "all-linear").pairs
    assert not pairs["0"].delta().any()
    expected = module[1].weight.detach().numpy() * (1 if init == "pissa" else 1.5)
    np.testing.assert_allclose(pairs["1"].delta(), expected, atol=1e-5)
