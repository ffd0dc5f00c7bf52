"""Every kind of layer that PEFT adapts, attached and folded: PEFT wrote the adapters and says what they compute."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from lora_export import formats, layers, plan
from lora_export.errors import InputRefused
from lora_export.lora import Adapter, LoraPair
from lora_export.plan import Plan

TARGETS = ["words", "fc", "fan", "one", "two", "three"]
IDS = torch.tensor([[1, 5, 0, 3, 3, 10, 2], [0, 0, 7, 8, 9, 1, 4]])


class Everything(nn.Module):
    """A layer of each kind, and strides, paddings and dilations of all sorts."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.fc, self.fan = nn.Embedding(11, 6, padding_idx=0), nn.Linear(6, 8), Conv1D(8, 8)
        self.one = nn.Conv1d(8, 6, 3, padding="same")
        self.two = nn.Conv2d(1, 4, (2, 3), stride=(2, 1), padding=(1, 0), bias=False)
        self.three = nn.Conv3d(1, 3, 2, padding=1)
        nn.init.normal_(self.fan.bias)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.fan(torch.tanh(self.fc(self.words(ids))))
        y = torch.tanh(self.one(x.transpose(1, 2)))
        return self.three(torch.tanh(self.two(y.unsqueeze(1))).unsqueeze(1))


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


def base_of(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


CASES = pytest.mark.parametrize(
    ("make", "config"),
    [
        (Everything, {"target_modules": TARGETS}),
        (Everything, {"target_modules": TARGETS, "use_dora": True}),
        (Everything, {"target_modules": ["two", "fan"], "use_dora": True, "use_rslora": True}),
        (Everything, {"target_modules": ["one", "three", "fc"], "lora_bias": True}),
        (Gemmas, {"target_modules": ["words"]}),
        (Gemmas, {"target_modules": ["words"], "use_dora": True}),
    ],
)


@CASES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_attached_adapters_compute_what_peft_computes_at_any_strength(tmp_path, make, config, dtype):
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
def test_folded_adapters_are_pefts_merge(tmp_path, make, config, dtype):
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
def test_whoever_reads_the_weight_finds_what_a_fold_stores(tmp_path, make, config):
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


def test_bf16_layers_are_rescaled_in_fp32_and_rounded_once(tmp_path):
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


def test_a_reference_in_fp64_settles_on_the_rescaled_weight(tmp_path):
    base = base_of(Everything)
    the_plan = plan_of(trained(base, target_modules=TARGETS, use_dora=True), base, tmp_path)
    settled, folded = copy.deepcopy(base), copy.deepcopy(base).double()
    layers.attach(settled, the_plan)
    settled.double()
    layers.materialise(settled, dict.fromkeys(base.state_dict(), "bfloat16"), preferred={})
    layers.fold(folded, the_plan)
    for name, tensor in settled.state_dict().items():
        assert torch.equal(tensor, folded.state_dict()[name].bfloat16().double()), name


def test_an_embedding_that_comes_whole_with_its_pair_is_both(tmp_path):
    base = base_of(Gemmas)
    pair = LoraPair(a=np.ones((1, 11)), b=np.full((6, 1), 0.5), scale=1.0, embedding=True)
    brought = np.arange(66, dtype=np.float32).reshape(11, 6)
    adapter = Adapter("both", "test", {"words": pair}, replaced={"words.weight": brought})
    the_plan = plan.make([adapter], layers.specs(base))
    attached, folded = copy.deepcopy(base), copy.deepcopy(base)
    layers.attach(attached, the_plan)
    layers.fold(folded, the_plan)
    expected = 3 * torch.tensor(brought + 0.5)[IDS]
    assert torch.equal(attached(IDS), expected) and torch.equal(folded(IDS), expected)
    with layers.scale_adapters(attached, 2, keep_replaced=True):
        assert torch.equal(attached(IDS), expected + 1.5)
    with layers.scale_adapters(attached, 0, keep_replaced=True):
        assert torch.equal(attached(IDS), expected - 1.5)
    with layers.scale_adapters(attached, 0):
        assert torch.equal(attached(IDS), base(IDS))
    settled = copy.deepcopy(attached)
    layers.materialise(settled, {}, preferred={})
    assert torch.equal(settled(IDS), expected)
    layers.detach(attached)
    assert torch.equal(attached(IDS), base(IDS))


@pytest.mark.parametrize("is_tied", [True, False])
def test_rows_of_tokens_are_pefts_in_a_tied_model_too(tmp_path, is_tied):
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 16}
    config = LlamaConfig(num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=is_tied, **sizes)
    base = LlamaForCausalLM(config).eval()
    model = trained(base, target_modules=["q_proj"], trainable_token_indices=[3, 10])
    the_plan = plan_of(model, base, tmp_path)
    attached, folded = copy.deepcopy(base), copy.deepcopy(base)
    layers.attach(attached, the_plan)
    layers.fold(folded, the_plan)
    theirs = model(IDS).logits
    torch.testing.assert_close(attached(IDS).logits, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(folded(IDS).logits, theirs, rtol=1e-5, atol=1e-5)
    with layers.scale_adapters(attached, 0, keep_replaced=True):
        kept = attached(IDS).logits
    with layers.scale_adapters(attached, 0):
        assert torch.equal(attached(IDS).logits, base(IDS).logits)
    assert (kept - base(IDS).logits).abs().max() > 0.1
    assert attached.lm_head.weight is attached.model.embed_tokens.weight or not is_tied
    settled = copy.deepcopy(attached)
    layers.materialise(settled, {}, preferred={})
    torch.testing.assert_close(settled(IDS).logits, theirs, rtol=1e-5, atol=1e-5)
    layers.detach(attached)
    assert torch.equal(attached(IDS).logits, base(IDS).logits)
    assert (attached.lm_head.weight is attached.model.embed_tokens.weight) is is_tied


def test_training_moves_lengths_too_and_the_norm_takes_no_part_in_gradients(tmp_path):
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


def test_a_dilated_convolution_is_what_its_merge_computes():
    # PEFT gives its A no dilation: it merges such a convolution, but cannot run it.
    base = nn.ModuleDict({"conv": nn.Conv2d(2, 3, 3, dilation=2, stride=2, padding=1, padding_mode="reflect")}).double()
    rng = np.random.default_rng(0)
    pair = LoraPair(a=rng.normal(size=(2, 2, 3, 3)), b=rng.normal(size=(3, 2, 1, 1)), scale=0.5)
    the_plan = plan.make([Adapter("a", "test", {"conv": pair})], layers.specs(base))
    attached, folded = copy.deepcopy(base), copy.deepcopy(base)
    layers.attach(attached, the_plan)
    layers.fold(folded, the_plan)
    x = torch.randn(2, 2, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(attached["conv"](x), folded["conv"](x), rtol=1e-12, atol=1e-12)
    assert (attached["conv"](x) - base["conv"](x)).abs().max() > 0.1


@pytest.mark.parametrize("dora", [False, True])
def test_the_forward_of_a_convolution_and_of_an_embedding_does_not_merge(dora):
    # 1e8 + 1 is 1e8 in fp32: a merge loses the adapter, and a branch does not.
    conv, words = nn.Conv1d(2, 1, 1, bias=False), nn.Embedding(2, 1)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[[1e8], [-1e8]]]))
        words.weight.copy_(torch.tensor([[1e8], [0]]))
    base = nn.ModuleDict({"conv": conv, "words": words})
    lengths = {"magnitude": [2e8]} if dora else {}
    kernel = LoraPair(a=np.ones((1, 2, 1)), b=np.ones((1, 1, 1)), scale=1.0, **lengths)
    pairs = {"conv": kernel, "words": LoraPair(a=[[1, 1]], b=[[1]], scale=1.0, embedding=True, **lengths)}
    layers.attach(base, plan.make([Adapter("a", "test", pairs)], layers.specs(base)))
    factor = 2e8 / 1e8 if dora else 1
    assert base["conv"](torch.ones(1, 2, 1)).item() == pytest.approx(2 * (factor / 2**0.5 if dora else 1))
    assert base["words"](torch.tensor([1])).item() == pytest.approx(factor)
    assert base["conv"].weight[0, 0, 0].item() == pytest.approx(1e8 * (factor / 2**0.5 if dora else 1))


# --- What is refused ---


def refusal(base: nn.Module, pairs: dict[str, LoraPair]) -> str:
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    the_plan = plan.make([Adapter("a", "test", pairs)], layers.specs(base))
    with pytest.raises(InputRefused) as refused:
        layers.attach(base, the_plan)
    assert base.state_dict().keys() == before.keys()
    return str(refused.value)


def ones(out: int, into: int, *kernel: int, **fields: Any) -> LoraPair:
    return LoraPair(a=np.ones((1, into, *kernel)), b=np.ones((out, 1, *[1] * len(kernel))), scale=1.0, **fields)


def test_a_grouped_convolution_and_an_embedding_that_changes_itself_are_refused():
    grouped = nn.ModuleDict({"conv": nn.Conv1d(4, 4, 3, groups=2)})
    assert refusal(grouped, {"conv": ones(4, 2, 3)}) == (
        "conv.weight: a pair has no meaning beside a convolution of 2 groups"
    )
    restless = nn.ModuleDict({"words": nn.Embedding(5, 3, max_norm=1.0)})
    assert "words.weight: an embedding with max_norm changes its rows" in refusal(
        restless, {"words": ones(3, 5, embedding=True)}
    )


def test_an_embedding_that_is_the_head_too_is_refused_under_both_names():
    tied = nn.ModuleDict({"words": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    tied["head"].weight = tied["words"].weight
    for pairs in ({"words": ones(3, 5, embedding=True)}, {"head": ones(5, 3)}):
        assert "one tensor under several names: words.weight and head.weight" in refusal(tied, pairs)


@pytest.mark.parametrize("put", [layers.attach, layers.fold])
def test_an_output_without_a_direction_is_refused(put):
    base = nn.Sequential(nn.Linear(2, 3))
    with torch.no_grad():
        base[0].weight.copy_(torch.tensor([[-1.0, -1], [0, 0], [-1, -1]]))
    the_plan = plan.make([Adapter("a", "test", {"0": ones(3, 2, magnitude=np.ones(3))})], layers.specs(base))
    with pytest.raises(InputRefused, match=r"0\.weight: W \+ sBA is zero in 2 of its outputs, to which DoRA cannot"):
        put(base, the_plan)
    assert type(base[0]) is nn.Linear and base[0].weight[0].tolist() == [-1, -1]


def test_convolutions_and_embeddings_are_no_linear_layers_to_a_fresh_adapter():
    base = base_of(Everything)
    fresh = layers.create_adapter(base, targets="all-linear", rank=1, alpha=1, seed=0)
    assert fresh.pairs.keys() == {"fc", "fan"}
    for target in ("words", "one"):
        with pytest.raises(InputRefused, match=f"`{target}` is no linear layer"):
            layers.create_adapter(base, targets=[target], rank=1, alpha=1, seed=0)
