"""The vision encoder of a model whose images are grids of patches of any size (Qwen2-VL), for an exporter.

The patches of all images are one sequence. The model's own code loops over the images, which no exporter takes with
another number or another size of images. Here the place of each patch is computed from the grids by tensor
operations, and passed to the model where it would compute it. A patch attends to those of its own frame or window: a
mask from the number of the frame or window of each patch takes the place of the limits of each.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_export.graph.cache_names import FEATURES
from lora_export.models.deepstack import all_features
from lora_export.models.image_encoders import PartOf

TOWER = "visual"
GROUPED_ATTENTION = "lora_export_flash"  # a name with "flash" in it is given the limits of frames and windows


class PatchPlaces(NamedTuple):
    """Where each patch (patches,) of a sequence is, in the order of a model that merges `merge` x `merge` of them."""

    image: Tensor
    frame: Tensor  # counted over all images
    row: Tensor
    column: Tensor


def patch_places(patches: Tensor, grids: Tensor, merge: int) -> PatchPlaces:
    """The places of patches (patches, ...) in images with these grids (images, 3): frames, rows and columns of each."""
    number = torch.arange(patches.shape[0])
    image = _group_of(number, grids.prod(1).cumsum(0))
    within = number - _before(grids.prod(1))[image]
    rows, columns = grids[:, 1][image], grids[:, 2][image]
    frame = within // (rows * columns)
    block, inner = within % (rows * columns) // merge**2, within % merge**2
    across = columns // merge
    return PatchPlaces(
        image,
        _before(grids[:, 0])[image] + frame,
        block // across * merge + inner // merge,
        block % across * merge + inner % merge,
    )


class Windows(NamedTuple):
    """The order of merged patches by windows, and the window of each patch in this order."""

    order: Tensor
    window: Tensor


def windows(places: PatchPlaces, grids: Tensor, merge: int, size: int) -> Windows:
    """Windows of `size` x `size` merged patches of each frame (Qwen2.5-VL)."""
    high, wide = (-(-(grids[:, axis] // merge) // size) for axis in (1, 2))  # rounded up
    row, column, image, frame = (
        each[:: merge**2] for each in (places.row // merge, places.column // merge, places.image, places.frame)
    )
    of_frame = frame - _before(grids[:, 0])[image]
    first = _before(grids[:, 0] * high * wide)[image]
    window = first + (of_frame * high[image] + row // size) * wide[image] + column // size
    key = (window * size + row % size) * size + column % size
    order = torch.argsort(key)
    return Windows(order, window[order].repeat_interleave(merge**2))


class PositionTaps(NamedTuple):
    """The rows of a table of positions that each patch reads (patches, 4), and the weight of each."""

    indices: Tensor
    weights: Tensor


def position_taps(places: PatchPlaces, grids: Tensor, side: int) -> PositionTaps:
    """Where patches are in a table of `side` x `side` positions, whose corners are those of each image (Qwen3-VL)."""
    (above, vertical), (left, horizontal) = (
        _two_taps(place, grids[:, axis][places.image], side) for axis, place in ((1, places.row), (2, places.column))
    )
    indices = above[:, :, None] * side + left[:, None, :]
    return PositionTaps(indices.flatten(1), (vertical[:, :, None] * horizontal[:, None, :]).flatten(1))


def _two_taps(place: Tensor, size: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """The two neighbours (patches, 2) along a side of the table, and their weights in linear interpolation."""
    exact = place.float() * (side - 1) / (size - 1).clamp(min=1)
    first = exact.floor()
    second = (first + 1).clamp(max=side - 1)  # of no weight where it is beyond the table
    return torch.stack([first, second], 1).long(), torch.stack([1 - (exact - first), exact - first], 1)


def _before(counts: Tensor) -> Tensor:
    """How many there are before each group."""
    return counts.cumsum(0) - counts


def _group_of(numbers: Tensor, ends: Tensor) -> Tensor:
    """The group of each number, given the number behind the last one of each group."""
    return (numbers[:, None] >= ends[None, :]).sum(1)


def _attention(
    _: nn.Module, query: Tensor, key: Tensor, value: Tensor, *__: Any, scaling: float, cu_seq_lens_q: Tensor, **___: Any
) -> tuple[Tensor, None]:
    """Attention (1, heads, patches, features) within groups; here `cu_seq_lens_q` is the group of each patch."""
    same = cu_seq_lens_q[:, None] == cu_seq_lens_q[None, :]
    found = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=same[None, None], scale=scaling)
    return found.transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def attention_in_groups(tower: Any) -> Iterator[None]:
    """The attention of a tower by a mask, while active."""
    functions: Any = importlib.import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
    own = tower.config._attn_implementation
    functions.register(GROUPED_ATTENTION, _attention)
    tower.config._attn_implementation = GROUPED_ATTENTION
    try:
        yield
    finally:
        tower.config._attn_implementation = own


@contextlib.contextmanager
def grid_images(module: Any) -> Iterator[nn.Module]:
    """The encoder of a model whose images are grids of patches."""
    with attention_in_groups(getattr(module.base_model, TOWER)):
        yield GridEncoder(module)


class GridEncoder(PartOf):
    """Patches of images with grids as features (tokens of all images, features)."""

    def forward(self, pixel_values: Tensor, image_grid_thw: Tensor) -> dict[str, Tensor]:
        tower = getattr(self.model.base_model, TOWER)
        merge = tower.spatial_merge_size
        places = patch_places(pixel_values, image_grid_thw, merge)
        given = {
            "position_ids": torch.stack([places.row, places.column], 1),
            "cu_seqlens": places.frame,
            "max_seqlen": 1,
        }
        if hasattr(tower, "window_size"):
            size = tower.window_size // merge // tower.patch_size
            order, window = windows(places, image_grid_thw, merge, size)
            given |= {"window_index": order, "cu_window_seqlens": window, "max_window_seqlen": 1}
        if hasattr(tower, "num_grid_per_side"):
            taps = position_taps(places, image_grid_thw, tower.num_grid_per_side)
            given |= {"interp_indices": taps.indices, "interp_weights": taps.weights}
        return {FEATURES: all_features(tower(pixel_values, grid_thw=image_grid_thw, **given))}
