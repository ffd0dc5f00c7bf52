"""Every kind of layer that PEFT adapts, attached and folded. PEFT writes the adapters and computes what is expected."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from lora_export import formats, layers, plan
from lora_export.lora import Adapter, LoraPair
from lora_export.plan import Plan
from support.small_layers import Everything, base_of
from support.tiny_models import tiny_llama

TARGETS = ["words", "fc", "fan", "one", "two", "three"]
IDS = torch.tensor([[1, 5, 0, 3, 3, 10, 2], [0, 0, 7, 8, 9, 1, 4]])


class Gemmas(nn.Module):
    """An embedding that scales its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.words = Gemma3TextScaledWordEmbedding(11, 6, 0, embed_scale=3.0)

    def forward(self, ids: Tensor) -> Tensor:
        return self.words(ids)


def trained(base: nn.Module, **config: Any) -> peft.PeftModel:
    """PEFT's model in a copy of the base, with A, B and lengths as if trained: the lengths 0.5 to 2 times the first."""
    torch.manual_seed(3)
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, lora_alpha=4, **config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(0.5 + 1.5 * torch.rand_like(parameter))
            elif parameter.requires_grad:
                parameter.normal_()
    return model


def scaled(model: peft.PeftModel, factor: float) -> peft.PeftModel:
    scaled = copy.deepcopy(model)
    for module in scaled.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.scaling["default"] *= factor  # PEFT's `scale_layer` leaves embeddings out
    return scaled


def plan_of(model: peft.PeftModel, base: nn.Module, folder: Path, **options: Any) -> Plan:
    model.save_pretrained(folder)
    return plan.make([formats.load(folder)], layers.specs(base), **options)


CASES = pytest.mark.parametrize(
    ("make", "config"),
    [
        (Everything, {"target_modules": TARGETS}),
        (Everything, {"target_modules": TARGETS, "use_dora": True}),
        (Everything, {"target_modules": ["two", "fan"], "use_dora": True, "use_rslora": True}),
        (Everything, {"target_modules": ["one", "three", "fc"], "lora_bias": True}),
        (Everything, {"target_modules": ["one", "three", "fc"], "lora_bias": True, "bias": "lora_only"}),
        (Gemmas, {"target_modules": ["words"]}),
        (Gemmas, {"target_modules": ["words"], "use_dora": True}),
    ],
)


@CASES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_attached_adapters_compute_what_peft_computes(tmp_path, make, config, dtype):
    base = base_of(make)
    model = trained(base, **config)
    attached = copy.deepcopy(base)
    layers.attach(attached, plan_of(model, base, tmp_path))
    base, attached, model = (one.to(dtype) for one in (base, attached, model))
    tolerance = {"rtol": 1e-10, "atol": 1e-11} if dtype is torch.float64 else {"rtol": 1e-4, "atol": 2e-5}
    ours, theirs = attached(IDS), model(IDS)
    torch.testing.assert_close(ours, theirs, **tolerance)
    assert (ours - base(IDS)).abs().max() > 0.1
    with layers.scale_adapters(attached, 1.1):
        torch.testing.assert_close(attached(IDS), scaled(model, 1.1)(IDS), **tolerance)
        assert (attached(IDS) - ours).abs().max() > 1e-3
    with layers.scale_adapters(attached, 0):
        assert torch.equal(attached(IDS), base(IDS))
    assert torch.equal(attached(IDS), ours)


@CASES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_folded_weights_are_those_of_pefts_merge(tmp_path, make, config, dtype):
    base = base_of(make)
    model = trained(base, **config)
    model.save_pretrained(tmp_path)
    base, model = base.to(dtype), model.to(dtype)
    folded = copy.deepcopy(base)
    layers.fold(folded, plan.make([formats.load(tmp_path)], layers.specs(base)))
    theirs = model.merge_and_unload().state_dict()
    tolerance = {"rtol": 1e-12, "atol": 1e-13} if dtype is torch.float64 else {"rtol": 2e-6, "atol": 1e-6}
    for name, tensor in folded.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], **tolerance)
    changed = {name for name, tensor in base.state_dict().items() if not torch.equal(tensor, folded.state_dict()[name])}
    assert changed >= {f"{name}.weight" for name in config["target_modules"]}


@CASES
def test_an_attached_weight_reads_as_the_folded_one(tmp_path, make, config):
    base = base_of(make).double()
    the_plan = plan_of(trained(base, **config), base, tmp_path)
    attached, folded = copy.deepcopy(base), copy.deepcopy(base)
    layers.attach(attached, the_plan)
    layers.fold(folded, the_plan)
    for name in config["target_modules"]:
        one, other = attached.get_submodule(name).weight, folded.get_submodule(name).weight
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
    assert attached.state_dict().keys() - {name for name in attached.state_dict() if ".lora_" in name} == (
        base.state_dict().keys()
    )
    layers.detach(attached)
    assert attached.state_dict().keys() == base.state_dict().keys()
    assert torch.equal(attached(IDS), base(IDS))


def test_dora_in_bf16_is_rounded_once(tmp_path):
    base = base_of(Everything).bfloat16()
    model = trained(base, target_modules=TARGETS, use_dora=True)
    attached = copy.deepcopy(base)
    layers.attach(attached, plan_of(model, base, tmp_path))
    assert attached(IDS).dtype is torch.bfloat16
    exact = copy.deepcopy(attached).double()
    worst = max(
        ((attached.get_submodule(name).weight.double() - exact.get_submodule(name).weight).abs()
         / exact.get_submodule(name).weight.abs()).nan_to_num(0).max().item()
        for name in TARGETS
    )  # fmt: skip
    assert 0 < worst <= 2.0**-8 * 1.001


def test_dora_is_materialised_as_folded_in_fp64(tmp_path):
    base = base_of(Everything)
    the_plan = plan_of(trained(base, target_modules=TARGETS, use_dora=True), base, tmp_path)
    materialised, folded = copy.deepcopy(base), copy.deepcopy(base).double()
    layers.attach(materialised, the_plan)
    layers.materialise(materialised, dict.fromkeys(base.state_dict(), "float32"), preferred={})
    layers.fold(folded, the_plan)
    for name, tensor in materialised.state_dict().items():
        assert torch.equal(tensor, folded.state_dict()[name].float()), name


def test_an_embedding_may_be_replaced_and_have_a_pair(tmp_path):
    base = base_of(Gemmas)
    pair = LoraPair(a=np.ones((1, 11)), b=np.full((6, 1), 0.5), scale=1.0, embedding=True)
    table = np.arange(66, dtype=np.float32).reshape(11, 6)
    adapter = Adapter("both", "test", {"words": pair}, replaced={"words.weight": table})
    the_plan = plan.make([adapter], layers.specs(base))
    attached, folded = copy.deepcopy(base), copy.deepcopy(base)
    layers.attach(attached, the_plan)
    layers.fold(folded, the_plan)
    expected = 3 * torch.tensor(table + 0.5)[IDS]
    assert torch.equal(attached(IDS), expected) and torch.equal(folded(IDS), expected)
    with layers.scale_adapters(attached, 2, keep_replaced=True):
        assert torch.equal(attached(IDS), expected + 1.5)
    with layers.scale_adapters(attached, 0, keep_replaced=True):
        assert torch.equal(attached(IDS), expected - 1.5)
    with layers.scale_adapters(attached, 0):
        assert torch.equal(attached(IDS), base(IDS))
    materialised = copy.deepcopy(attached)
    layers.materialise(materialised, {}, preferred={})
    assert torch.equal(materialised(IDS), expected)
    layers.detach(attached)
    assert torch.equal(attached(IDS), base(IDS))


@pytest.mark.parametrize("is_tied", [True, False])
def test_token_rows_are_those_of_peft(tmp_path, is_tied):
    base = tiny_llama(vocab_size=11, tie_word_embeddings=is_tied)
    model = trained(base, target_modules=["q_proj"], trainable_token_indices=[3, 10])
    the_plan = plan_of(model, base, tmp_path)
    attached, folded = copy.deepcopy(base), copy.deepcopy(base)
    layers.attach(attached, the_plan)
    layers.fold(folded, the_plan)
    theirs = model(IDS).logits
    torch.testing.assert_close(attached(IDS).logits, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(folded(IDS).logits, theirs, rtol=1e-5, atol=1e-5)
    with layers.scale_adapters(attached, 0, keep_replaced=True):
        rows_alone = attached(IDS).logits
    with layers.scale_adapters(attached, 0):
        assert torch.equal(attached(IDS).logits, base(IDS).logits)
    assert (rows_alone - base(IDS).logits).abs().max() > 0.1
    assert attached.lm_head.weight is attached.model.embed_tokens.weight or not is_tied
    materialised = copy.deepcopy(attached)
    layers.materialise(materialised, {}, preferred={})
    torch.testing.assert_close(materialised.double()(IDS).logits.float(), theirs, rtol=1e-5, atol=1e-5)
    layers.detach(attached)
    assert torch.equal(attached(IDS).logits, base(IDS).logits)
    assert (attached.lm_head.weight is attached.model.embed_tokens.weight) is is_tied


def test_gradients_of_dora_are_those_of_peft(tmp_path):
    base = base_of(Everything)
    model = trained(base, target_modules=TARGETS, use_dora=True)
    attached = copy.deepcopy(base)
    model.save_pretrained(tmp_path)
    adapter = formats.load(tmp_path)
    layers.attach(attached, plan.make([adapter], layers.specs(base)), trainable=True)
    for one in (model.double(), attached.double()):
        one.zero_grad()
        one(IDS).square().sum().backward()
    theirs = dict(model.base_model.model.named_parameters())
    lengths = ("lora_magnitude", "lora_magnitude_vector.default.weight")
    parts = [("lora_A", "lora_A.default.weight"), ("lora_B", "lora_B.default.weight"), lengths]
    of_words = [("lora_A", "lora_embedding_A.default"), ("lora_B", "lora_embedding_B.default"), lengths]
    compared = 0
    for name in TARGETS:
        for ours, part in of_words if name == "words" else parts:
            grad = attached.get_parameter(f"{name}.{ours}.{adapter.name}").grad
            other = theirs[f"{name}.{part}"].grad
            torch.testing.assert_close(grad.reshape(other.shape), other, rtol=1e-9, atol=1e-9)
            assert grad.abs().max() > 1e-3
            compared += 1
    assert compared == 18
    with torch.no_grad():
        attached.get_submodule("fc").lora_magnitude[adapter.name].fill_(7)
    assert layers.read_back(attached, adapter).pairs["fc"].magnitude.tolist() == [7.0] * 8
    assert layers.read_back(attached, adapter).pairs["words"].embedding
