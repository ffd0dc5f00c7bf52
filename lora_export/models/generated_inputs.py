"""Inputs of Hugging Face models, generated from what the config records: texts, pages, images, sounds, series.

The parameters of forward name what a model takes, and the config has the sizes and the valid values.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lora_export.errors import InputRefused
from lora_export.models.images import (
    IMAGES,
    LEAST_TEXT,
    PROBED,
    ImagesInText,
    draw_pixels,
    image_shape,
    images_in_text,
    pixel_range,
    refuse_huge,
)
from lora_export.models.model import CHECKED_SIZES, TRACED_SIZES, Model, ModelInputs, Sizes, in_dtype_of
from lora_export.models.refusals import failure_on
from lora_export.models.text_inputs import ONE_TOKEN, Part, decoder_part, placeholders, text_lengths, text_part
from lora_export.options.spelling import named

# Mean and standard deviation of CLAP's spectrograms, in decibels. Those of others are about 0 and 1: Whisper's values
# are from -1.5 to 2, and others are divided by their own standard deviation, as the samples of a sound are.
DECIBELS = (-35.0, 30.0)
TRACED_FRAMES = 9  # of a sound, after the convolutions that read it
SAMPLES, FRAMES = "samples", "frames"  # symbols of a sound's length
# Moonshine's convolutions (modeling_moonshine.py): its config does not name them.
KERNELS_OF = {"moonshine": ((127, 7, 3), (64, 3, 2))}


def waveform(module: Any, takes: list[str], _: Path) -> Part | None:
    """A sound as samples (batch, samples) of any length, (batch, channels, samples) for a codec, or a spectrogram of
    the model's size (batch, time, bins).
    """
    config = module.config
    if "input_values" not in takes or placeholders(config):
        return None
    if isinstance(getattr(config, "num_mel_bins", None), int) and isinstance(getattr(config, "max_length", None), int):
        return _normal("input_values", (config.max_length, config.num_mel_bins))
    if channels := getattr(config, "audio_channels", None):  # codecs: each ratio is a stride
        step = math.prod(getattr(config, "upsampling_ratios", None) or [1])
        return _normal("input_values", (channels, SAMPLES), {SAMPLES: step * TRACED_FRAMES}, {SAMPLES: step})
    own = KERNELS_OF.get(str(getattr(config, "model_type", "")), (None, None))
    kernels, strides = getattr(config, "conv_kernel", own[0]), getattr(config, "conv_stride", own[1])
    if not kernels or not strides:
        return None
    step = math.prod(strides)
    needed = 1
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        needed = (needed - 1) * stride + kernel  # samples for one frame
    traced = needed + step * (TRACED_FRAMES - 1)
    return _normal("input_values", (SAMPLES,), {SAMPLES: traced}, {SAMPLES: step})


def spectrogram(module: Any, takes: list[str], _: Path) -> Part | None:
    """A spectrogram in the layout of the model's family."""
    config = module.config
    if "input_features" not in takes or placeholders(config):
        return None
    audio = next(filter(None, (getattr(config, name, None) for name in ("audio_config", "encoder_config"))), config)
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
    if bins and (step := getattr(audio, "subsampling_factor", None)):  # Parakeet, Canary
        return _normal("input_features", (FRAMES, bins), {FRAMES: step * TRACED_FRAMES}, {FRAMES: step})
    return None


def time_series(module: Any, takes: list[str], _: Path) -> Part | None:
    """The past of a series (batch, length, channels), of the config's length (PatchTST, PatchTSMixer)."""
    length, channels = (getattr(module.config, name, None) for name in ("context_length", "num_input_channels"))
    if "past_values" not in takes or type(length) is not int or type(channels) is not int:
        return None
    return _normal("past_values", (length, channels))


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


# --- All inputs ---

FRAME_COUNTS = ("num_frames", "frames_per_clip")  # fields of a config with the images of a video
POINTS, POINT_LABELS = "input_points", "input_labels"
OBJECTS = "objects"  # symbol: objects to segment in an image, each by its own points
IN_OBJECT = "points"  # symbol: the points of one object


def generated_inputs(module: Any, folder: Path, *, with_images: bool = True) -> Model:
    """A Hugging Face model, with how to generate all its inputs, in the order of forward's parameters.

    Texts contain images where the model takes them, unless `with_images` is false or it fails on them. It runs once on
    a short text to find that out. No other model is run.
    Raises InputRefused where the config does not determine the inputs.
    """
    takes = list(inspect.signature(module.forward).parameters)
    images, why = images_in_text(module, takes, folder) if with_images else (None, "")
    if images is not None:
        found = _inputs_with(module, takes, folder, images, "")
        why = _failure_on_images(found, images)
        if not why:
            return found
    return _inputs_with(module, takes, folder, None, why)


def _failure_on_images(model: Model, images: ImagesInText) -> str:
    """Why the model takes no texts with images; empty where it does."""
    smallest = images.derived({**model.traced_sizes, "batch": 1, IMAGES: PROBED, "sequence": LEAST_TEXT})
    longest = model.limits.get("sequence", (0, None))[1]
    needed = max(images.derived(dict(sizes))["sequence"] for sizes in CHECKED_SIZES)
    if longest is not None and longest < needed:
        return f"a text with its images takes {needed} tokens, and the model has positions for {longest}"
    return failure_on(model.module, in_dtype_of(model.module, model.inputs(smallest, seed=0)))


def _inputs_with(module: Any, takes: list[str], folder: Path, images: ImagesInText | None, why: str) -> Model:
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

    def make(wanted: Sizes, generator: torch.Generator) -> ModelInputs:
        made: ModelInputs = {}
        for part in parts:
            made |= part.make(wanted, generator)
        return {name: made[name] for name in axes}

    return Model(
        str(folder), module, axes, make, images.derived(traced) if images else traced, is_huggingface=True,
        limits=lengths.limits,
        further=(*([ONE_TOKEN] if "sequence" in symbols and not images else []), *filter(None, [lengths.long])),
        steps={symbol: step for part in parts for symbol, step in part.steps.items()},
        notes=tuple(part.note for part in parts if part.note),
        not_judged=tuple(text for text in (*(part.not_judged for part in parts), lengths.not_judged) if text),
        derive=images.derived if images else None, placeholders=(images.placeholder,) if images else (),
    )  # fmt: skip


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
