"""Images among the tokens of a text, for language models with an image tower (LLaVA, PaliGemma, Qwen2-VL).

Such a model replaces the embeddings of placeholder tokens by what its tower computes. Its processor writes as many
placeholders as that is. The number comes from the model's own tower, which runs once when the model is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from lora_export.errors import InputRefused
from lora_export.models.images import IMAGES, PATCHES, ImageForm, image_forms
from lora_export.models.model import Axes, ModelInputs, Sizes, in_dtype_of
from lora_export.models.tracing import first_line
from lora_export.options.spelling import named

PLACEHOLDER_NAMES = ("image_token_id", "image_token_index")  # fields of a config
MOST_TOKENS = 1 << 31  # of any vocabulary
LEAST_TEXT = 4  # tokens of a row beside its images
PROBED = 2  # images: form and token counts of the others are those of the first and the second in turn
OF_IMAGE, OF_PADDING = -1, -2  # in place of a token's number in its text


@dataclass(frozen=True)
class ImagesInText:
    """The images of a model's texts: one or more in each row, or none where there are fewer images than rows."""

    placeholder: int
    form: ImageForm
    tokens: tuple[int, ...]  # of the first image and the second; the others take turns
    token_types: str = ""  # the input that marks tokens by kind; empty where there is none
    marks_suffix: bool = False  # it marks the answer after a prompt in place of the images

    @property
    def axes(self) -> Axes:
        """The axes that vary, of the inputs that a text alone does not have."""
        types: Axes = {self.token_types: {0: "batch", 1: "sequence"}} if self.token_types else {}
        return {**self.form.axes, **types}

    def derived(self, sizes: Sizes) -> Sizes:
        """The sizes of all inputs, from those with the length of the text alone as `sequence`."""
        patches = {PATCHES: sum(map(self.form.patches, range(sizes[IMAGES])))} if PATCHES in sizes else {}
        return {**sizes, "sequence": sizes["sequence"] + self._longest(sizes), **patches}

    def text_length(self, sizes: Sizes) -> int:
        """The tokens of a row beside its images. Raises InputRefused where too few are left."""
        left = sizes["sequence"] - self._longest(sizes)
        if left < LEAST_TEXT:
            raise InputRefused(
                f"the images of one text take {self._longest(sizes)} tokens, and the text with them may have "
                f"{sizes['sequence']}. Give other inputs: {named('inputs', 'FILE.npz')}"
            )
        return left

    def put_into(self, text: ModelInputs, sizes: Sizes, padding: int, generator: torch.Generator) -> ModelInputs:
        """The inputs of a text (batch, length) with images among its tokens, and the images themselves.

        Where they are depends on the sizes alone: each input can be drawn again by itself. A row with fewer images has
        more padding.
        """
        rows = self._tokens_by_row(sizes)
        layouts = torch.tensor([_layout(row, own, self._longest(sizes), self.text_length(sizes)) for row, own in rows])
        fillers = {"input_ids": (self.placeholder, padding), "attention_mask": (1, 0)}
        mixed = {}
        for name, value in text.items():
            token, pad = fillers.get(name, (0, 0))
            own = value.gather(1, layouts.clamp(min=0))
            mixed[name] = torch.where(layouts == OF_IMAGE, token, torch.where(layouts == OF_PADDING, pad, own))
        if self.token_types:
            is_image = layouts == OF_IMAGE
            mixed[self.token_types] = _suffix(is_image, generator) if self.marks_suffix else is_image.long()
        return mixed | self.form.draw(sizes[IMAGES], generator)

    def _tokens_by_row(self, sizes: Sizes) -> list[tuple[int, list[int]]]:
        """For each row its number and the tokens of each of its images. The first rows have one image more."""
        images, batch = sizes[IMAGES], sizes["batch"]
        counts = [images // batch + (row < images % batch) for row in range(batch)]
        begins = [sum(counts[:row]) for row in range(batch)]
        return [
            (row, [self.tokens[image % PROBED] for image in range(begin, begin + count)])
            for row, (begin, count) in enumerate(zip(begins, counts, strict=True))
        ]

    def _longest(self, sizes: Sizes) -> int:
        return max(sum(own) for _, own in self._tokens_by_row(sizes))


def images_in_text(module: Any, takes: Sequence[str], folder: Path) -> tuple[ImagesInText | None, str]:
    """The images that a model takes among its tokens; None, and why, where it takes none or no form of them is known.

    Runs the model's image tower on two images.
    """
    token = next(filter(is_token, (getattr(module.config, name, None) for name in PLACEHOLDER_NAMES)), None)
    if token is None or "pixel_values" not in takes:
        return None, ""
    features = getattr(module, "get_image_features", None)
    if features is None:
        return None, "it has no get_image_features"
    why = "no form of its images is known"
    try:
        for form in image_forms(module.config, takes, folder):
            try:
                tokens = _tokens_of_images(module, features, form)
            except Exception as error:  # noqa: BLE001  a form that the model does not take raises any type
                why = first_line(error)
                continue
            types = next((name for name in ("mm_token_type_ids", "token_type_ids") if name in takes), "")
            marks_suffix = types == "token_type_ids" and "paligemma" in str(module.config.model_type)
            return ImagesInText(token, form, tokens, types, marks_suffix), ""
    except InputRefused as error:  # a size of images that is too large
        why = str(error)
    return None, why


def is_token(value: Any) -> TypeGuard[int]:
    """Whether a value of a config can be a token's id: a larger one is damage, and no integer of PyTorch's."""
    return type(value) is int and 0 <= value < MOST_TOKENS


def _tokens_of_images(module: Any, features: Any, form: ImageForm) -> tuple[int, ...]:
    """How many tokens the first image takes, and the second: as many as their features."""
    images = in_dtype_of(module, form.draw(PROBED, torch.Generator().manual_seed(0)))
    with torch.no_grad():
        found = features(**images)
    found = getattr(found, "pooler_output", found)
    counts = tuple(_counts(found, [form.patches(image) for image in range(PROBED)]))
    if len(counts) != PROBED or not all(counts):
        raise InputRefused(f"{PROBED} images have the features of {len(counts)}")
    return counts


def _counts(found: Any, patches: Sequence[int]) -> Iterator[int]:
    """The number of features of each image, from their list, (images, tokens, width), or (all tokens, width)."""
    if isinstance(found, Tensor) and found.ndim == 2:
        parts = patches if all(patches) else [1] * PROBED
        yield from (len(found) * part // sum(parts) for part in parts)
    else:
        yield from (math.prod(each.shape[:-1]) for each in found)


def _layout(row: int, images: Sequence[int], longest: int, length: int) -> list[int]:
    """What is at each place of a row: the number of a token of its text, OF_IMAGE or OF_PADDING.

    There is a token before each image and after the last, where the text is long enough. Padding is where
    `padding_mask` has it: at the beginning of the third row, the fifth and so on, and at the end of the others.
    """
    text, padding = list(range(length)), [OF_PADDING] * (longest - sum(images))
    is_left = row >= 2 and row % 2 == 0
    begin = max(0, length - len(images) - 1) if is_left else 0
    layout = text[:begin]
    for number, tokens in enumerate(images):
        layout += text[begin + number : begin + number + 1] + [OF_IMAGE] * tokens
    layout += text[begin + len(images) :]
    return padding + layout if is_left else layout + padding


def _suffix(is_image: Tensor, generator: torch.Generator) -> Tensor:
    """Ones (batch, sequence) for the tokens of an answer, which begins somewhere after the last image of its row."""
    places = torch.arange(is_image.shape[1])
    after = torch.where(is_image, places, 0).amax(1, keepdim=True) + 1
    begin = after + torch.rand(len(is_image), 1, generator=generator) * (is_image.shape[1] - after)
    return (places >= begin).long()
