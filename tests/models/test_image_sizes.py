"""The vision encoders of images that differ in size, without loops: transformers' own code is the measure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.image_processing_utils import select_best_resolution

from lora_export.models.image_sizes import RowEncoder, SizedTileEncoder, best_resolutions
from lora_export.models.load import load_model
from support.small_models import small_model

# Of LLaVA-NeXT 1.6; the first two are equally good for a square image
RESOLUTIONS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def any_sizes(most: int, count: int) -> torch.Tensor:
    """Random heights and widths (count, 2), and square ones."""
    drawn = np.random.default_rng(0).integers(1, most, (count, 2))
    drawn[::5, 1] = drawn[::5, 0]
    return torch.from_numpy(drawn)


def test_resolutions_are_those_of_transformers() -> None:
    sizes = any_sizes(2000, 500)
    found = best_resolutions(sizes, RESOLUTIONS).tolist()
    expected = [select_best_resolution(own, RESOLUTIONS) for own in sizes.tolist()]
    assert [tuple(RESOLUTIONS[each]) for each in found] == expected
    assert set(found) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(("name", "block"), [("pixtral", 4), ("mistral3", 8)])
def test_features_of_rows_are_those_of_the_model(name: str, block: int, tmp_path: Path) -> None:
    module: Any = load_model(str(small_model(name, tmp_path))).module
    sizes = torch.tensor([[2, 3], [1, 5], [4, 1], [1, 1]]) * block
    pixels = torch.randn(4, 3, 6 * block, 5 * block, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), RowEncoder.opened(module) as encoder:
        module.base_model.multi_modal_projector.linear_2.weight.mul_(32)
        expected = torch.cat(module.get_image_features(pixels, image_sizes=sizes).pooler_output)
        found = encoder(pixels, sizes)["image_features"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert expected.std() > 1e-2


def test_features_of_tiles_are_those_of_the_model(tmp_path: Path) -> None:
    module: Any = load_model(str(small_model("llava_next", tmp_path))).module
    sizes = any_sizes(100, 60)
    pixels = torch.randn(60, 6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), SizedTileEncoder.opened(module) as encoder:
        expected = module.get_image_features(pixels, sizes).pooler_output
        found = encoder(pixels, sizes)
    assert found["image_token_counts"].tolist() == list(map(len, expected))
    torch.testing.assert_close(found["image_features"], torch.cat(expected), rtol=0, atol=1e-6)
    assert found["image_features"].std() > 1e-2
