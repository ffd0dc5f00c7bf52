"""The vision encoders of images and tiles of one size: transformers' own code is the measure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_export.models.image_encoders import MaskedTileEncoder
from lora_export.models.image_text import IMAGE_FAMILIES
from lora_export.models.load import load_model
from support.small_models import small_model


@pytest.mark.parametrize("name", ["llava", "gemma3", "paligemma", "internvl"])
def test_features_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    module: Any = load_model(str(small_model(name, tmp_path))).module
    with torch.no_grad():
        module.base_model.multi_modal_projector.apply(_drawn)
        pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        found = module.get_image_features(pixels).pooler_output
        expected = torch.cat([each.flatten(0, -2) for each in found])
        with IMAGE_FAMILIES[name].encoder(module) as encoder:
            features = encoder(pixels)["image_features"]
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-7)
    assert expected.std() > 1e-3
    assert not module.base_model.multi_modal_projector._forward_hooks, "as before"


def _drawn(module: torch.nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        torch.nn.init.normal_(parameter, std=0.2)


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_features_of_tiles_follow_the_mask_of_their_pixels(name: str, tmp_path: Path) -> None:
    module: Any = load_model(str(small_model(name, tmp_path))).module
    pixels = torch.randn(1, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 3, 16, 16, dtype=torch.int64)
    mask[0, 1, :, 8:], mask[0, 2, 5:] = 0, 0
    with torch.no_grad(), MaskedTileEncoder.opened(module) as encoder:
        (expected,) = module.get_image_features(pixels, mask).pooler_output
        torch.testing.assert_close(encoder(pixels, mask)["image_features"], expected, rtol=0, atol=1e-7)
        assert not torch.allclose(encoder(pixels, torch.ones_like(mask))["image_features"], expected, atol=1e-4)
