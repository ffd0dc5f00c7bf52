"""Points in images, which tell a model what to segment (SAM)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lora_export.models.image_shape import image_shape
from lora_export.models.model import ModelInputs, Sizes
from lora_export.models.text_inputs import Part

POINTS, POINT_LABELS = "input_points", "input_labels"
OBJECTS = "objects"  # symbol: objects to segment in an image, each by its own points
IN_OBJECT = "points"  # symbol: the points of one object


def image_prompts(module: Any, takes: list[str], folder: Path) -> Part | None:
    """Points (batch, objects, points, 2), as x and y in pixels, and their labels: 1 in the object, 0 in the background.

    A third label, -1, marks a place without a point.
    """
    if POINTS not in takes or POINT_LABELS not in takes or "pixel_values" not in takes:
        return None
    (_, height, width), _ = image_shape(module.config, folder)

    def make(sizes: Sizes, generator: torch.Generator) -> ModelInputs:
        shape = (sizes["batch"], sizes[OBJECTS], sizes[IN_OBJECT])
        points = torch.rand((*shape, 2), generator=generator) * torch.tensor([width, height])
        return {POINTS: points, POINT_LABELS: torch.randint(-1, 2, shape, generator=generator)}

    axes = {0: "batch", 1: OBJECTS, 2: IN_OBJECT}
    return Part({POINTS: axes, POINT_LABELS: dict(axes)}, make, {OBJECTS: 2, IN_OBJECT: 3})
