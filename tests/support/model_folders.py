"""Small models of the matrix that other packages than transformers save: the folder, and the module that is adapted."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import nn

from support.diffusion import unet
from support.small_models import TEXT, words_tokenizer


def _sentence_transformer(folder: Path) -> nn.Module:
    """BERT with pooling, a dense layer and normalisation; PEFT's adapter is on BERT."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    inner = folder.with_name("bert")
    hf.BertModel(hf.BertConfig(**TEXT)).save_pretrained(inner)
    words_tokenizer(inner)
    modules = [
        Transformer(str(inner)),
        Pooling(TEXT["hidden_size"], "mean"),
        Dense(TEXT["hidden_size"], 8),
        Normalize(),
    ]
    with warnings.catch_warnings(action="ignore"):
        SentenceTransformer(modules=modules, device="cpu").save(str(folder))
    return hf.BertModel.from_pretrained(inner)


def _saved(module: Any, folder: Path) -> nn.Module:
    module.save_pretrained(folder)
    loaded: nn.Module = type(module).from_pretrained(folder)
    return loaded


def _dit(folder: Path) -> nn.Module:
    from diffusers import DiTTransformer2DModel

    module = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10, norm_num_groups=8,
    )  # fmt: skip
    return _saved(module, folder)


# name -> saves the model in a folder, and returns the module that PEFT adapts
MODEL_FOLDERS: dict[str, Callable[[Path], nn.Module]] = {
    "sentence-transformers": _sentence_transformer,
    "unet": lambda folder: _saved(unet(), folder),
    "dit": _dit,
}


def saved_module(name: str, folder: Path) -> nn.Module:
    """Save one of MODEL_FOLDERS with seeded weights."""
    torch.manual_seed(0)
    return MODEL_FOLDERS[name](folder).eval()
