"""The forms of a language model's images: whole, with sizes, in tiles, or in patches with grids."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_export.errors import InputRefused
from lora_export.models.image_forms import image_forms

GRID = {"patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2, "in_channels": 3}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shapes(drawn: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in drawn.items()}


def grid_form(folder: Path, **more: Any) -> Any:
    config = SimpleNamespace(vision_config=SimpleNamespace(**{**GRID, **more}))
    (form,) = image_forms(config, ["pixel_values", "image_grid_thw"], folder)
    return form


def test_whole_images_come_first_then_with_sizes_then_tiles(tmp_path: Path) -> None:
    config = SimpleNamespace(image_size=8, image_grid_pinpoints=[[8, 16], [24, 16]])
    whole, sized, tiled = image_forms(config, ["pixel_values", "image_sizes"], tmp_path)
    assert shapes(whole.draw(2, generator())) == {"pixel_values": (2, 3, 8, 8)}
    assert shapes(sized.draw(2, generator())) == {"pixel_values": (2, 3, 8, 8), "image_sizes": (2, 2)}
    # The whole image and the six tiles of the largest resolution
    assert shapes(tiled.draw(2, generator())) == {"pixel_values": (2, 7, 3, 8, 8), "image_sizes": (2, 2)}
    assert tiled.draw(1, generator())["image_sizes"].tolist() == [[8, 8]]
    assert [form.axes["pixel_values"] for form in (whole, sized, tiled)] == [{0: "images"}] * 3


def test_grids_hold_the_patches_that_are_drawn(tmp_path: Path) -> None:
    form = grid_form(tmp_path)
    for images in (1, 2, 5):
        drawn = form.draw(images, generator())
        assert int(drawn["image_grid_thw"].prod(1).sum()) == sum(map(form.patches, range(images)))
        assert drawn["pixel_values"].shape == (sum(map(form.patches, range(images))), 3 * 2 * 4 * 4)
    assert [form.patches(image) for image in range(4)] == [16, 24, 16, 24]


def test_grids_vary_between_draws_of_equal_sizes(tmp_path: Path) -> None:
    """Each input is drawn again by itself: a candidate that ignores the grids must show."""
    grids = [grid_form(tmp_path).draw(2, generator(seed))["image_grid_thw"] for seed in range(8)]
    assert {tuple(grid[1].tolist()) for grid in grids} == {(1, 4, 6), (1, 6, 4)}


def test_an_image_passes_the_window_of_the_attention(tmp_path: Path) -> None:
    assert [grid_form(tmp_path, window_size=40).patches(image) for image in (0, 1)] == [16, 48]  # 6 > 40 / (4 * 2)


@pytest.mark.parametrize("field", ["patch_size", "temporal_patch_size", "spatial_merge_size", "in_channels"])
def test_huge_patches_are_refused_before_they_are_drawn(tmp_path: Path, field: str) -> None:
    with pytest.raises(InputRefused, match=r"a group of patches has the shape .*1000000000"):
        grid_form(tmp_path, **{field: 10**9})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": "a"}, "a group of patches has the shape 2 x 2 x 3 x 2 x a x a"),
        ({"patch_size": None}, "a group of patches has the shape 2 x 2 x 3 x 2 x None x None"),
        ({"window_size": 10**30}, "the patches of an image has the shape 4 x 2500"),
    ],
)
def test_values_that_are_no_sizes_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        grid_form(tmp_path, **changes)
    assert grid_form(tmp_path, window_size="a").patches(1) == 24  # which the model itself refuses


@pytest.mark.parametrize("resolutions", [-1, [1], [[1]], [["a", 2]], [[0, 2]], {"a": 1}])
def test_resolutions_that_are_none_are_refused(tmp_path: Path, resolutions: Any) -> None:
    config = SimpleNamespace(image_size=8, image_grid_pinpoints=resolutions)
    with pytest.raises(InputRefused, match="image_grid_pinpoints is no list of heights and widths"):
        list(image_forms(config, ["pixel_values", "image_sizes"], tmp_path))


def test_many_tiles_are_refused_before_they_are_drawn(tmp_path: Path) -> None:
    config = SimpleNamespace(image_size=64, image_grid_pinpoints=[[10**6, 10**6]])
    with pytest.raises(InputRefused, match="the tiles of an image has the shape 244140626 x 3 x 64 x 64"):
        list(image_forms(config, ["pixel_values", "image_sizes"], tmp_path))
