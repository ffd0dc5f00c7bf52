"""Adapters attached to stacked parameters of experts, and folded into them. PEFT computes what is expected."""

from __future__ import annotations

import copy

import pytest
import torch

from lora_export import formats, layers, plan
from lora_export.layers.adapted_experts import expert_of
from lora_export.layers.adapted_layers import attachment_of, is_attached
from support import experts
from support.experts import MODELS

IDS = torch.tensor([[3, 9, 27, 17, 51], [5, 15, 45, 7, 21]])


def logits(module: torch.nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return module(ids).logits


@pytest.fixture(scope="module", params=sorted(MODELS))
def trained(request, tmp_path_factory):
    """A model, its plan, and the outputs of PEFT's model with the adapter."""
    model = experts.tiny_model(request.param)
    wrapped = experts.peft_model(request.param, model)
    folder = tmp_path_factory.mktemp(request.param) / "adapter"
    wrapped.save_pretrained(folder)
    adapters = layers.respelled_for(model, [formats.load(folder)])
    return model, plan.make(adapters, layers.specs(model)), logits(wrapped)


def attached_to(model, changes):
    module = copy.deepcopy(model)
    layers.attach(module, changes)
    return module


def test_an_attached_module_computes_what_peft_computes(trained):
    model, changes, expected = trained
    module = attached_to(model, changes)
    assert (logits(model) - expected).abs().max() > 0.05
    torch.testing.assert_close(logits(module), expected, rtol=0, atol=1e-6)
    with layers.scale_adapters(module, 0.0):
        assert torch.equal(logits(module), logits(model))
    layers.detach(module)
    assert torch.equal(logits(module), logits(model))
    assert [type(one) for one in module.modules()] == [type(one) for one in model.modules()]


def test_a_folded_module_computes_what_peft_computes(trained):
    model, changes, expected = trained
    module = copy.deepcopy(model)
    layers.fold(module, changes)
    torch.testing.assert_close(logits(module), expected, rtol=0, atol=1e-6)


def test_materialised_weights_are_rounded_sums(trained):
    model, changes, _ = trained
    module = attached_to(model.double(), changes)
    names = {step.spec.stored_name for step in changes.steps if step.spec.region is not None}
    layers.materialise(module, dict.fromkeys(names, "bfloat16"), {})
    folded = copy.deepcopy(model)
    layers.fold(folded, changes)
    wanted = {name: value.to(torch.bfloat16).double() for name, value in folded.state_dict().items() if name in names}
    assert wanted and all(torch.equal(module.state_dict()[name], value) for name, value in wanted.items())
    model.float()


def test_only_the_experts_that_get_a_token_are_recorded():
    model = experts.tiny_model("mixtral")
    adapter = experts_adapter(model)
    module = attached_to(model, plan.make([adapter], layers.specs(model)))
    chosen: set[int] = set()
    (owner,) = (one for one in module.modules() if is_attached(one))
    hook = owner.register_forward_pre_hook(lambda _, args: chosen.update(args[1].unique().tolist()))
    with layers.recorded_branches() as recorded:
        logits(module, IDS[:1, :1])
    hook.remove()
    assert {expert_of(branch, owner) for branch in recorded} == chosen and len(chosen) == 2
    assert len(attachment_of(owner).branches) == 2 * experts.COUNT


def experts_adapter(model):
    """Pairs for every expert of both parameters, in fp32 and as stored."""
    from lora_export.lora import Adapter, LoraPair, expert_name

    rng = torch.Generator().manual_seed(2)
    pairs = {}
    for spec in layers.specs(model):
        for expert in range(spec.shape[0]) if len(spec.shape) == 3 else ():
            out, in_ = spec.shape[1:]
            a, b = (torch.randn(size, generator=rng).numpy() for size in ((2, in_), (out, 2)))
            pairs[expert_name(spec.name, expert)] = LoraPair(a=a, b=b, scale=0.5, as_stored=True)
    return Adapter("ad", "peft", pairs)


def test_a_part_of_a_linear_layer_is_not_attached():
    module = torch.nn.ModuleDict({"fc": torch.nn.Linear(4, 4)})
    from lora_export.errors import InputRefused
    from lora_export.lora import Adapter, LoraPair

    pair = LoraPair(a=torch.ones(1, 4).numpy(), b=torch.ones(2, 1).numpy(), scale=1)
    changes = plan.make([Adapter("ad", "peft", {"fc.weight[0:2]": pair})], layers.specs(module))
    with pytest.raises(
        InputRefused, match=r"fc\.weight\[0:2\] is a part of a layer's weight; only a merge into a chec"
    ):
        layers.attach(module, changes)
