"""Images of generation: as the image processor of a folder makes them, and as they are written in texts.

A text has a marker where an image is read. In its place are the image's tokens, and with some models others around
them. The texts are those of transformers' processors, some of which need torchvision.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_export.api.generation_settings import GenerationSettings
from lora_export.errors import InputRefused
from lora_export.graph.cache_names import IMAGE_SIZES
from lora_export.models.image_sizes import ROW_TOWER
from lora_export.models.image_text import image_family
from lora_export.models.processors import PIXELS, open_image_processor, read_image, refusing_failures
from lora_export.runtime.generation.decoder import ImageText
from lora_export.runtime.runner import Arrays
from lora_export.storage import input_files

# Rows and columns of an image's tiles, without one of the whole, or of its tokens; (0, 0): not divided
TileGrid = tuple[int, int]


class ImageSize(NamedTuple):
    """How many tokens an image has, and how its tiles are placed."""

    tokens: int
    grid: TileGrid


@dataclass(frozen=True)
class ReadImages:
    """Images as an image processor made them."""

    inputs: Arrays = field(default_factory=dict)  # of the vision encoder; none where there is no image
    tiles: Sequence[int] = ()  # of each image
    grids: Sequence[TileGrid] = ()  # of each image


@dataclass(frozen=True)
class Written:
    """An image to write."""

    tokenizer: Any
    token: str  # of an image
    count: int = 0  # how many of it the image has
    grid: TileGrid = (0, 0)

    @property
    def tokens(self) -> str:
        """Those of the whole image, one after the other."""
        return self.token * self.count

    def named(self, token: str) -> str:
        """A token of the tokenizer, by its name. Raises InputRefused where it has none."""
        found = getattr(self.tokenizer, token, None)
        if not isinstance(found, str):
            raise InputRefused(f"the tokenizer has no {token}, which is written beside the tokens of an image")
        return found


def _alone(image: Written) -> str:
    return image.tokens


def _in_lines(image: Written) -> str:
    return f"\n\n{image.named('boi_token')}{image.tokens}{image.named('eoi_token')}\n\n"


def _between_tokens(image: Written) -> str:
    return f"{image.named('start_image_token')}{image.tokens}{image.named('end_image_token')}"


def _by_tile(image: Written) -> str:
    """The tiles row by row, and then the whole image."""
    begin, (rows, columns) = "<fake_token_around_image>", image.grid
    tokens = image.token * (image.count // (rows * columns + 1))
    lines = (
        "".join(f"{begin}<row_{row + 1}_col_{column + 1}>{tokens}" for column in range(columns)) + "\n"
        for row in range(rows)
    )
    end = "\n" if rows else ""
    return f"{''.join(lines)}{end}{begin}<global-img>{tokens}{begin}"


def _in_rows(image: Written) -> str:
    """The image row by row, each with a token behind it."""
    rows, columns = image.grid
    return "[IMG_BREAK]".join([image.token * columns] * rows) + "[IMG_END]"


def _begin_and_line(text: str, marker: str, tokenizer: Any) -> str:
    """Images, the token that begins a text, the text, and the end of its line."""
    before, found, after = text.rpartition(marker)
    return f"{before}{found}{tokenizer.bos_token}{after}\n"


@dataclass(frozen=True)
class ImageRule:
    """How the images of one type of model are written in a text."""

    write: Callable[[Written], str] = _alone
    marker: str = ""  # its name in the tokenizer; empty: the token of images
    frame: Callable[[str, str, Any], str] | None = None  # of a text; the tokenizer then adds no tokens of its own
    options: Mapping[str, Any] = field(default_factory=dict)  # of the image processor


RULES: Mapping[str, ImageRule] = {  # by the family of the model
    ROW_TOWER: ImageRule(_in_rows),
    "gemma3": ImageRule(_in_lines, marker="boi_token"),
    "paligemma": ImageRule(frame=_begin_and_line),
    "internvl": ImageRule(_between_tokens, options={"crop_to_patches": True}),
    **dict.fromkeys(("idefics3", "smolvlm"), ImageRule(_by_tile, options={"return_row_col_info": True})),
}


def rule_of(settings: GenerationSettings) -> ImageRule:
    """The rule for the family of the model that a folder's config names."""
    config = {name: settings.value(name) for name in ("model_type", "vision_config")}
    return RULES.get(image_family(config), ImageRule())


@dataclass(frozen=True)
class ImageWriter:
    """Writes images into the texts of a tokenizer. The token is that of an image."""

    rule: ImageRule
    tokenizer: Any
    token: int

    @property
    def marker(self) -> str:
        """What a text has where an image is read."""
        return Written(self.tokenizer, "").named(self.rule.marker) if self.rule.marker else self._name

    def framed(self, text: str) -> str:
        """A text that is no chat, as the model's processor begins and ends it."""
        return text if self.rule.frame is None else self.rule.frame(text, self.marker, self.tokenizer)

    def write(self, text: str, images: list[ImageSize]) -> str:
        """The text with the next of `images` in place of each marker. These are removed."""

        def written(_: re.Match[str]) -> str:
            return self.rule.write(Written(self.tokenizer, self._name, *next_of(images)))

        return re.sub(re.escape(self.marker), written, text)

    @property
    def _name(self) -> str:
        """The token by its name. Raises InputRefused where the tokenizer has none."""
        found = self.tokenizer.convert_ids_to_tokens(self.token)
        if not isinstance(found, str) or not found:
            raise InputRefused(f"the tokenizer has no token {self.token}, which is that of an image")
        return found


def next_of(images: list[ImageSize]) -> ImageSize:
    """The first image, which is removed; one of no tokens where none is left."""
    return images.pop(0) if images else ImageSize(0, (0, 0))


def read_images(images: Sequence[Path], model: ImageText, settings: GenerationSettings) -> ReadImages:
    """Image files as the image processor in the folder of a model makes them.

    Raises InputRefused for what is no image, for a processor that is missing, and for images of another size than the
    graph takes.
    """
    if not images:
        return ReadImages()
    folder = settings.folder
    options = {**rule_of(settings).options, **({"patch_size": model.pixels} if model.pixels else {})}
    processor = open_image_processor(folder)
    for path in map(Path, images):
        input_files.must_be_regular(path)
    with refusing_failures("the image processor fails on the images"):
        made = processor([read_image(Path(path)) for path in images], return_tensors="np", **options)
    if lacking := [name for name in model.image_inputs if name not in made]:
        raise InputRefused(f"the image processor in {folder} makes no {', '.join(lacking)}, which the graph takes")
    if np.any(made.get("num_crops", 0)):
        raise InputRefused(f"the image processor in {folder} crops images (do_pan_and_scan), which is not supported")
    for name, sizes in model.image_inputs.items():
        refuse_other_shape(made[name].shape[1:], sizes[1:], name)
    inputs = {name: made[name].astype(np.float32 if name == PIXELS else np.int64) for name in model.image_inputs}
    if model.pixels:
        return ReadImages(inputs, grids=[(high, wide) for high, wide in (inputs[IMAGE_SIZES] // model.pixels).tolist()])
    rows, columns = (np.array(made.get(name, [0] * len(images))).reshape(-1).tolist() for name in ("rows", "cols"))
    grids = list(zip(rows, columns, strict=True))
    tiles = made.get("num_patches", [high * wide + 1 for high, wide in grids])
    return ReadImages(inputs, [int(count) for count in tiles], grids)


def refuse_other_shape(shape: tuple[int, ...], sizes: tuple[int | None, ...], name: str) -> None:
    """Raise InputRefused for an array whose sizes, without the first, are not those that a graph takes."""
    fits = len(shape) == len(sizes) and all(size in (None, own) for own, size in zip(shape, sizes, strict=True))
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in sizes)
        raise InputRefused(f"a prompt has the shape {list(shape)}; the graph takes {name} of [{wanted}]")
