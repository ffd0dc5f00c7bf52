"""Points that tell a model what to segment."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as hf

from lora_export.models.generated_inputs import generated_inputs
from support.more_models import MORE_MODELS

FOLDER = Path("no-such-folder")


def test_a_model_of_segments_takes_points_with_labels() -> None:
    torch.manual_seed(0)
    module = hf.SamModel(MORE_MODELS["sam"][1]()).eval()
    inputs = generated_inputs(module, FOLDER)
    axes = {0: "batch", 1: "objects", 2: "points"}
    assert inputs.axes == {"pixel_values": {0: "batch"}, "input_points": axes, "input_labels": axes}
    made = inputs.make({"batch": 2, "objects": 4, "points": 5}, torch.Generator().manual_seed(0))
    assert made["input_points"].shape == (2, 4, 5, 2) and made["input_labels"].shape == (2, 4, 5)
    assert 0 <= made["input_points"].min() < 4 and 12 < made["input_points"].max() <= 16  # the image has 16 x 16 pixels
    assert set(made["input_labels"].unique().tolist()) == {-1, 0, 1}
    with torch.no_grad():
        masks, others = (
            module(**{**made, "input_points": points}).pred_masks
            for points in (made["input_points"], made["input_points"].flip(0))
        )
    assert masks.shape[:2] == (2, 4)
    assert not torch.allclose(masks, others)


def test_other_models_of_images_get_no_points() -> None:
    module = hf.ViTModel(
        hf.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4)
    )
    assert set(generated_inputs(module, FOLDER).axes) == {"pixel_values"}
