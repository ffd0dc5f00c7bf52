"""The vision encoders of images with grids, without loops: transformers' own code is the measure."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from lora_export.models.deepstack import all_features
from lora_export.models.image_grids import GridEncoder, attention_in_groups, patch_places, windows
from lora_export.models.load import load_model
from support.small_models import small_model

GRIDS = [
    [[1, 4, 6], [1, 8, 4]],
    [[1, 12, 10]],
    [[1, 2, 2], [2, 6, 14], [1, 4, 4]],
    [[1, 10, 6], [1, 6, 10], [1, 16, 4], [1, 4, 4]],
]


@pytest.mark.parametrize("grids", GRIDS)
def test_places_and_windows_are_those_of_transformers(grids: list[list[int]]) -> None:
    grid = torch.tensor(grids)
    places = patch_places(torch.empty(int(grid.prod(1).sum())), grid, 2)
    assert torch.equal(torch.stack([places.row, places.column], 1), get_vision_position_ids(grid, 2))
    order, ends = get_vision_window_index(grid, 2, window_size=16, patch_size=4)
    found = windows(places, grid, 2, 2)
    assert torch.equal(found.order, order)
    _, counts = torch.unique_consecutive(found.window, return_counts=True)
    assert counts.tolist() == ends.diff().tolist()


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_features_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    module = load_model(str(small_model(name, tmp_path))).module
    encoder = GridEncoder(module)
    for grids in GRIDS:
        grid = torch.tensor(grids)
        patches = torch.randn(int(grid.prod(1).sum()), 96, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = all_features(module.get_image_features(patches, grid))
            with attention_in_groups(module.base_model.visual):
                found = encoder(patches, grid)["image_features"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
        assert expected.std() > 1e-3
    assert module.base_model.visual.config._attn_implementation == "sdpa"  # as before
