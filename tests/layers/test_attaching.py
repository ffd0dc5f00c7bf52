"""Attach adapters, scale and disable them, detach them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_export import layers, plan
from lora_export.errors import InputRefused
from lora_export.lora import Adapter, LoraPair
from support.small_layers import (
    PAIR,
    X,
    a_linear,
    a_model,
    a_pair,
    an_adapter,
    an_encoder_layer,
    by_hand,
    count_calls,
    encoder_changes,
    equal,
    ones,
    plan_for,
)
from support.tiny_models import tiny_llama

# --- Replaced tensors ---


def test_a_replaced_tensor_is_used_in_the_dtype_of_the_base() -> None:
    model = nn.Sequential(a_linear(), nn.BatchNorm1d(2)).eval()
    replaced = {
        "1.weight": np.array([3, 4], ml_dtypes.bfloat16),
        "1.running_mean": np.array([1, 2], np.float32),
        "1.running_var": np.full(2, 1 - 1e-5, np.float32),
        "1.num_batches_tracked": np.array(7, np.int64),
    }
    layers.attach(model, plan_for(model, an_adapter({"0": PAIR}, replaced=replaced)))
    torch.testing.assert_close(model(X), torch.tensor([[3 * (8.0 - 1), 4 * (16.0 - 2)]]))
    assert model.state_dict()["1.num_batches_tracked"] == 7
    assert model[1].weight.dtype is torch.float32


def test_the_bias_of_an_adapted_layer_can_be_replaced() -> None:
    model = a_model()
    layers.attach(model, plan_for(model, an_adapter({"0": PAIR}, replaced={"0.bias": np.zeros(2, np.float32)})))
    assert equal(model(X), torch.tensor([[8.0 - 1, 16.0 + 1]]))


# --- Parameters ---


def test_adapter_names_become_distinct_parameter_names() -> None:
    model = a_model()
    named = [an_adapter({"0": PAIR}, name=name) for name in ("v1.0", "v1_0", "items", "")]
    layers.attach(model, plan_for(model, *named))
    assert equal(model(X), torch.tensor([[10.0 - 8, 20.0 - 16]]))
    assert [name for name in model.state_dict() if "lora_A" in name] == [
        "0.lora_A.v1_0",
        "0.lora_A.v1_0_",
        "0.lora_A.items_",
        "0.lora_A._",
    ]


def test_only_a_b_and_replaced_tensors_get_gradients() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"encoder": an_encoder_layer(), "head": nn.Linear(8, 3)})
    pairs, _ = encoder_changes("encoder.")
    head = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items() if name.startswith("head.")}
    layers.attach(model, plan_for(model, an_adapter(pairs, replaced=head)), trainable=True)
    model["head"](model["encoder"](torch.randn(2, 4, 8))).square().sum().backward()
    with_gradients = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    expected = {f"{key}.lora_{side}.default" for key in pairs for side in "AB"} | {"head.weight", "head.bias"}
    assert with_gradients == expected
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters() if parameter.grad is not None)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == expected


def test_an_adapter_is_frozen_unless_trainable() -> None:
    model = a_model()
    layers.attach(model, plan_for(model, an_adapter({"0": PAIR}, replaced={"0.bias": np.zeros(2, np.float32)})))
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {"0.weight"}


def test_a_and_b_are_fp32_for_a_bf16_layer() -> None:
    model = a_model(torch.bfloat16)
    layers.attach(model, plan_for(model, an_adapter({"0": PAIR})), trainable=True)
    model(X.bfloat16()).sum().backward()
    assert model.state_dict()["0.lora_A.default"].dtype is torch.float32
    assert model(X.bfloat16()).dtype is torch.bfloat16
    assert model[0].weight.dtype is torch.bfloat16


# --- Scale and disable ---


def test_disabled_adapters_give_the_base_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.TransformerEncoder(an_encoder_layer(), 2), nn.Linear(8, 8), Conv1D(4, 8)).eval()
    pairs, _ = encoder_changes("0.layers.0.")
    pairs |= {"1": a_pair(8, 8), "2": a_pair(4, 8)}
    replaced = {"0.layers.1.norm1.weight": np.full(8, 3, np.float32)}
    biases = {"1": np.ones(8, np.float32)}
    module = copy.deepcopy(base)
    layers.attach(module, plan_for(module, an_adapter(pairs, replaced=replaced, biases=biases)))
    x = torch.randn(2, 4, 8)
    fast = count_calls(monkeypatch, torch, "_transformer_encoder_layer_fwd")
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            before = module(x)
            with layers.scale_adapters(module, 0.0):
                assert equal(module(x), base(x))
                assert equal(module[1].weight, base[1].weight)
            assert equal(module(x), before)
            assert not torch.allclose(before, base(x), atol=0.1)
    assert fast


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_a_factor_multiplies_every_branch(grad: bool) -> None:
    base = an_encoder_layer().double().eval()
    pairs, changes = encoder_changes()
    scaled = by_hand(base, {name: 1.1 * change for name, change in changes.items()})
    module = copy.deepcopy(base)
    layers.attach(module, plan_for(module, an_adapter(pairs)))
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        usual = module(x)
        with layers.scale_adapters(module, 1.1):
            torch.testing.assert_close(module(x), scaled(x), rtol=1e-12, atol=1e-12)
        assert (usual - scaled(x)).abs().max() > 1e-3


def test_factors_nest_and_are_undone_after_an_exception() -> None:
    model = a_model()
    layers.attach(model, plan_for(model, an_adapter({"0": PAIR}, replaced={"0.bias": np.zeros(2, np.float32)})))
    with pytest.raises(KeyError), layers.scale_adapters(model, 2.0):
        with layers.scale_adapters(model, 3.0):
            assert equal(model(X), torch.tensor([[9.0 - 12, 21.0 - 24]]))
        with layers.scale_adapters(model, 0.0), layers.scale_adapters(model, 0.0):
            assert equal(model(X), torch.tensor([[10.0, 20.0]]))
        assert equal(model(X), torch.tensor([[9.0 - 4, 21.0 - 8]]))
        raise KeyError
    assert equal(model(X), torch.tensor([[9.0 - 2, 21.0 - 4]]))


def test_replaced_tensors_can_stay_while_pairs_are_disabled() -> None:
    model = a_model()
    layers.attach(model, plan_for(model, an_adapter({"0": PAIR}, replaced={"0.bias": np.zeros(2, np.float32)})))
    with layers.scale_adapters(model, 0.0, keep_replaced=True):
        assert equal(model(X), torch.tensor([[9.0, 21.0]]))


def test_restored_base_tensors_follow_the_modules_dtype() -> None:
    model = a_model()
    layers.attach(model, plan_for(model, an_adapter({"0": PAIR}, replaced={"0.bias": np.zeros(2, np.float32)})))
    model.double()
    with layers.scale_adapters(model, 0.0):
        assert equal(model(X.double()), torch.tensor([[10.0, 20.0]], dtype=torch.float64))


@pytest.mark.parametrize("function", [lambda module: layers.scale_adapters(module, 0.0).__enter__(), layers.detach])
def test_a_module_without_adapters_is_refused(function: Callable[[nn.Module], None]) -> None:
    with pytest.raises(InputRefused, match="no adapter is attached"):
        function(a_model())


# --- Detach ---


def test_detach_restores_classes_and_tensors() -> None:
    base = nn.Sequential(an_encoder_layer(), Conv1D(4, 8)).eval()
    pairs, _ = encoder_changes("0.")
    replaced = {"0.norm1.weight": np.full(8, 3, np.float32)}
    biases = {"0.linear1": np.ones(16, np.float32)}
    module = copy.deepcopy(base)
    layers.attach(module, plan_for(module, an_adapter({**pairs, "1": a_pair(4, 8)}, replaced=replaced, biases=biases)))
    assert not equal(module(torch.ones(1, 2, 8)), base(torch.ones(1, 2, 8)))
    layers.detach(module)
    assert [type(part) for part in module.modules()] == [type(part) for part in base.modules()]
    assert list(module.state_dict()) == list(base.state_dict())
    for name, tensor in base.state_dict().items():
        assert equal(module.state_dict()[name], tensor)
    assert [set(vars(part)) for part in module.modules()] == [set(vars(part)) for part in base.modules()]
    layers.attach(module, plan_for(module, an_adapter(pairs)))  # another adapter can be attached


# --- What is refused ---


def refusal(base: nn.Module, pairs: dict[str, LoraPair]) -> str:
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    the_plan = plan.make([Adapter("a", "test", pairs)], layers.specs(base))
    with pytest.raises(InputRefused) as refused:
        layers.attach(base, the_plan)
    assert base.state_dict().keys() == before.keys()
    return str(refused.value)


def test_a_layer_that_already_has_lora_is_refused() -> None:
    model = a_model()
    model[0].lora_A = nn.Parameter(torch.zeros(1, 3))  # as loralib's layers have it
    with pytest.raises(
        InputRefused, match=r"0\.weight: its Linear already has lora_A; give the model without its LoRA layers"
    ):
        layers.attach(model, plan_for(model, an_adapter({"0": PAIR})))


def test_dora_beside_rows_that_are_trained_alone_is_refused() -> None:
    """PEFT's forward fails on it."""
    base = tiny_llama(tie_word_embeddings=True)
    adapter = layers.create_adapter(base, targets=["lm_head"], rank=1, alpha=1, seed=0, dora=True, token_indices=[3])
    with pytest.raises(InputRefused, match=r"lm_head\.weight has rows that are trained alone: DoRA"):
        layers.attach(base, plan.make([adapter], layers.specs(base), identity_ok=True), trainable=True)
    assert type(base.lm_head) is nn.Linear


def test_a_shift_of_another_layers_bias_is_refused() -> None:
    model = nn.Sequential(nn.LayerNorm(3), a_linear())
    shifted = an_adapter({"1": PAIR}, biases={"0": np.ones(3, np.float32)})
    with pytest.raises(InputRefused, match=r"0\.bias: only the bias of a linear layer or .* shifted, not LayerNorm"):
        layers.attach(model, plan_for(model, shifted))
    assert type(model[1]) is nn.Linear


def test_grouped_convolutions_and_max_norm_embeddings_are_refused():
    grouped = nn.ModuleDict({"conv": nn.Conv1d(4, 4, 3, groups=2)})
    assert refusal(grouped, {"conv": ones(4, 2, 3)}) == (
        "conv.weight: a pair has no meaning beside a convolution of 2 groups"
    )
    restless = nn.ModuleDict({"words": nn.Embedding(5, 3, max_norm=1.0)})
    assert "words.weight: an embedding with max_norm changes its rows" in refusal(
        restless, {"words": ones(3, 5, embedding=True)}
    )
