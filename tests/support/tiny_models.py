"""A Llama, a BERT and a GPT-2 of one layer, seeded and in eval mode. A test names the sizes that it is about."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

SIZES = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
GPT2_SIZES = {"vocab_size": 10, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}


def tiny_llama(**config: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_key_value_heads": 2, **config})).eval()


def tiny_bert(cls: Any = BertForSequenceClassification, **config: Any) -> Any:
    torch.manual_seed(0)
    return cls(BertConfig(**{**SIZES, "num_labels": 3, **config})).eval()


def tiny_gpt2(**config: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**{**GPT2_SIZES, **config})).eval()
