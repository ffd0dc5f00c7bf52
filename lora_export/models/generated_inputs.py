"""Inputs of Hugging Face models, generated from what the config records: texts, pages, images and sounds.

The parameters of forward name what a model takes, and the config has the sizes and the valid values.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lora_export.errors import InputRefused, RuntimeRefused
from lora_export.models.failures import named_failures
from lora_export.models.image_forms import IMAGES
from lora_export.models.image_shape import image_shape, refuse_huge
from lora_export.models.image_values import draw_pixels, pixel_range
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
from lora_export.models.text_inputs import Part, decoder_part, placeholders, text_part
from lora_export.models.text_lengths import text_lengths

# Mean and standard deviation of CLAP's spectrograms, in decibels. Those of others are about 0 and 1: Whisper's values
# are from -1.5 to 2, and others are divided by their own standard deviation, as the samples of a sound are.
DECIBELS = (-35.0, 30.0)
TRACED_FRAMES = 9  # of a sound, after the convolutions that read it
SAMPLES, FRAMES = "samples", "frames"  # symbols of a sound's length


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
    if module.main_input_name not in axes:
        raise InputRefused(
            f"{type(module).__name__} takes {module.main_input_name}, and its config does not determine valid values. "
            f"Give them: --inputs FILE.npz, with an array for each input (of {', '.join(takes)})"
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
    if "pixel_values" not in takes or placeholders(module.config):
        return None
    shape, note = image_shape(module.config, folder)
    frames = getattr(module.config, "num_frames", None)
    shape_of_one = (frames, *shape) if isinstance(frames, int) and frames else shape
    refuse_huge(folder, "a video", shape_of_one)
    values = pixel_range(folder, shape[0])

    def make(sizes: Sizes, generator: torch.Generator) -> ModelInputs:
        return {"pixel_values": draw_pixels((sizes["batch"], *shape_of_one), values, generator)}

    return Part({"pixel_values": {0: "batch"}}, make, note=note)


# --- Sounds ---


def _waveform(module: Any, takes: list[str], _: Path) -> Part | None:
    """A sound as samples (batch, samples) of any length, or a spectrogram of the model's size (batch, time, bins)."""
    config = module.config
    if "input_values" not in takes or placeholders(config):
        return None
    if isinstance(getattr(config, "num_mel_bins", None), int) and isinstance(getattr(config, "max_length", None), int):
        return _normal("input_values", (config.max_length, config.num_mel_bins))
    kernels, strides = getattr(config, "conv_kernel", None), getattr(config, "conv_stride", None)
    if not kernels or not strides:
        return None
    step = math.prod(strides)
    needed = 1
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        needed = (needed - 1) * stride + kernel  # samples for one frame
    traced = needed + step * (TRACED_FRAMES - 1)
    return _normal("input_values", (SAMPLES,), {SAMPLES: traced}, {SAMPLES: step})


def _spectrogram(module: Any, takes: list[str], _: Path) -> Part | None:
    """A spectrogram in the layout of the model's family."""
    audio = getattr(module.config, "audio_config", module.config)
    if "input_features" not in takes or placeholders(module.config):
        return None
    bins = getattr(audio, "num_mel_bins", None)
    if getattr(audio, "spec_size", None) and bins:  # CLAP: as wide as its image is high and wide
        fused = getattr(audio, "enable_fusion", False)
        shape = (1, audio.spec_size * (audio.spec_size // bins), bins)
        return None if fused else _normal("input_features", shape, values=DECIBELS)
    if width := getattr(audio, "feature_projection_input_dim", None):  # Wav2Vec2-BERT
        return _normal("input_features", (FRAMES, width), {FRAMES: 24})
    if width := getattr(audio, "input_feat_per_channel", None):  # Speech2Text
        return _normal("input_features", (FRAMES, width * getattr(audio, "input_channels", 1)), {FRAMES: 24})
    if bins and getattr(audio, "max_source_positions", None):  # Whisper: its convolutions halve the time
        return _normal("input_features", (bins, 2 * audio.max_source_positions))
    return None


def _normal(
    name: str,
    shape: tuple[int | str, ...],
    sizes: Mapping[str, int] | None = None,
    steps: Mapping[str, int] | None = None,
    values: tuple[float, float] = (0.0, 1.0),
) -> Part:
    """Normally distributed values of this mean and standard deviation; a string in the shape is an axis that varies."""
    axes = {0: "batch"} | {axis: size for axis, size in enumerate(shape, 1) if isinstance(size, str)}

    def make(wanted: Sizes, generator: torch.Generator) -> ModelInputs:
        sized = [wanted[size] if isinstance(size, str) else size for size in shape]
        mean, deviation = values
        return {name: mean + deviation * torch.randn((wanted["batch"], *sized), generator=generator)}

    return Part({name: axes}, make, dict(sizes or {}), dict(steps or {}))


OTHER_KINDS = (decoder_part, _image, _waveform, _spectrogram)
