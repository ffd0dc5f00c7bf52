"""The forms in which language models take images: whole ones, tiles of large ones, or patches with their grids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_export.errors import InputRefused
from lora_export.models.images import draw_pixels, image_shape, pixel_range, refuse_huge
from lora_export.models.model import Axes, ModelInputs

IMAGES, PATCHES = "images", "patches"  # symbols of the number of images, and of the patches of all of them
PIXELS, GRIDS, IMAGE_SIZES = "pixel_values", "image_grid_thw", "image_sizes"  # inputs
PATCHES_ACROSS = (2, 3)  # of the first image and the second, after the merge of neighbours; both are 2 high
HIGH = 2


@dataclass(frozen=True)
class ImageForm:
    """One form of a model's images. They all have one size, or every second one is wider."""

    axes: Axes  # that vary, of the inputs that `draw` makes
    draw: Callable[[int, torch.Generator], ModelInputs]  # of so many images
    patches: Callable[[int], int] = lambda _: 0  # of an image, by its number; 0 where they are no axis
    note: str = ""


def image_forms(config: Any, takes: Sequence[str], folder: Path) -> Iterator[ImageForm]:
    """The forms that a model may take, by the parameters of its forward. The model itself decides which it is.

    Raises InputRefused for images that are too large for an example.
    """
    if GRIDS in takes:
        yield _patches(config, folder)
        return
    shape, note = image_shape(config, folder)
    values, sizes = pixel_range(folder, shape[0]), torch.tensor([shape[1:]])

    def whole(images: int, generator: torch.Generator) -> ModelInputs:
        return {PIXELS: draw_pixels((images, *shape), values, generator)}

    def whole_with_sizes(images: int, generator: torch.Generator) -> ModelInputs:
        return whole(images, generator) | {IMAGE_SIZES: sizes.repeat(images, 1)}

    yield ImageForm({PIXELS: {0: IMAGES}}, whole, note=note)
    if IMAGE_SIZES not in takes:
        return
    axes: Axes = {PIXELS: {0: IMAGES}, IMAGE_SIZES: {0: IMAGES}}
    yield ImageForm(axes, whole_with_sizes, note=note)
    if tiles := _most_tiles(config, folder, shape):
        refuse_huge(folder, "the tiles of an image", (tiles, *shape))

        def tiled(images: int, generator: torch.Generator) -> ModelInputs:
            pixels = draw_pixels((images, tiles, *shape), values, generator)
            return {PIXELS: pixels, IMAGE_SIZES: sizes.repeat(images, 1)}

        yield ImageForm(axes, tiled, note=note)


def _most_tiles(config: Any, folder: Path, shape: tuple[int, int, int]) -> int:
    """The whole image and the tiles of the largest resolution, where a config lists resolutions (LLaVA-NeXT)."""
    resolutions = getattr(config, "image_grid_pinpoints", None) or []
    if not isinstance(resolutions, list | tuple) or not all(map(_is_resolution, resolutions)):
        raise InputRefused(f"{folder / 'config.json'}: image_grid_pinpoints is no list of heights and widths")
    tiles = [high * wide // (shape[1] * shape[2]) for high, wide in resolutions]
    return 1 + max(tiles) if tiles else 0


def _is_resolution(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(type(size) is int and size > 0 for size in value)


def _patches(config: Any, folder: Path) -> ImageForm:
    """Patches (all patches, channels · frames · size²) and a grid (frames, high, wide) of each image (Qwen2-VL).

    The second image is wider than a window of the tower's attention.
    """
    vision = getattr(config, "vision_config", config)
    size, frames = getattr(vision, "patch_size", None), getattr(vision, "temporal_patch_size", 1)
    merged = getattr(vision, "spatial_merge_size", 1)
    channels = getattr(vision, "in_channels", None) or getattr(vision, "num_channels", None) or 3
    refuse_huge(folder, "a group of patches", (merged, merged, channels, frames, size, size))
    assert isinstance(size, int)
    window = getattr(vision, "window_size", None)
    past_window = 1 + window // (size * merged) if type(window) is int else 0
    across = (PATCHES_ACROSS[0], max(PATCHES_ACROSS[1], past_window))
    refuse_huge(folder, "the patches of an image", (HIGH * merged, across[1] * merged, channels, frames, size, size))
    grids = torch.tensor([[1, HIGH * merged, wide * merged] for wide in across])
    values = pixel_range(folder, channels)

    def patches(image: int) -> int:
        return int(grids[image % len(grids)].prod())

    def draw(images: int, generator: torch.Generator) -> ModelInputs:
        count = sum(map(patches, range(images)))
        pixels = draw_pixels((count, channels, frames * size, size), values, generator)
        is_upright = torch.rand(images, 1, generator=generator) < 1 / 2  # as many patches: it may be drawn again alone
        own = grids.repeat(images, 1)[:images]
        return {PIXELS: pixels.reshape(count, -1), GRIDS: torch.where(is_upright, own[:, [0, 2, 1]], own)}

    return ImageForm({PIXELS: {0: PATCHES}, GRIDS: {0: IMAGES}}, draw, patches)
