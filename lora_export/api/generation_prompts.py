"""Prompts of every kind, as the graphs of a model take them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_export.api.generation_settings import GenerationSettings
from lora_export.api.image_prompts import ImageSize, ImageWriter, next_of, refuse_other_shape, rule_of
from lora_export.errors import InputRefused, WrongUsage
from lora_export.graph.cache_names import IDS, MASK
from lora_export.models.processors import (
    PIXELS,
    features_of,
    open_extractor,
    pixels_of,
    read_sound,
    refuse_longer,
    render_chat,
    tokenised,
)
from lora_export.options.export import Prompt, Starts
from lora_export.runtime.generation.decoder import EncoderDecoder
from lora_export.runtime.runner import Arrays

# A text, token ids, the path of a sound or an image, or an array: samples (samples,), features (features, frames) or
# pixels (channels, height, width)
SOUNDS = ("input_features", "input_values")  # what the encoder of a speech model reads


def token_ids(
    prompt: Prompt,
    tokenizer: Any,
    settings: GenerationSettings,
    *,
    chat: bool,
    special: bool = True,
    of_encoder: bool = False,
) -> list[int]:
    """A text or token ids as token ids. With `special`, the tokenizer adds its tokens around a text.

    `of_encoder` are those that an encoder reads, which may have a vocabulary of its own. Raises InputRefused for an
    empty prompt, for ids that the model does not have, and for a sound or an image.
    """
    if isinstance(prompt, Path | np.ndarray):
        raise InputRefused(
            "the model reads texts alone, no sounds and no images: a prompt is a text, or a list of token ids"
        )
    if isinstance(prompt, str):
        if chat:
            messages = [{"role": "user", "content": prompt}]
            ids = render_chat(tokenizer, messages, add_generation_prompt=True, return_dict=False)
        else:
            ids = tokenised(tokenizer, prompt, **({} if special else {"add_special_tokens": False}))["input_ids"]
    else:
        ids = [int(token) for token in prompt]
    if not ids:
        raise InputRefused("a prompt has no token: there is nothing to go on from")
    size = settings.encoder_vocabulary if of_encoder else settings.vocabulary
    unknown = [] if size is None else [token for token in ids if token not in range(size)]
    if size is not None and unknown:
        raise InputRefused(f"a prompt has the token {unknown[0]}; the model has rows for 0 to {size - 1}")
    return list(ids)


def tokens_with_images(
    prompts: Sequence[Prompt],
    images: Sequence[ImageSize],
    image: int,
    tokenizer: Any,
    settings: GenerationSettings,
    *,
    chat: bool,
) -> list[list[int]]:
    """The tokens of each text; the token `image` is in it as often for each of `images` as it has tokens.

    What else a model's processor writes for an image is in texts, and not in prompts of token ids. In a chat template,
    a text without the marker of images has all of them before it. Raises InputRefused where the texts have the marker
    more or less often than there are images, or other tokens of images, and as `token_ids`.
    """
    writer = ImageWriter(rule_of(settings), tokenizer, image)
    left = list(images)
    found, read = [], 0
    for prompt in prompts:
        if isinstance(prompt, str):
            text = _chat(prompt, writer.marker, len(images), tokenizer) if chat else writer.framed(prompt)
            read += text.count(writer.marker)
            before = len(left)
            text = writer.write(text, left)
            special = not chat and writer.rule.frame is None
            found.append(token_ids(text, tokenizer, settings, chat=False, special=special))
            written = sum(size.tokens for size in images[len(images) - before : len(images) - len(left)])
            if (own := found[-1].count(image)) != written:
                raise InputRefused(
                    f"the prompt {prompt!r:.80} has the token {image} of images {own} times, where its images have "
                    f"{written}: write {writer.marker} once where each image is read, and no other token of images"
                )
            continue
        ids = token_ids(prompt, tokenizer, settings, chat=chat)
        read += ids.count(image)
        found.append([token for each in ids for token in ([image] * next_of(left).tokens if each == image else [each])])
    if read != len(images):
        name = writer.marker if tokenizer is not None else f"the token {image}"
        raise InputRefused(f"{len(images)} images: the texts need {name} as often, once where each image is read")
    return found


def _chat(text: str, marker: str, images: int, tokenizer: Any) -> str:
    """A user's message in the tokenizer's template."""
    found = render_chat(tokenizer, _messages(text, marker, images), add_generation_prompt=True, tokenize=False)
    return str(found)


def _messages(text: str, image: str, images: int) -> list[dict[str, Any]]:
    """A user's message with images where their marker is in the text, or else all of them before it."""
    parts = text.split(image) if image in text else [*[""] * images, text]
    content = [
        part
        for number, words in enumerate(parts)
        for part in ([{"type": "image"}] if number else []) + ([{"type": "text", "text": words}] if words else [])
    ]
    return [{"role": "user", "content": content}]


def first_tokens(starts: Starts, count: int, tokenizer: Any, settings: GenerationSettings) -> list[list[int]]:
    """The tokens with which each of `count` texts starts, as transformers begins with its `decoder_input_ids`.

    Raises WrongUsage for another number of starts than 1 or `count`, and InputRefused as `token_ids` does.
    """
    given = [starts] if isinstance(starts, str) else list(starts)
    if len(given) not in (1, count):
        raise WrongUsage(f"there are {len(given)} prompts for {count} images: give one for all, or one for each")
    found = [settings.first_tokens(token_ids(start, tokenizer, settings, chat=False, special=False)) for start in given]
    return found * (count // len(found))


def encoder_inputs(
    prompts: Sequence[Prompt], model: EncoderDecoder, settings: GenerationSettings, tokenizer: Any, *, chat: bool
) -> Arrays:
    """The inputs of an encoder, one row for each prompt. Raises InputRefused for prompts of another kind."""
    if IDS in model.takes:
        rows = [token_ids(prompt, tokenizer, settings, chat=chat, of_encoder=True) for prompt in prompts]
        longest = max(map(len, rows))
        ids = np.array([[*row, *[settings.padding] * (longest - len(row))] for row in rows], np.int64)
        mask = np.array([[1] * len(row) + [0] * (longest - len(row)) for row in rows], np.int64)
        return {IDS: ids, MASK: mask} if model.takes_mask else {IDS: ids}
    refuse_other_kinds(prompts, model)
    ((name, sizes),) = model.takes.items()
    arrays = [prompt for prompt in prompts if isinstance(prompt, np.ndarray) and prompt.ndim > 1]
    if not arrays and name in SOUNDS:
        extractor = open_extractor(settings.folder)
        rate = extractor.sampling_rate
        sounds = [
            read_sound(each, rate) if isinstance(each, Path) else np.asarray(each, np.float32) for each in prompts
        ]
        for each, sound in zip(prompts, sounds, strict=True):
            refuse_longer(len(sound) / rate, extractor, str(each) if isinstance(each, Path) else "a sound")
        made = features_of(sounds, extractor)
        return {key: value for key, value in made.items() if key in (*model.takes, MASK)}
    if not arrays and name == PIXELS:
        paths = [prompt for prompt in prompts if isinstance(prompt, Path)]
        arrays = list(pixels_of(paths, settings.folder)) if len(paths) == len(prompts) else []
    shapes = {array.shape for array in arrays}
    if len(arrays) < len(prompts) or len(shapes) > 1:
        files = "images" if name == PIXELS else "sounds"
        raise InputRefused(f"the prompts of one batch have to be arrays of one shape, or {files} all of them")
    refuse_other_shape(shapes.pop(), sizes[1:], name)
    return {name: np.stack(arrays).astype(np.float32)}


def refuse_other_kinds(prompts: Sequence[Prompt], model: EncoderDecoder) -> None:
    """Raise InputRefused where a model that reads sounds or images is given anything else."""
    if IDS in model.takes:
        return
    what = "sounds: a prompt is the path of a sound, or an array"
    if model.takes.keys().isdisjoint(SOUNDS):
        what = "images: a prompt is the path of an image, or an array"
    if not all(isinstance(prompt, np.ndarray | Path) for prompt in prompts):
        raise InputRefused(f"the model reads {what}")
