"""Texts and images with labels: classes, several at once, values, and a tag for each word; and pairs of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from lora_export.errors import InputRefused
from lora_export.models.pictures import read_image
from lora_export.training.arrays import IGNORED
from lora_export.training.losses import Batch, BinaryCrossEntropy, CosineError, CrossEntropy, Loss, SquaredError
from lora_export.training.records.rows import Row
from lora_export.training.row_forms import LabelKind, label_value


def padded_tokens(tokenizer: Any, encoded: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Tokenised texts as tensors, padded to the longest of them."""
    return dict(tokenizer.pad(list(encoded), return_tensors="pt"))


@dataclass(frozen=True, eq=False)
class LabelEncoder:
    """A label as a number, a row of zeros and ones, or a value."""

    kind: LabelKind
    classes: tuple[str | int, ...]

    @cached_property
    def index_of(self) -> dict[str | int, int]:
        return {label: number for number, label in enumerate(self.classes)}

    @property
    def loss(self) -> Loss:
        if self.kind is LabelKind.CLASS:
            return CrossEntropy()
        return BinaryCrossEntropy() if self.kind is LabelKind.CLASSES else SquaredError()

    def tensor(self, labels: Sequence[Any]) -> torch.Tensor:
        """int64 (n,) of classes, float32 (n, classes) of several at once, or float32 (n,) of values."""
        if self.kind is LabelKind.CLASS:
            return torch.tensor([self.index_of[label_value(label, self.classes)] for label in labels])
        if self.kind is LabelKind.VALUE:
            return torch.tensor([float(label) for label in labels])
        chosen = torch.zeros(len(labels), len(self.classes))
        for row, group in enumerate(labels):
            chosen[row, [self.index_of[label] for label in group]] = 1
        return chosen


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """`text`, with `text_pair` where the row has one, and `label`."""

    tokenizer: Any
    max_length: int
    labels: LabelEncoder

    @property
    def loss(self) -> Loss:
        return self.labels.loss

    def encode(self, row: Row) -> tuple[dict[str, Any], Any]:
        texts = [row["text"], row["text_pair"]] if "text_pair" in row else [row["text"]]
        return dict(self.tokenizer(*texts, truncation=True, max_length=self.max_length)), row["label"]

    def collate(self, encoded: Sequence[Any], keys: Sequence[tuple[int, int]]) -> Batch:  # noqa: ARG002
        return Batch(
            padded_tokens(self.tokenizer, [tokens for tokens, _ in encoded]),
            self.labels.tensor([x for _, x in encoded]),
        )


@dataclass(frozen=True, eq=False)
class TagEncoder:
    """`tokens`, the words of a text, with `tags`. The first token of a word has its tag; the others are ignored."""

    tokenizer: Any
    max_length: int
    labels: LabelEncoder

    loss = CrossEntropy()

    def encode(self, row: Row) -> tuple[dict[str, Any], list[int]]:
        if not self.tokenizer.is_fast:
            raise InputRefused("tags need a fast tokenizer (tokenizer.json), which knows the word of each token")
        tokens = self.tokenizer(row["tokens"], is_split_into_words=True, truncation=True, max_length=self.max_length)
        words = tokens.word_ids()
        numbers = [self.labels.index_of[tag] for tag in row["tags"]]
        before = [None, *words]
        tags = [
            IGNORED if word is None or word == last else numbers[word]
            for word, last in zip(words, before, strict=False)
        ]
        return dict(tokens), tags

    def collate(self, encoded: Sequence[Any], keys: Sequence[tuple[int, int]]) -> Batch:  # noqa: ARG002
        inputs = padded_tokens(self.tokenizer, [tokens for tokens, _ in encoded])
        labels = torch.full(inputs["input_ids"].shape, IGNORED)
        for row, (_, tags) in enumerate(encoded):
            at_left = getattr(self.tokenizer, "padding_side", "right") == "left"
            start = labels.shape[1] - len(tags) if at_left else 0
            labels[row, start : start + len(tags)] = torch.tensor(tags)
        return Batch(inputs, labels)


@dataclass(frozen=True, eq=False)
class SimilarityEncoder:
    """`sentence1`, `sentence2` and their `score`: a batch has all first sentences, then all second ones."""

    tokenizer: Any
    max_length: int

    loss = CosineError()

    def encode(self, row: Row) -> tuple[dict[str, Any], dict[str, Any], float]:
        first, second = (
            dict(self.tokenizer(row[name], truncation=True, max_length=self.max_length))
            for name in ("sentence1", "sentence2")
        )
        return first, second, float(row["score"])

    def collate(self, encoded: Sequence[Any], keys: Sequence[tuple[int, int]]) -> Batch:  # noqa: ARG002
        texts = [first for first, _, _ in encoded] + [second for _, second, _ in encoded]
        return Batch(padded_tokens(self.tokenizer, texts), torch.tensor([score for _, _, score in encoded]))


@dataclass(frozen=True, eq=False)
class ImageEncoder:
    """`image`, a path or an image of Pillow, prepared as the model's own processor does, and `label`."""

    processor: Any  # transformers' image processor
    labels: LabelEncoder

    @property
    def loss(self) -> Loss:
        return self.labels.loss

    def encode(self, row: Row) -> tuple[torch.Tensor, Any]:
        prepared = self.processor(read_image(row["image"]), return_tensors="pt")
        return prepared["pixel_values"][0], row["label"]  # (channels, height, width)

    def collate(self, encoded: Sequence[Any], keys: Sequence[tuple[int, int]]) -> Batch:  # noqa: ARG002
        pixels = torch.stack([pixels for pixels, _ in encoded])
        return Batch({"pixel_values": pixels}, self.labels.tensor([label for _, label in encoded]))
