"""The vision encoders of models whose images differ in size, and come with `image_sizes`, for an exporter.

The images are padded to one size. The models' own code cuts each out in a loop, which no exporter takes with another
number of images. Here all of them are computed with their padding, and a mask chooses the features that are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_export.graph.cache_names import FEATURES, TOKEN_COUNTS
from lora_export.models.image_encoders import PartOf

ROW_TOWER = "pixtral"  # the type of a tower that lists the patches of an image row by row


def pixels_of_token(config: Any) -> int:
    """The pixels of a token along each side, of a model whose images are rows of tokens."""
    return int(config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1))


class RowEncoder(PartOf):
    """Padded images (images, channels, height, width) as features (tokens of all images, features). Of Pixtral."""

    def forward(self, pixel_values: Tensor, image_sizes: Tensor) -> dict[str, Tensor]:
        model, config = self.model.base_model, self.model.config
        hidden = _rows(model.vision_tower, pixel_values, image_sizes, config.vision_feature_layer)
        features = _projected(model.multi_modal_projector, hidden)
        return {FEATURES: features[_inside(features, image_sizes // pixels_of_token(config))]}


def _rows(tower: Any, pixels: Tensor, sizes: Tensor, layers: int | Sequence[int]) -> Tensor:
    """The hidden states (images, rows, columns, features) of these layers of the tower, also of padding."""
    grid = tower.patch_conv(pixels).movedim(1, -1)
    inside = _inside(grid, sizes // tower.patch_size)
    rows, columns = grid.shape[1:3]
    row, column = torch.arange(rows)[:, None].expand(rows, columns), torch.arange(columns).expand(rows, columns)
    states: list[Tensor] = [tower.ln_pre(grid.flatten(1, 2))]
    positions = tower.patch_positional_embedding(states[0], torch.stack([row.flatten(), column.flatten()], 1))
    mask = torch.where(inside.flatten(1), 0.0, torch.finfo(grid.dtype).min)[:, None, None].to(grid.dtype)
    mask = mask.expand(-1, 1, rows * columns, -1)
    for layer in tower.transformer.layers:
        states.append(layer(states[-1], mask, position_embeddings=positions))
    found: Tensor = _chosen(states, layers).unflatten(1, (rows, columns))
    return found


def _chosen(states: Sequence[Tensor], layers: int | Sequence[int]) -> Tensor:
    """The hidden states behind one layer, or those of several side by side."""
    return torch.cat([states[each] for each in ([layers] if isinstance(layers, int) else layers)], -1)


def _inside(grid: Tensor, sizes: Tensor) -> Tensor:
    """Which places of a grid (images, rows, columns, ...) are within these rows and columns (images, 2)."""
    rows, columns = (torch.arange(grid.shape[axis]) for axis in (1, 2))
    return (rows[None, :, None] < sizes[:, 0, None, None]) & (columns[None, None, :] < sizes[:, 1, None, None])


def _projected(projector: Any, grid: Tensor) -> Tensor:
    """What a projector makes of a grid of patches (images, rows, columns, features); that of Mistral 3 merges some."""
    if not hasattr(projector, "patch_merger"):
        return torch.as_tensor(projector(grid))
    merger = projector.patch_merger
    merged = merger.merging_layer(_merged(projector.norm(grid), merger.spatial_merge_size))
    return torch.as_tensor(projector.linear_2(projector.act(projector.linear_1(merged))))


def _merged(grid: Tensor, size: int) -> Tensor:
    """Blocks of `size` x `size` patches as one (images, rows, columns, features · size²), each feature's together."""
    rows, columns = (torch.arange(grid.shape[axis] // size) * size for axis in (1, 2))
    places = [(row, column) for row in range(size) for column in range(size)]
    blocks = [grid.index_select(1, rows + row).index_select(2, columns + column) for row, column in places]
    return torch.stack(blocks, -1).flatten(3)


class SizedTileEncoder(PartOf):
    """Tiles of LLaVA-NeXT (images, tiles, channels, height, width) as features (tokens of all images, features).

    The first tile is the whole image. The rows of tokens of the others, without those of the padding around the image,
    follow it, and a newline each. Also returns how many tokens each image has (images,).
    """

    def forward(self, pixel_values: Tensor, image_sizes: Tensor) -> dict[str, Tensor]:
        config, (images, tiles) = self.model.config, pixel_values.shape[:2]
        size = config.vision_config.image_size
        packing = packed_tiles(image_sizes, config.image_grid_pinpoints, size, size // config.vision_config.patch_size)
        features = self._of_tiles(pixel_values.flatten(0, 1))
        of_image = tiles * features.shape[1]
        index = torch.where(
            packing.token < 0, images * of_image, packing.token + torch.arange(images)[:, None] * of_image
        )
        rows = torch.cat([features.flatten(0, 1), self.model.base_model.image_newline[None]])
        return {FEATURES: rows[index[packing.is_read]], TOKEN_COUNTS: packing.is_read.sum(1)}

    def _of_tiles(self, pixels: Tensor) -> Tensor:
        """The features (tiles, tokens, features) of tiles (tiles, channels, height, width)."""
        model, config = self.model.base_model, self.model.config
        states = model.vision_tower(pixels, output_hidden_states=True).hidden_states
        hidden = _chosen(states, config.vision_feature_layer)
        begin = 1 if config.vision_feature_select_strategy == "default" else 0  # behind the token of the whole tile
        found: Tensor = model.multi_modal_projector(hidden[:, begin:])
        return found


class Packing(NamedTuple):
    """The tokens of images in their order (images, places), of which those are read that `is_read` marks."""

    token: Tensor  # by its number among those of the image's tiles; -1 for a newline
    is_read: Tensor


def packed_tiles(sizes: Tensor, resolutions: Sequence[Sequence[int]], size: int, side: int) -> Packing:
    """The tokens of images of these heights and widths (images, 2), from tiles of `side` x `side` tokens.

    `size` are the pixels along a tile, and `resolutions` the heights and widths that are divided into tiles.
    """
    best = torch.tensor(resolutions)[best_resolutions(sizes, resolutions)]
    grid = best // size * side  # rows and columns of tokens (images, 2)
    most_rows, most_columns = (max(each[axis] for each in resolutions) // size * side for axis in (0, 1))
    row, column = torch.arange(most_rows)[:, None], torch.arange(most_columns + 1)  # the last one is a newline
    across = (grid[:, 1] // side)[:, None, None]
    tile = 1 + row // side * across + column // side
    index = tile * side**2 + row % side * side + column % side
    margin = _margins(sizes, grid)
    own_row, own_column = (
        (place >= margin[:, axis, None, None]) & (place < (grid - margin)[:, axis, None, None])
        for axis, place in ((0, row), (1, column))
    )
    is_newline = column == most_columns
    whole = torch.arange(side**2).expand(len(sizes), -1)
    return Packing(
        torch.cat([whole, torch.where(is_newline, -1, index).flatten(1)], 1),
        torch.cat([torch.ones_like(whole, dtype=torch.bool), (own_row & (own_column | is_newline)).flatten(1)], 1),
    )


def best_resolutions(sizes: Tensor, resolutions: Sequence[Sequence[int]]) -> Tensor:
    """The number (images,) of the resolution that shows most of each image, and of these wastes least."""
    high, wide = torch.tensor(resolutions).T
    own_high, own_wide = sizes[:, :1], sizes[:, 1:]
    scale = torch.minimum(wide.double() / own_wide, high.double() / own_high)
    shown = (own_wide * scale).long() * (own_high * scale).long()
    effective = torch.minimum(shown, own_high * own_wide)
    wasted = (high * wide - effective) * len(resolutions) + torch.arange(len(resolutions))  # the first of equal ones
    is_best = effective == effective.amax(1, keepdim=True)
    return torch.where(is_best, wasted, torch.iinfo(torch.int64).max).argmin(1)


def _margins(sizes: Tensor, grid: Tensor) -> Tensor:
    """The rows and columns (images, 2) at each edge of a grid of tokens that are padding around the image."""
    own, whole = sizes.double(), grid.double()
    is_wider = (own[:, 1] / own[:, 0] > whole[:, 1] / whole[:, 0])[:, None]
    scaled = torch.where(is_wider, own * (whole[:, 1:] / own[:, 1:]), own * (whole[:, :1] / own[:, :1]))
    inside = torch.floor(scaled + 5e-8).long()  # an integer to seven decimals is one
    is_padded = torch.cat([is_wider, ~is_wider], 1)
    return torch.where(is_padded, (grid - inside) // 2, 0)
