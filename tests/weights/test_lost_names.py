"""Heads that adapters bring: transformers reads every tensor of the output, and draws none at random."""

from __future__ import annotations

import copy
import json
import re

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import lora_export as le
from lora_export.errors import InputRefused
from support.tied import ONE_LAYER, TiedModel, tied_model

HEAD = "lm_head.weight"


def with_own_head(model: TiedModel, folder, target: str) -> peft.PeftModel:
    """PEFT's model with a pair and a head of its own, saved in a folder."""
    trained = model.trained(target, modules_to_save=["lm_head"])
    trained.save_pretrained(folder)
    return trained


@pytest.mark.parametrize(
    ("architecture", "target", "tied"),
    [
        ("GPTNeoXForCausalLM", "query_key_value", False),  # stored as embed_out, loaded as lm_head
        ("GPTNeoXForCausalLM", "query_key_value", True),
        ("LlamaForCausalLM", "q_proj", True),
        ("GPT2LMHeadModel", "c_attn", True),
        ("BartForConditionalGeneration", "q_proj", True),  # the tables of encoder and decoder are tied too
        ("MBartForConditionalGeneration", "q_proj", True),
        ("M2M100ForConditionalGeneration", "q_proj", True),
    ],
)
def test_a_head_of_an_adapter_is_the_one_that_transformers_loads(architecture, target, tied, tmp_path):
    model = tied_model(tmp_path / "base", architecture, tied=tied)
    expected = model.outputs(with_own_head(model, tmp_path / "adapter", target))
    le.merge(model.base, tmp_path / "adapter", tmp_path / "out")
    found = model.outputs(model.reloaded(tmp_path / "out"))
    assert float((found - expected).norm()) < 1e-6 * float(expected.norm())
    assert le.verify(tmp_path / "out", base=model.base, adapters=tmp_path / "adapter")


def test_a_head_that_its_config_cannot_untie_is_refused(tmp_path):
    model = tied_model(tmp_path / "base", "T5ForConditionalGeneration")
    with_own_head(model, tmp_path / "adapter", "q")
    with pytest.raises(InputRefused, match=r"adds lm_head\.weight, which the model ties.*another model"):
        le.merge(model.base, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_that_the_class_does_not_read_is_refused(tmp_path):
    model = tied_model(tmp_path / "base")
    model.trained("q_proj").save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.score.weight": np.ones((2, 8), np.float32)}, file)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["score"]}))
    with pytest.raises(InputRefused, match=r"score\.weight: LlamaForCausalLM has no weight of this name"):
        le.merge(model.base, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("base", "target", "saved"),
    [
        ("DistilBertForMaskedLM", "q_lin", ("classifier",)),
        ("BertForMaskedLM", "query", ("classifier",)),
        ("DebertaV2ForMaskedLM", "query_proj", ("classifier",)),
        ("RobertaForMaskedLM", "query", ("classifier",)),
        ("ElectraForPreTraining", "query", ("classifier",)),
        ("AlbertForMaskedLM", "query", ("classifier",)),
        ("BertModel", "query", ("classifier",)),
        ("LlamaForCausalLM", "q_proj", ("score",)),
    ],
)
def test_parts_that_transformers_would_draw_at_random_are_refused(base, target, saved, tmp_path):
    """What it would draw is what it reports as missing when it loads the class from the base and the adapter's head."""
    cls = getattr(transformers, base)
    sizes = {"dim": 8, "hidden_dim": 12, "n_layers": 1, "n_heads": 2} if "Distil" in base else ONE_LAYER
    cls(cls.config_class(vocab_size=23, **sizes)).save_pretrained(tmp_path / "base")
    head = getattr(transformers, re.sub("For.*|Model", "", base) + "ForSequenceClassification")
    model, loading = head.from_pretrained(tmp_path / "base", output_loading_info=True)
    missing = {name.rpartition(".")[0] for name in loading["missing_keys"]}
    random = {module for module in missing if not module.split(".")[0].endswith(saved)}  # as PEFT looks for them
    options = {"target_modules": [target], "modules_to_save": list(saved), "task_type": "SEQ_CLS"}
    trained = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, init_lora_weights=False, **options))
    trained.save_pretrained(tmp_path / "adapter")
    if not random:
        le.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
        ids = torch.arange(6).reshape(1, -1)
        with torch.no_grad():
            found = head.from_pretrained(tmp_path / "out").eval()(ids).logits
            expected = trained.eval()(input_ids=ids).logits
        assert float((found - expected).norm()) < 1e-5 * float(expected.norm())
        return
    with pytest.raises(InputRefused) as refused:
        le.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    for module in random:
        assert f"{module}: {head.__name__} has it, and neither the base nor the adapters" in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "BartForConditionalGeneration"])
def test_an_output_that_is_untied_and_lacks_a_head_is_different(architecture, tmp_path):
    model = tied_model(tmp_path / "base", architecture)
    model.trained("q_proj").save_pretrained(tmp_path / "adapter")
    le.merge(model.base, tmp_path / "adapter", tmp_path / "out")
    assert le.verify(tmp_path / "out", base=model.base, adapters=tmp_path / "adapter")
    config = tmp_path / "out" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False}))
    verdict = le.verify(tmp_path / "out", base=model.base, adapters=tmp_path / "adapter").verdict
    assert verdict.outcome == "different"
    assert f"{HEAD}: different, it is tied to" in str(verdict) and "neither tied nor stored in the output" in str(
        verdict
    )


def test_two_tensors_of_one_name_in_the_loaded_model_are_different(tmp_path):
    """A merge that adds `lm_head` beside `embed_out` has the old head in transformers."""
    model = tied_model(tmp_path / "base", "GPTNeoXForCausalLM", tied=False)
    file = model.base / "model.safetensors"
    weights = load_file(file)
    if HEAD in weights:  # as files of older versions spell it
        weights["embed_out.weight"] = weights.pop(HEAD)
        save_file(weights, file, metadata={"format": "pt"})
    with_own_head(model, tmp_path / "adapter", "query_key_value")
    le.merge(model.base, tmp_path / "adapter", tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert HEAD not in merged
    assert not np.array_equal(merged["embed_out.weight"], weights["embed_out.weight"])
    both = merged | {HEAD: merged["embed_out.weight"], "embed_out.weight": weights["embed_out.weight"]}
    save_file(both, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    assert le.verify(tmp_path / "out", base=model.base, adapters=tmp_path / "adapter").verdict.outcome == "different"


def test_an_attention_of_detr_is_stored_under_another_name(tmp_path):
    """DETR's attention is stored with `out_proj`, and loaded with `o_proj`."""
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, out_features=["stage4"]
    )
    sizes = {
        f"{part}_{name}": size
        for part in ("encoder", "decoder")
        for name, size in {"layers": 1, "attention_heads": 2, "ffn_dim": 16}.items()
    }
    config = transformers.DetrConfig(
        use_timm_backbone=False, backbone_config=backbone, d_model=16, num_queries=5, **sizes
    )
    torch.manual_seed(0)
    model = transformers.DetrForObjectDetection(config).eval()
    model.save_pretrained(tmp_path / "base")
    options = peft.LoraConfig(r=2, target_modules=["o_proj", "q_proj"], init_lora_weights=False)
    trained = peft.get_peft_model(model, options).eval()
    trained.save_pretrained(tmp_path / "adapter")
    le.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = trained(pixel_values=pixels).logits
        found = type(model).from_pretrained(tmp_path / "out").eval()(pixel_values=pixels).logits
    assert float((found - expected).norm()) < 1e-5 * float(expected.norm())
