"""Images with classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_export.models.pictures import read_image
from lora_export.training.encoders.classified import LabelEncoder
from lora_export.training.losses import Batch, Loss
from lora_export.training.records.rows import Row


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
