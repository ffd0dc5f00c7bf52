"""The values of a model's images: what its image processor can give, and some beyond.

A fault at the end of the range (a Clip, a table that is too short) does not show in values from -1 to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lora_export.models.image_shape import PROCESSOR
from lora_export.storage import json_files

# Image processors without a file: means from 0.406 to 0.5, standard deviations from 0.224 to 0.5. The widest ranges are
# those of ImageNet's numbers, which CLIP's are within.
USUAL_RANGE = (-2.2, 2.7)
BEYOND_EVERY, BEYOND = 8, 2.0  # pixels, of which one is drawn from a range that is wider by this factor
LARGEST_VALUE = 1e4  # a processor that gives more is not believed


class PixelRange(NamedTuple):
    """The least and the greatest value of each channel: tensors (channels,), or (1,) for all."""

    low: torch.Tensor
    high: torch.Tensor


def pixel_range(folder: Path, channels: int) -> PixelRange:
    """The range that the folder's image processor gives, or that of usual processors where it has none."""
    path = folder / PROCESSOR
    fields = json_files.read_json(path) if path.is_file() else {}
    found = _of_processor(fields, channels) if isinstance(fields, dict) and fields else None
    if found is None:
        return PixelRange(*(torch.tensor([value]) for value in USUAL_RANGE))
    return found


def draw_pixels(shape: Sequence[int], values: PixelRange, generator: torch.Generator) -> torch.Tensor:
    """Images (..., channels, height, width), uniform in the range, with some pixels beyond it."""
    low, high = (value[:, None, None] for value in values)
    middle, half = (low + high) / 2, (high - low) / 2
    offset = torch.rand(*shape, generator=generator) * 2 - 1
    is_beyond = torch.rand(*shape, generator=generator) < 1 / BEYOND_EVERY
    return middle + half * torch.where(is_beyond, BEYOND * offset, offset)


def _of_processor(fields: dict[str, Any], channels: int) -> PixelRange | None:
    """(0 ... 255) · factor, less the mean, divided by the standard deviation; None where a number is missing."""
    factor = fields.get("rescale_factor", 1 / 255) if fields.get("do_rescale", True) else 1.0
    normalises = fields.get("do_normalize", False)
    mean = _by_channel(fields.get("image_mean") if normalises else 0.0, channels)
    deviation = _by_channel(fields.get("image_std") if normalises else 1.0, channels)
    if mean is None or deviation is None or not _is_number(factor) or factor <= 0 or bool((deviation <= 0).any()):
        return None
    found = PixelRange((0 - mean) / deviation, (255 * factor - mean) / deviation)
    return found if max(float(value.abs().max()) for value in found) <= LARGEST_VALUE else None


def _by_channel(value: Any, channels: int) -> torch.Tensor | None:
    """(channels,) or (1,); None for anything but one number, or one for each channel."""
    numbers = value if isinstance(value, list) else [value]
    if len(numbers) not in (1, channels) or not all(map(_is_number, numbers)):
        return None
    return torch.tensor(numbers, dtype=torch.float32)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_VALUE
