"""Adapters and dtypes under the names of a module that transformers renamed when it loaded it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from lora_export import layers, plan
from lora_export.errors import MatchError
from support import experts
from support.plans import holding
from support.spellings import filled

SIZES = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}


def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(num_hidden_layers=1, **SIZES)).eval()


def test_an_original_adapter_is_attached_to_the_loaded_module():
    old = holding(pairs={"vit.encoder.layer.0.attention.attention.query": filled(2, 8, 8)})
    new = holding(pairs={"vit.layers.0.attention.q_proj": filled(2, 8, 8)})
    images, outputs = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), []
    for adapter in (old, new):
        module = vit()
        (found,) = layers.respelled_for(module, [adapter])
        layers.attach(module, plan.make([found], layers.specs(module)))
        outputs.append(module(images).logits)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)
    assert not torch.allclose(outputs[0], vit()(images).logits, atol=1e-3)


def test_an_adapter_with_the_modules_names_stays_as_it_is():
    new = holding(pairs={"vit.layers.0.attention.q_proj": filled(2, 8, 8)})
    assert layers.respelled_for(vit(), [new]) == [new]
    assert layers.respelled_for(nn.Linear(2, 2), [new]) == [new]
    assert layers.respelled_for(vit(), []) == []


def test_a_layer_of_the_original_names_without_tensors_is_missing():
    old = holding(
        pairs={"vit.encoder.layer.0.attention.attention.query": filled(2, 8, 8)},
        targets=("query",),
    )
    module = ViTForImageClassification(ViTConfig(num_hidden_layers=2, **SIZES))
    with pytest.raises(MatchError, match=r"vit\.layers\.1\.attention\.q_proj: targeted"):
        layers.respelled_for(module, [old])


def test_dtypes_are_known_under_the_names_of_the_module():
    stored = {"vit.encoder.layer.0.attention.attention.query.weight": "bfloat16", "classifier.weight": "float32"}
    found = layers.with_loaded_names(vit(), stored)
    assert found == {**stored, "vit.layers.0.attention.q_proj.weight": "bfloat16"}
    assert layers.with_loaded_names(nn.Linear(2, 2), stored) == stored


def test_a_stack_has_the_dtype_that_all_its_experts_have():
    model = experts.tiny_model("mixtral")
    names = [f"model.layers.0.block_sparse_moe.experts.{expert}.w2.weight" for expert in range(experts.COUNT)]
    stack = "model.layers.0.mlp.experts.down_proj"
    assert layers.with_loaded_names(model, dict.fromkeys(names, "bfloat16"))[stack] == "bfloat16"
    assert stack not in layers.with_loaded_names(model, {**dict.fromkeys(names, "bfloat16"), names[1]: "float32"})
