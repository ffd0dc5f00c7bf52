"""Inputs of Hugging Face models, generated from what the config records: texts, pages, images, sounds, series.

The parameters of forward name what a model takes, and the config has the sizes and the valid values.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lora_export.errors import InputRefused, RuntimeRefused
from lora_export.models.failures import named_failures
from lora_export.models.image_forms import IMAGES
from lora_export.models.images import draw_pixels, image_shape, pixel_range, refuse_huge
from lora_export.models.images_in_text import LEAST_TEXT, PROBED, ImagesInText, images_in_text
from lora_export.models.model import (
    CHECKED_SIZES,
    TRACED_SIZES,
    Axes,
    Limits,
    MakeInputs,
    ModelInputs,
    Sizes,
    in_dtype_of,
)
from lora_export.models.signals import spectrogram, time_series, waveform
from lora_export.models.text_inputs import Part, decoder_part, placeholders, text_part
from lora_export.models.text_lengths import text_lengths
from lora_export.options.spelling import named

FRAME_COUNTS = ("num_frames", "frames_per_clip")  # fields of a config with the images of a video
POINTS, POINT_LABELS = "input_points", "input_labels"
OBJECTS = "objects"  # symbol: objects to segment in an image, each by its own points
IN_OBJECT = "points"  # symbol: the points of one object


@dataclass(frozen=True)
class GeneratedInputs:
    """All inputs of a model, in the order of forward's parameters."""

    axes: Axes
    make: MakeInputs
    sizes: Sizes
    steps: Sizes
    notes: tuple[str, ...]
    not_judged: tuple[str, ...] = ()
    limits: Limits = field(default_factory=dict)
    long: Sizes = field(default_factory=dict)  # of one long text
    images: ImagesInText | None = None


def generated_inputs(module: Any, folder: Path, *, with_images: bool = True) -> GeneratedInputs:
    """How to generate the inputs of a Hugging Face model.

    Texts contain images where the model takes them, unless `with_images` is false or it fails on them. It runs once on
    a short text to find that out. No other model is run.
    Raises InputRefused where the config does not determine the inputs.
    """
    takes = list(inspect.signature(module.forward).parameters)
    images, why = images_in_text(module, takes, folder) if with_images else (None, "")
    if images is not None:
        found = _inputs_with(module, takes, folder, images, "")
        why = _failure_on_images(module, found)
        if not why:
            return found
    return _inputs_with(module, takes, folder, None, why)


def _failure_on_images(module: Any, inputs: GeneratedInputs) -> str:
    """Why the model takes no texts with images; empty where it does."""
    assert inputs.images is not None
    smallest = inputs.images.derived({**inputs.sizes, "batch": 1, IMAGES: PROBED, "sequence": LEAST_TEXT})
    longest = inputs.limits.get("sequence", (0, None))[1]
    needed = max(inputs.images.derived(dict(sizes))["sequence"] for sizes in CHECKED_SIZES)
    if longest is not None and longest < needed:
        return f"a text with its images takes {needed} tokens, and the model has positions for {longest}"
    made = in_dtype_of(module, inputs.make(smallest, torch.Generator().manual_seed(0)))
    try:
        with named_failures(module, made), torch.no_grad():
            module(**made)
    except RuntimeRefused as error:
        return str(error)
    return ""


def _inputs_with(module: Any, takes: list[str], folder: Path, images: ImagesInText | None, why: str) -> GeneratedInputs:
    """The inputs with images in their texts, or with none; `why` is the reason for the latter."""
    parts = [part for kind in OTHER_KINDS if (part := kind(module, takes, folder)) is not None]
    if text := text_part(module, takes, folder, images, why):
        parts.insert(0, text)
    axes = {name: dict(part.axes[name]) for name in takes for part in parts if name in part.axes}
    main = module.main_input_name  # OneFormer has several
    if missing := [name for name in ([main] if isinstance(main, str) else main) if name not in axes]:
        raise InputRefused(
            f"{type(module).__name__} takes {' and '.join(missing)}, and its config does not determine valid values. "
            f"Give them: {named('inputs', 'FILE.npz')}, with an array for each input (of {', '.join(takes)})"
        )
    symbols = {symbol for names in axes.values() for symbol in names.values()}
    sizes = {symbol: size for part in parts for symbol, size in part.sizes.items()}
    lengths = text_lengths(module, symbols)
    traced = {symbol: min(sizes.get(symbol) or TRACED_SIZES[symbol], lengths.most(symbol)) for symbol in symbols}
    return GeneratedInputs(
        axes,
        _made_by(parts, list(axes)),
        images.derived(traced) if images else traced,
        {symbol: step for part in parts for symbol, step in part.steps.items()},
        tuple(part.note for part in parts if part.note),
        tuple(text for text in (*(part.not_judged for part in parts), lengths.not_judged) if text),
        lengths.limits,
        lengths.long,
        images,
    )


def _made_by(parts: list[Part], names: list[str]) -> MakeInputs:
    def make(sizes: Sizes, generator: torch.Generator) -> ModelInputs:
        made: ModelInputs = {}
        for part in parts:
            made |= part.make(sizes, generator)
        return {name: made[name] for name in names}

    return make


# --- Images ---


def _image(module: Any, takes: list[str], folder: Path) -> Part | None:
    """Images or videos of the model's size, with the values that its image processor gives, and some beyond."""
    name = next((name for name in ("pixel_values", "pixel_values_videos") if name in takes), None)
    if name is None or placeholders(module.config):
        return None
    shape, note = image_shape(module.config, folder)
    frames = next(filter(None, (getattr(module.config, field, None) for field in FRAME_COUNTS)), None)
    shape_of_one = (frames, *shape) if isinstance(frames, int) and frames else shape
    refuse_huge(folder, "a video", shape_of_one)
    values = pixel_range(folder, shape[0])

    def make(sizes: Sizes, generator: torch.Generator) -> ModelInputs:
        return {name: draw_pixels((sizes["batch"], *shape_of_one), values, generator)}

    return Part({name: {0: "batch"}}, make, note=note)


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


OTHER_KINDS = (decoder_part, _image, image_prompts, waveform, spectrogram, time_series)
