"""Sounds, as samples or spectrograms, and series of measurements, in the layout of the model's family."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lora_export.models.model import ModelInputs, Sizes
from lora_export.models.text_inputs import Part, placeholders

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
