"""Images as tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from lora_export.errors import InputRefused
from lora_export.training.encoders.classified import LabelEncoder
from lora_export.training.encoders.pictures import ImageEncoder
from lora_export.training.row_forms import LabelKind


def test_images_are_prepared_as_the_models_processor_does(tmp_path: Path) -> None:
    processor = ViTImageProcessorPil(size={"height": 4, "width": 4})
    encoder = ImageEncoder(processor, LabelEncoder(LabelKind.CLASS, ("blue", "red")))
    Image.new("L", (9, 7), 128).save(tmp_path / "grey.png")
    Image.new("RGB", (5, 5), (255, 0, 0)).save(tmp_path / "red.png")
    rows = [
        {"image": tmp_path / "grey.png", "label": "blue"},
        {"image": Image.open(tmp_path / "red.png"), "label": "red"},
    ]
    inputs, labels = encoder.collate([encoder.encode(row) for row in rows], [(0, 0), (0, 1)])
    pixels = inputs["pixel_values"]
    assert pixels.shape == (2, 3, 4, 4) and labels.tolist() == [0, 1]
    assert torch.allclose(pixels[1, :, 0, 0], torch.tensor([1.0, -1.0, -1.0]))  # (x / 255 - 0.5) / 0.5
    assert pixels[0].abs().max() < 0.01


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    encoder = ImageEncoder(None, LabelEncoder(LabelKind.CLASS, ("blue", "red")))
    with pytest.raises(InputRefused, match=r"no image that can be read \(cannot identify image file"):
        encoder.encode({"image": tmp_path / "a.png", "label": "red"})
