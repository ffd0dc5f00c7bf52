"""Pixels have the range that the image processor of the folder gives, and go beyond it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_export.models.image_values import BEYOND, draw_pixels, pixel_range

MEAN, DEVIATION = [0.5, 0.4, 0.3], [0.5, 0.25, 0.2]


def processor(folder: Path, **fields: Any) -> Path:
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize(
    ("fields", "low", "high"),
    [
        ({"do_normalize": True, "image_mean": MEAN, "image_std": DEVIATION}, [-1, -1.6, -1.5], [1, 2.4, 3.5]),
        ({"do_normalize": True, "image_mean": 0.5, "image_std": 0.5}, [-1], [1]),
        ({"do_normalize": False, "image_mean": MEAN, "image_std": DEVIATION}, [0], [1]),
        ({"do_rescale": False}, [0], [255]),
        ({"rescale_factor": 1 / 127.5, "do_normalize": True, "image_mean": 1.0, "image_std": 1.0}, [-1], [1]),
    ],
)
def test_range_is_that_of_the_processor(fields: dict[str, Any], low: Any, high: Any, tmp_path: Path) -> None:
    found = pixel_range(processor(tmp_path, **fields), 3)
    assert found.low.tolist() == pytest.approx(low) and found.high.tolist() == pytest.approx(high)


@pytest.mark.parametrize(
    "fields",
    [
        {"do_normalize": True},
        {"do_normalize": True, "image_mean": [0.5, 0.5], "image_std": [1, 1]},
        {"do_normalize": True, "image_mean": 0.5, "image_std": 0},
        {"do_normalize": True, "image_mean": 0.5, "image_std": 1e-9},
        {"do_normalize": True, "image_mean": "0.5", "image_std": 1},
        {"rescale_factor": float("nan")},
        {"rescale_factor": True},
    ],
)
def test_unusable_numbers_are_replaced_by_the_usual_range(fields: dict[str, Any], tmp_path: Path) -> None:
    usual = pixel_range(tmp_path / "none", 3)
    assert usual.low.item() < -2.1 and usual.high.item() > 2.6
    assert pixel_range(processor(tmp_path, **fields), 3) == usual


def test_pixels_fill_the_range_of_each_channel_and_go_beyond(tmp_path: Path) -> None:
    values = pixel_range(processor(tmp_path, do_normalize=True, image_mean=MEAN, image_std=DEVIATION), 3)
    pixels = draw_pixels((4, 2, 3, 32, 32), values, torch.Generator().manual_seed(0))
    assert pixels.shape == (4, 2, 3, 32, 32)
    for channel, (low, high) in enumerate(zip(values.low.tolist(), values.high.tolist(), strict=True)):
        own = pixels[:, :, channel]
        middle, half = (low + high) / 2, (high - low) / 2
        assert own.min() < middle - 0.98 * BEYOND * half and own.max() > middle + 0.98 * BEYOND * half
        assert 0.03 < ((own < low) | (own > high)).float().mean() < 0.1
        assert ((own > low) & (own < low + half / 10)).any() and ((own < high) & (own > high - half / 10)).any()
