"""Adapters that were trained after words were added to the model: the refusal names the sizes, and the way out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

import lora_export as le
from lora_export.errors import MatchError
from support.tied import WORDS, tied_model

NEW = WORDS + 3
TRAINED = {
    "pairs": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "whole tables": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}


def trained(base: Path, **how: object) -> PeftModel:
    """An adapter of a model with new words, as after training. Its tables are not tied."""
    model = LlamaForCausalLM.from_pretrained(base, tie_word_embeddings=False)
    model.lm_head.weight.data = model.model.embed_tokens.weight.data.clone()
    model.resize_token_embeddings(NEW, mean_resizing=False)
    adapted = get_peft_model(model, LoraConfig(r=2, **how))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return adapted.eval()


@pytest.mark.parametrize("how", TRAINED)
def test_the_refusal_has_the_sizes_and_the_way_out(how, tmp_path):
    model = tied_model(tmp_path / "base")
    adapted = trained(model.base, **TRAINED[how])
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(MatchError) as refused:
        le.merge(model.base, tmp_path / "adapter", tmp_path / "out", tied="untie")
    (last,) = str(refused.value).splitlines()[-1:]
    assert last.startswith(f"adapter was trained with {NEW} words, and ") and f"has {WORDS}." in last
    assert f"resize_token_embeddings({NEW}), save_pretrained" in last

    resized = LlamaForCausalLM.from_pretrained(model.base, tie_word_embeddings=False)
    resized.resize_token_embeddings(NEW)
    resized.save_pretrained(tmp_path / "resized")
    le.merge(tmp_path / "resized", tmp_path / "adapter", tmp_path / "out")
    found = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(NEW).reshape(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)


def test_new_words_that_an_adapter_lacks_are_named(tmp_path):
    model = tied_model(tmp_path / "base")
    adapted = trained(model.base, target_modules=["embed_tokens"])
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(MatchError, match="has no rows for the new words: save it with save_embedding_layers=True"):
        le.merge(model.base, tmp_path / "adapter", tmp_path / "out", tied="untie")
