"""A tokenizer whose tokens are letters."""

from __future__ import annotations

import torch
from torch import Tensor


class LettersTokenizer:
    """As transformers' tokenizers behave: one token a letter, 0 for padding."""

    pad_token: str | None = "-"
    model_max_length = 4

    def __call__(self, texts: list[str], *, truncation: bool, max_length: int) -> dict[str, list[list[int]]]:
        assert truncation
        ids = [[ord(letter) - 96 for letter in text][:max_length] for text in texts]
        return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}

    def pad(self, features: list[dict[str, list[int]]], *, return_tensors: str) -> dict[str, Tensor]:
        assert return_tensors == "pt"
        longest = max(len(feature["input_ids"]) for feature in features)
        return {
            name: torch.tensor([feature[name] + [0] * (longest - len(feature[name])) for feature in features])
            for name in features[0]
        }
