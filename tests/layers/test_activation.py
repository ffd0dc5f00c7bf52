"""Adapters that act from their invocation tokens on, attached to a module. PEFT computes what is expected."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.variants import calculate_alora_offsets
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lora_export import formats, layers, plan
from lora_export.errors import InputRefused
from lora_export.layers.activation import active_tokens
from lora_export.lora import Adapter
from support.peft_models import fill

WORDS, INVOCATION = 13, [7, 8, 7]
SIZES: dict[str, Any] = {"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
LLAMA = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
GPT2 = GPT2Config(vocab_size=WORDS, n_embd=16, n_layer=2, n_head=4, n_positions=32)
MODELS: dict[str, tuple[Any, Any, list[str]]] = {
    "llama": (LlamaForCausalLM, LLAMA, ["q_proj", "down_proj", "lm_head"]),
    "gpt2": (GPT2LMHeadModel, GPT2, ["c_attn", "c_fc"]),
}
IDS = torch.tensor(
    [
        [1, 7, 8, 7, 2, 3, 4, 5, 6, 9],  # once
        [7, 8, 7, 8, 7, 1, 2, 3, 7, 8],  # twice, one inside of the other, and a part of it
        [1, 2, 3, 4, 5, 6, 9, 7, 8, 7],  # at the end
        [1, 2, 7, 8, 3, 4, 8, 7, 5, 6],  # parts alone
    ]
)


def a_model(name: str) -> tuple[nn.Module, list[str]]:
    torch.manual_seed(0)
    made, config, targets = MODELS[name]
    return made(config).eval(), targets


def trained(module: nn.Module, targets: list[str], folder: Path, **config: Any) -> tuple[peft.PeftModel, Adapter]:
    fields = {"r": 2, "lora_alpha": 8, "task_type": "CAUSAL_LM", "alora_invocation_tokens": INVOCATION, **config}
    model = peft.get_peft_model(copy.deepcopy(module), peft.LoraConfig(target_modules=targets, **fields)).eval()
    fill(model, "lora_")
    model.save_pretrained(folder)
    return model, formats.load(folder, activated=True)


def attached(module: nn.Module, adapter: Adapter, **options: Any) -> nn.Module:
    layers.attach(module, plan.make([adapter], layers.specs(module)), **options)
    return module


@torch.no_grad()
def logits(module: nn.Module, ids: Tensor = IDS, **options: Any) -> Tensor:
    found: Tensor = module(input_ids=ids, **options).logits
    return found


@pytest.mark.parametrize("invocation", [[7], [7, 7], [7, 8, 7], [1, 2, 3, 4]])
def test_active_tokens_are_those_that_peft_finds(invocation: list[int]) -> None:
    ids = torch.randint(6, 9, (200, 9), generator=torch.Generator().manual_seed(1))
    ids[:3, :4] = torch.tensor([1, 2, 3, 4])
    config: Any = {"a": peft.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=invocation)}
    offsets = [0 if one is None else one for one in calculate_alora_offsets(config, "a", ids)]
    expected = torch.arange(9) >= 9 - torch.tensor(offsets)[:, None]
    assert torch.equal(active_tokens(ids, invocation)[..., 0], expected) and 0 < expected.sum() < expected.numel()
    assert not active_tokens(ids[:, :1], [7, 7]).any()


@pytest.mark.parametrize("name", MODELS)
def test_attached_it_computes_what_peft_computes(name: str, tmp_path: Path) -> None:
    module, targets = a_model(name)
    before = logits(module)
    model, adapter = trained(module, targets, tmp_path)
    found, expected = logits(attached(module, adapter)), logits(model)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    changes = (found - before).abs().amax(-1) > 1e-3
    assert changes.int().tolist() == [[0, *[1] * 9], [0, 0, *[1] * 8], [*[0] * 7, 1, 1, 1], [0] * 10]
    assert torch.equal(found[3], before[3])
    torch.testing.assert_close(logits(copy.deepcopy(module), IDS[:2]), logits(model, IDS[:2]), atol=1e-5, rtol=1e-5)
    layers.detach(module)
    assert torch.equal(logits(module), before)


def test_fewer_tokens_than_the_text_has_are_its_last(tmp_path: Path) -> None:
    """As those of the head, of which a run wants the last logits alone."""
    module, targets = a_model("llama")
    model, adapter = trained(module, targets, tmp_path)
    found, expected = (logits(one, IDS[:1], logits_to_keep=2) for one in (attached(module, adapter), model))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert found.shape[1] == 2


def test_two_adapters_have_their_own_tokens(tmp_path: Path) -> None:
    module, _ = a_model("llama")
    _, one = trained(module, ["q_proj"], tmp_path / "one")
    _, other = trained(module, ["q_proj", "down_proj"], tmp_path / "other", alora_invocation_tokens=[3])
    alone = [logits(attached(copy.deepcopy(module), adapter)) for adapter in (one, other)]
    layers.attach(module, plan.make([one, other], layers.specs(module)))
    both = logits(module)
    assert torch.equal(both[1, :7], alone[0][1, :7]) and torch.equal(both[3, :4], alone[1][3, :4])


def test_pairs_count_as_computed_where_a_token_is_active(tmp_path: Path) -> None:
    module, targets = a_model("llama")
    attached(module, trained(module, targets, tmp_path)[1])
    for ids, number in ((IDS[3:], 0), (IDS, 5)):
        with layers.recorded_branches() as computed:
            logits(module, ids)
        assert len(computed) == number


class Plain(nn.Module):
    """A layer on `x`, which are no ids."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def test_what_has_no_texts_is_refused(tmp_path: Path) -> None:
    module, targets = a_model("llama")
    _, adapter = trained(module, targets, tmp_path / "a")
    attached(module, adapter)
    with pytest.raises(InputRefused, match="needs `input_ids`"):
        module(inputs_embeds=torch.zeros(1, 3, 16))
    with pytest.raises(InputRefused, match="acts on some tokens only, which no weights of a file do"):
        layers.materialise(module, {}, {})
    _, adapter = trained(Plain(), ["fc"], tmp_path / "b", task_type=None)
    with pytest.raises(InputRefused, match="`input_ids`, which Plain does not take"):
        attached(Plain(), adapter)


def test_it_is_not_trained(tmp_path: Path) -> None:
    module, targets = a_model("llama")
    with pytest.raises(InputRefused, match="an activated LoRA is not trained here"):
        attached(module, trained(module, targets, tmp_path)[1], trainable=True)


def test_a_token_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    module, targets = a_model("llama")
    _, adapter = trained(module, targets, tmp_path, alora_invocation_tokens=[7, WORDS])
    with pytest.raises(InputRefused, match=r"alora_invocation_tokens has the token 13, and the model has 13 tokens"):
        attached(module, adapter)


def test_a_part_of_a_text_is_refused_and_nothing_stays_behind(tmp_path: Path) -> None:
    module, targets = a_model("llama")
    _, adapter = trained(module, targets, tmp_path)
    attached(module, adapter)
    past = module(IDS[:, :6], use_cache=True).past_key_values
    with pytest.raises(InputRefused, match=r"finds its tokens in whole texts: `\w+` has a part of them"):
        module(IDS[:, 6:], past_key_values=past)
    layers.detach(module)
    assert not module._forward_pre_hooks and not module._forward_pre_hooks_with_kwargs
