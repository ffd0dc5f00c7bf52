"""A base and a model that was fully trained from it, saved by transformers: what `extract` compares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = transformers.LlamaConfig(
    **SIZES, intermediate_size=24, num_key_value_heads=2, tie_word_embeddings=False, attention_bias=True
)
TIED = transformers.LlamaConfig(**SIZES, intermediate_size=24, num_key_value_heads=2, tie_word_embeddings=True)
BERT = transformers.BertConfig(**SIZES, intermediate_size=24, max_position_embeddings=32)
GPT2_SIZES = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
GPT2, TIED_GPT2 = (
    transformers.GPT2Config(**GPT2_SIZES, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0)
    for tied in (False, True)
)
VIT = transformers.ViTConfig(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
)
MODELS: dict[str, tuple[Any, Any]] = {
    "llama": (transformers.LlamaForCausalLM, LLAMA),
    "bert norms": (transformers.BertForMaskedLM, BERT),
    "tied": (transformers.LlamaForCausalLM, TIED),
    "bert": (transformers.BertForMaskedLM, BERT),
    "bert-classifier": (transformers.BertForSequenceClassification, BERT),
    "gpt2": (transformers.GPT2LMHeadModel, GPT2),
    "tied gpt2": (transformers.GPT2LMHeadModel, TIED_GPT2),
    "tied bert": (transformers.BertForMaskedLM, BERT),
    "vit": (transformers.ViTForImageClassification, VIT),
}
RANK = 2  # of every change of a matrix


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    cls, config = MODELS[name]
    model: nn.Module = cls(config).eval()
    return model


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    return {"input_ids": torch.randint(0, 50, (2, 7), generator=generator)}


def base_and_tuned(name: str, folder: Path, *, parts: tuple[str, ...] = ("",), noise: float = 0.0) -> nn.Module:
    """Save `base` and `tuned`; return the tuned model. Parameters whose name contains one of `parts` change.

    Matrices and convolutions change by a matrix of rank RANK and `noise`, vectors in every entry.
    """
    model = made(name)
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if not any(part in parameter_name for part in parts):
                continue
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
                continue
            rows = parameter.shape[0]
            low = torch.randn(rows, RANK) @ torch.randn(RANK, parameter.numel() // rows)
            parameter.add_((0.02 * low + noise * torch.randn(low.shape)).reshape(parameter.shape))
    model.save_pretrained(folder / "tuned")
    return model
