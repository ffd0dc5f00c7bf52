"""Inputs of Hugging Face models, generated from what the config records: texts, pages, images and sounds.

The parameters of forward name what a model takes, and the config has the sizes and the valid values.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lora_export.errors import InputRefused
from lora_export.models.image_shape import image_shape
from lora_export.models.image_values import draw_pixels, pixel_range
from lora_export.models.model import TRACED_SIZES, Axes, Limits, MakeInputs, ModelInputs, Sizes
from lora_export.models.padding_mask import padding_mask
from lora_export.models.text_lengths import text_lengths
from lora_export.storage import json_files

Make = Callable[[Sizes, torch.Generator], ModelInputs]

# Fields of a config with the token that stands for an image, a video or a sound among the tokens of a text
PLACEHOLDERS = tuple(f"{kind}_token_{end}" for kind in ("image", "video", "audio") for end in ("id", "index"))
MEDIA = {"pixel_values", "input_features", "input_values"}
# Mean and standard deviation of CLAP's spectrograms, in decibels. Those of others are about 0 and 1: Whisper's values
# are from -1.5 to 2, and others are divided by their own standard deviation, as the samples of a sound are.
DECIBELS = (-35.0, 30.0)
TRACED_FRAMES = 9  # of a sound, after the convolutions that read it
SPECIAL_EVERY = 8  # places, of which one holds a special token
SAMPLES, FRAMES = "samples", "frames"  # symbols of a sound's length


@dataclass(frozen=True)
class Part:
    """Some of a model's inputs, which belong together."""

    axes: Axes
    make: Make
    sizes: Sizes = field(default_factory=dict)  # of symbols that TRACED_SIZES lacks
    steps: Sizes = field(default_factory=dict)  # by how much such a size has to change to make a difference
    note: str = ""
    not_judged: str = ""  # what these inputs leave out


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


def generated_inputs(module: Any, folder: Path) -> GeneratedInputs:
    """How to generate the inputs of a Hugging Face model. Runs nothing.

    Raises InputRefused where the config does not determine them.
    """
    takes = list(inspect.signature(module.forward).parameters)
    parts = [part for kind in INPUT_KINDS if (part := kind(module, takes, folder)) is not None]
    axes = {name: dict(part.axes[name]) for name in takes for part in parts if name in part.axes}
    if module.main_input_name not in axes:
        raise InputRefused(
            f"{type(module).__name__} takes {module.main_input_name}, and its config does not determine valid values. "
            f"Give them: --inputs FILE.npz, with an array for each input (of {', '.join(takes)})"
        )
    symbols = {symbol for names in axes.values() for symbol in names.values()}
    sizes = {symbol: size for part in parts for symbol, size in part.sizes.items()}
    lengths = text_lengths(module, symbols)
    return GeneratedInputs(
        axes,
        _made_by(parts, list(axes)),
        {symbol: min(sizes.get(symbol) or TRACED_SIZES[symbol], lengths.most(symbol)) for symbol in symbols},
        {symbol: step for part in parts for symbol, step in part.steps.items()},
        tuple(part.note for part in parts if part.note),
        tuple(text for text in (*(part.not_judged for part in parts), lengths.not_judged) if text),
        lengths.limits,
        lengths.long,
    )


def _made_by(parts: list[Part], names: list[str]) -> MakeInputs:
    def make(sizes: Sizes, generator: torch.Generator) -> ModelInputs:
        made: ModelInputs = {}
        for part in parts:
            made |= part.make(sizes, generator)
        return {name: made[name] for name in names}

    return make


# --- Texts ---


def _text(module: Any, takes: list[str], folder: Path) -> Part | None:
    """Token ids, a mask with padding, token types and, on a page, the boxes of the tokens."""
    text = module.config.get_text_config()
    if "input_ids" not in takes or not getattr(text, "vocab_size", None):
        return None
    token_types = getattr(text, "type_vocab_size", 0) or 0
    positions = getattr(text, "max_2d_position_embeddings", 0) or 0
    avoided = _placeholders(module.config)
    specials = [token for token in _special_tokens(text, folder) if token not in avoided]
    padding = _token(text, "pad_token_id")
    ends = _summary_token(module, text)

    def make(sizes: Sizes, generator: torch.Generator) -> ModelInputs:
        shape = (sizes["batch"], sizes["sequence"])
        ids = torch.randint(0, text.vocab_size, shape, generator=generator)
        mask = padding_mask(shape, generator)
        for token in avoided:
            ids = torch.where(ids == token, (token + 1) % text.vocab_size, ids)
        ids = _with_special_tokens(ids, specials, generator)
        if padding is not None:
            ids = torch.where(mask == 0, padding, ids)
        if ends is not None:
            ids = _with_end(ids, mask, ends)
        made = {"input_ids": ids, "attention_mask": mask}
        if token_types > 1:
            made["token_type_ids"] = torch.randint(0, token_types, shape, generator=generator)
        if positions:
            made["bbox"] = _boxes(shape, positions, generator)
        return made

    names = ["input_ids", "attention_mask"]
    names += (["token_type_ids"] if token_types > 1 else []) + (["bbox"] if positions else [])
    media = (
        "images, videos and sounds among its tokens. They are no part of the generated inputs: give them by --inputs"
    )
    return Part(
        {name: {0: "batch", 1: "sequence"} for name in names if name in takes},
        make,
        not_judged=f"{type(module).__name__} with {media}" if avoided and not MEDIA.isdisjoint(takes) else "",
    )


def _token(text: Any, name: str) -> int | None:
    token = getattr(text, name, None)
    return token if isinstance(token, int) and 0 <= token < text.vocab_size else None


def _special_tokens(text: Any, folder: Path) -> list[int]:
    """The ids of the tokens that a tokenizer adds: those in the config, and those of a tokenizer.json in the folder."""
    known = {_token(text, f"{name}_token_id") for name in ("bos", "eos", "pad", "cls", "sep", "mask", "unk")}
    if (path := folder / "tokenizer.json").is_file():
        added = json_files.read_json(path).get("added_tokens")
        tokens = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
        ids = [token.get("id") for token in tokens if token.get("special") is True]
        known |= {number for number in ids if isinstance(number, int) and 0 <= number < text.vocab_size}
    return sorted(token for token in known if token is not None)


def _with_special_tokens(ids: torch.Tensor, specials: list[int], generator: torch.Generator) -> torch.Tensor:
    """The ids with a special token in about every eighth place. At random, one of 50,000 would hardly be drawn.

    A fault in the row of such a token, or in its adapter, could not show without it.
    """
    if not specials:
        return ids
    chosen = torch.tensor(specials)[torch.randint(0, len(specials), ids.shape, generator=generator)]
    return torch.where(torch.rand(ids.shape, generator=generator) < 1 / SPECIAL_EVERY, chosen, ids)


def _placeholders(config: Any) -> list[int]:
    found = [getattr(config, name, None) for name in PLACEHOLDERS]
    return [token for token in found if isinstance(token, int)]


def _summary_token(module: Any, text: Any) -> int | None:
    """The end token, where a model reads its summary of a text at it: CLIP's family, and classifiers such as BART's."""
    end = getattr(text, "eos_token_id", None)
    of_clip = "clip" in str(getattr(text, "model_type", "")) and hasattr(text, "projection_dim")
    return end if (of_clip or _classifies_both(module)) and isinstance(end, int) and 0 < end < text.vocab_size else None


def _classifies_both(module: Any) -> bool:
    """Whether an encoder-decoder classifies a text, which is the input of both."""
    is_classifier = type(module).__name__.endswith("ForSequenceClassification")
    return is_classifier and bool(getattr(module.config, "is_encoder_decoder", False))


def _with_end(ids: torch.Tensor, mask: torch.Tensor, end: int) -> torch.Tensor:
    """The ids with the end token at the last token of each row, and nowhere else."""
    last = (mask * torch.arange(mask.shape[1])).argmax(1)
    ids = torch.where(ids == end, end - 1, ids)
    return ids.scatter(1, last[:, None], end)


def _boxes(shape: tuple[int, int], positions: int, generator: torch.Generator) -> torch.Tensor:
    """Boxes (left, top, right, bottom) on a page, (batch, sequence, 4)."""
    corners = torch.randint(0, positions, (2, *shape, 2), generator=generator)
    return torch.cat([corners.amin(0), corners.amax(0)], dim=-1)


def _decoder(module: Any, takes: list[str], _: Path) -> Part | None:
    """Token ids of the decoder of an encoder-decoder."""
    text = module.config.get_text_config(decoder=True)
    if "decoder_input_ids" not in takes or not getattr(text, "vocab_size", None) or _classifies_both(module):
        return None

    def make(sizes: Sizes, generator: torch.Generator) -> ModelInputs:
        shape = (sizes["batch"], sizes["target"])
        return {"decoder_input_ids": torch.randint(0, text.vocab_size, shape, generator=generator)}

    return Part({"decoder_input_ids": {0: "batch", 1: "target"}}, make)


# --- Images ---


def _image(module: Any, takes: list[str], folder: Path) -> Part | None:
    """Images or videos of the model's size, with the values that its image processor gives, and some beyond."""
    if "pixel_values" not in takes or _placeholders(module.config):
        return None
    shape, note = image_shape(module.config, folder)
    frames = getattr(module.config, "num_frames", None)
    shape_of_one = (frames, *shape) if isinstance(frames, int) and frames else shape
    values = pixel_range(folder, shape[0])

    def make(sizes: Sizes, generator: torch.Generator) -> ModelInputs:
        return {"pixel_values": draw_pixels((sizes["batch"], *shape_of_one), values, generator)}

    return Part({"pixel_values": {0: "batch"}}, make, note=note)


# --- Sounds ---


def _waveform(module: Any, takes: list[str], _: Path) -> Part | None:
    """A sound as samples (batch, samples) of any length, or a spectrogram of the model's size (batch, time, bins)."""
    config = module.config
    if "input_values" not in takes or _placeholders(config):
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
    if "input_features" not in takes or _placeholders(module.config):
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


INPUT_KINDS = (_text, _decoder, _image, _waveform, _spectrogram)
