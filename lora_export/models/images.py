"""The shape of a model's images, (channels, height, width), their values, and the forms in which a model takes them.

Many configs name the size. Convolutional networks such as ResNet take every size; their image processor, in the same
folder, names the one that they are used with. The values are what the image processor can give, and some beyond: a
fault at the end of the range (a Clip, a table that is too short) does not show in values from -1 to 1.

A language model with an image tower (LLaVA, PaliGemma, Qwen2-VL) replaces the embeddings of placeholder tokens by what
its tower computes. Its processor writes as many placeholders as that is. The number comes from the model's own tower,
which runs once when the model is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from lora_export.errors import InputRefused, first_line
from lora_export.graph.cache_names import GRIDS, IMAGE_SIZES, PIXEL_MASK
from lora_export.models.image_sizes import ROW_TOWER, best_resolutions, pixels_of_token
from lora_export.models.model import Axes, ModelInputs, Sizes, in_dtype_of
from lora_export.models.processors import PIXELS, PROCESSOR, PROCESSOR_FILE
from lora_export.options.spelling import named
from lora_export.storage import json_files

CHANNELS = 3
USUAL_SIZE = 224  # pixels, of ImageNet's networks
LARGEST_IMAGE = 4096  # pixels of a side
MOST_DRAWN = 1 << 25  # of one example of an input: 128 MiB
# Attention over all patches of an image takes time and memory by their square. Windows of it do not.
MOST_PATCHES = 1 << 14
# Image processors without a file: means from 0.406 to 0.5, standard deviations from 0.224 to 0.5. The widest ranges are
# those of ImageNet's numbers, which CLIP's are within.
USUAL_RANGE = (-2.2, 2.7)
BEYOND_EVERY, BEYOND = 8, 2.0  # pixels, of which one is drawn from a range that is wider by this factor
LARGEST_VALUE = 1e4  # a processor that gives more is not believed


def image_shape(config: Any, folder: Path) -> tuple[tuple[int, int, int], str]:
    """The shape, and a note where neither the config nor the image processor names the size (empty otherwise).

    Raises InputRefused where a size is no size, or too large for an example.
    """
    channels = next(filter(None, _fields(config, "num_channels")), CHANNELS)
    others = (getattr(config, name, None) for name in ("crop_size", "input_size"))  # the second is LayoutLMv3's
    stated = next(filter(None, (*_fields(config, "image_size"), *others)), None)
    file, fields = _image_processor(folder)
    stated, source = (stated, "config.json") if stated else (_processor_size(fields), file)
    if stated is None:
        note = f"neither the config nor {PROCESSOR} names the size of an image: {USUAL_SIZE} x {USUAL_SIZE} is used"
        return (channels, USUAL_SIZE, USUAL_SIZE), note
    height, width = stated if isinstance(stated, list | tuple) and len(stated) == 2 else (stated, stated)
    if any(type(size) is not int or not 0 < size <= LARGEST_IMAGE for size in (height, width)):
        raise InputRefused(f"{folder / source}: the size of an image is {stated!r}; it must be 1 to {LARGEST_IMAGE}")
    refuse_huge(folder, "an image", (channels, height, width))
    _refuse_many_patches(config, folder / source, height, width)
    return (channels, height, width), ""


def refuse_huge(folder: Path, what: str, shape: Sequence[Any]) -> None:
    """Raise InputRefused for an example of an input whose shape is no shape, or has more than MOST_DRAWN."""
    if any(type(size) is not int or size < 1 for size in shape) or math.prod(shape) > MOST_DRAWN:
        raise InputRefused(
            f"{folder / 'config.json'}: {what} has the shape {' x '.join(map(str, shape))}. At most "
            f"{MOST_DRAWN:,} numbers are generated: give an example of your own ({named('inputs', 'FILE.npz')})"
        )


def _refuse_many_patches(config: Any, path: Path, height: int, width: int) -> None:
    """Raise InputRefused for an image of more patches than attention can take at once."""
    size = next(filter(None, _fields(config, "patch_size")), None)
    windows = next(filter(None, _fields(config, "window_size")), None)
    if type(size) is not int or size < 1 or windows:
        return
    if (patches := (height // size) * (width // size)) > MOST_PATCHES:
        raise InputRefused(
            f"{path}: an image of {height} x {width} has {patches:,} patches of {size} x {size}. At most "
            f"{MOST_PATCHES:,} are generated: give an example of your own ({named('inputs', 'FILE.npz')})"
        )


def _fields(config: Any, field: str) -> Iterator[Any]:
    """The values of a field in a config, then in that of its vision model, backbone or encoder."""
    yield getattr(config, field, None)
    for part in ("vision_config", "backbone_config", "encoder"):
        yield getattr(getattr(config, part, None), field, None)


def _image_processor(folder: Path) -> tuple[str, dict[str, Any]]:
    """The file with a folder's image processor, and its fields; none where there is no such file.

    transformers 5 saves it as a part of the whole processor, and reads that before the older file.
    """
    whole = folder / PROCESSOR_FILE
    if whole.is_file() and isinstance(fields := json_files.read_json(whole).get("image_processor"), dict):
        return PROCESSOR_FILE, fields
    return PROCESSOR, json_files.read_json(folder / PROCESSOR) if (folder / PROCESSOR).is_file() else {}


def _processor_size(fields: dict[str, Any]) -> Any:
    """The size to which the image processor crops or resizes; None where it is not recorded."""
    crop = fields.get("crop_size") if fields.get("do_center_crop", True) else None
    size = crop or fields.get("size")
    if not isinstance(size, dict):
        return size or None
    if "height" in size and "width" in size:
        return size["height"], size["width"]
    return size.get("shortest_edge")


# --- values ---


class PixelRange(NamedTuple):
    """The least and the greatest value of each channel: tensors (channels,), or (1,) for all."""

    low: torch.Tensor
    high: torch.Tensor


def pixel_range(folder: Path, channels: int) -> PixelRange:
    """The range that the folder's image processor gives, or that of usual processors where it has none."""
    _, fields = _image_processor(folder)
    found = _of_processor(fields, channels) if fields else None
    if found is None:
        return PixelRange(*(torch.tensor([value]) for value in USUAL_RANGE))
    return found


def draw_pixels(shape: Sequence[int], values: PixelRange, generator: torch.Generator) -> torch.Tensor:
    """Images (..., channels, height, width), uniform in the range, with some pixels beyond it."""
    low, high = (value[:, None, None] for value in values)
    middle, half = (low + high) / 2, (high - low) / 2
    offset = torch.rand(*shape, generator=generator) * 2 - 1
    is_beyond = torch.rand(*shape, generator=generator) < 1 / BEYOND_EVERY
    return middle + half * torch.where(is_beyond, BEYOND * offset, offset)


def _of_processor(fields: dict[str, Any], channels: int) -> PixelRange | None:
    """(0 ... 255) · factor, less the mean, divided by the standard deviation; None where a number is missing."""
    factor = fields.get("rescale_factor", 1 / 255) if fields.get("do_rescale", True) else 1.0
    normalises = fields.get("do_normalize", False)
    mean = _by_channel(fields.get("image_mean") if normalises else 0.0, channels)
    deviation = _by_channel(fields.get("image_std") if normalises else 1.0, channels)
    if mean is None or deviation is None or not _is_number(factor) or factor <= 0 or bool((deviation <= 0).any()):
        return None
    found = PixelRange((0 - mean) / deviation, (255 * factor - mean) / deviation)
    return found if max(float(value.abs().max()) for value in found) <= LARGEST_VALUE else None


def _by_channel(value: Any, channels: int) -> torch.Tensor | None:
    """(channels,) or (1,); None for anything but one number, or one for each channel."""
    numbers = value if isinstance(value, list) else [value]
    if len(numbers) not in (1, channels) or not all(map(_is_number, numbers)):
        return None
    return torch.tensor(numbers, dtype=torch.float32)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_VALUE


# --- Forms in which language models take images ---

IMAGES, PATCHES = "images", "patches"  # symbols of the number of images, and of the patches of all of them
HEIGHT, WIDTH, TILES = "height", "width", "tiles"  # symbols of padded images, and of the tiles of an image
PATCHES_ACROSS = (2, 3)  # of the first image and the second, after the merge of neighbours; both are 2 high
HIGH = 2
MORE_PADDING = 3  # the number of images, modulo this, is added to the padding: it is not always that of the trace


@dataclass(frozen=True)
class ImageForm:
    """One form of a model's images. They all have one size, or every second one is wider."""

    axes: Axes  # that vary, of the inputs that `draw` makes
    draw: Callable[[int, torch.Generator], ModelInputs]  # of so many images
    patches: Callable[[int], int] = lambda _: 0  # of an image, by its number; 0 where they are no axis
    sizes: Callable[[int], Sizes] = lambda _: {}  # that the number of images determines
    note: str = ""


def image_forms(config: Any, takes: Sequence[str], folder: Path) -> Iterator[ImageForm]:
    """The forms that a model may take, by the parameters of its forward. The model itself decides which it is.

    Raises InputRefused for images that are too large for an example.
    """
    if GRIDS in takes:
        yield _patches(config, folder)
        return
    if IMAGE_SIZES in takes and getattr(getattr(config, "vision_config", None), "model_type", "") == ROW_TOWER:
        yield _padded(config, folder)
        return
    shape, note = image_shape(config, folder)
    values, sizes = pixel_range(folder, shape[0]), torch.tensor([shape[1:]])

    def whole(images: int, generator: torch.Generator) -> ModelInputs:
        return {PIXELS: draw_pixels((images, *shape), values, generator)}

    def whole_with_sizes(images: int, generator: torch.Generator) -> ModelInputs:
        return whole(images, generator) | {IMAGE_SIZES: sizes.repeat(images, 1)}

    def in_one_row(images: int, generator: torch.Generator) -> ModelInputs:
        mask = _masked_edges(images, shape, getattr(config, "vision_config", config), generator)
        return {PIXELS: whole(images, generator)[PIXELS][None], PIXEL_MASK: mask[None]}

    if PIXEL_MASK in takes:
        yield ImageForm({PIXELS: {1: IMAGES}, PIXEL_MASK: {1: IMAGES}}, in_one_row, note=note)
    yield ImageForm({PIXELS: {0: IMAGES}}, whole, note=note)
    if IMAGE_SIZES not in takes:
        return
    yield ImageForm({PIXELS: {0: IMAGES}, IMAGE_SIZES: {0: IMAGES}}, whole_with_sizes, note=note)
    if tiles := _most_tiles(config, folder, shape):
        refuse_huge(folder, "the tiles of an image", (tiles, *shape))
        yield _tiled(config, folder, shape, note)


def _masked_edges(images: int, shape: Sequence[int], vision: Any, generator: torch.Generator) -> Tensor:
    """Masks (images, height, width): every second image has no pixels in its last patches, across or down."""
    mask = torch.ones(images, *shape[1:], dtype=torch.int64)
    size = getattr(vision, "patch_size", 1)
    for image in range(1, images, 2):
        is_across = bool(torch.rand((), generator=generator) < 1 / 2)
        (mask[image, -size:] if is_across else mask[image, :, -size:]).zero_()
    return mask


def _most_tiles(config: Any, folder: Path, shape: tuple[int, int, int]) -> int:
    """The whole image and the tiles of the largest resolution, where a config lists resolutions (LLaVA-NeXT)."""
    resolutions = getattr(config, "image_grid_pinpoints", None) or []
    if not isinstance(resolutions, list | tuple) or not all(map(_is_resolution, resolutions)):
        raise InputRefused(f"{folder / 'config.json'}: image_grid_pinpoints is no list of heights and widths")
    tiles = [high * wide // (shape[1] * shape[2]) for high, wide in resolutions]
    return 1 + max(tiles) if tiles else 0


def _is_resolution(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(type(size) is int and size > 0 for size in value)


def _patches(config: Any, folder: Path) -> ImageForm:
    """Patches (all patches, channels · frames · size²) and a grid (frames, high, wide) of each image (Qwen2-VL).

    The second image is wider than a window of the tower's attention.
    """
    vision = getattr(config, "vision_config", config)
    size, frames = getattr(vision, "patch_size", None), getattr(vision, "temporal_patch_size", 1)
    merged = getattr(vision, "spatial_merge_size", 1)
    channels = getattr(vision, "in_channels", None) or getattr(vision, "num_channels", None) or 3
    refuse_huge(folder, "a group of patches", (merged, merged, channels, frames, size, size))
    assert isinstance(size, int)
    window = getattr(vision, "window_size", None)
    past_window = 1 + window // (size * merged) if type(window) is int else 0
    across = (PATCHES_ACROSS[0], max(PATCHES_ACROSS[1], past_window))
    refuse_huge(folder, "the patches of an image", (HIGH * merged, across[1] * merged, channels, frames, size, size))
    grids = torch.tensor([[1, HIGH * merged, wide * merged] for wide in across])
    values = pixel_range(folder, channels)

    def patches(image: int) -> int:
        return int(grids[image % len(grids)].prod())

    def all_patches(images: int) -> int:
        return sum(map(patches, range(images)))

    def draw(images: int, generator: torch.Generator) -> ModelInputs:
        count = all_patches(images)
        pixels = draw_pixels((count, channels, frames * size, size), values, generator)
        is_upright = torch.rand(images, 1, generator=generator) < 1 / 2  # as many patches: it may be drawn again alone
        own = grids.repeat(images, 1)[:images]
        return {PIXELS: pixels.reshape(count, -1), GRIDS: torch.where(is_upright, own[:, [0, 2, 1]], own)}

    axes: Axes = {PIXELS: {0: PATCHES}, GRIDS: {0: IMAGES}}
    return ImageForm(axes, draw, patches, lambda images: {PATCHES: all_patches(images)})


def _padded(config: Any, folder: Path) -> ImageForm:
    """Images of several sizes, padded to one that is wider than high, and the height and width of each (Pixtral)."""
    vision = config.vision_config
    channels = getattr(vision, "num_channels", CHANNELS)
    size, merged = getattr(vision, "patch_size", None), getattr(config, "spatial_merge_size", 1)
    refuse_huge(folder, "a patch", (channels, size, merged))
    pixels = pixels_of_token(config)
    tokens = torch.tensor([[HIGH, PATCHES_ACROSS[1]], [1, 2 * PATCHES_ACROSS[1] - 1]])  # high and wide
    refuse_huge(folder, "a padded image", (channels, *[(int(tokens.max()) + MORE_PADDING) * pixels] * 2))
    values = pixel_range(folder, channels)

    def sizes(images: int) -> Sizes:
        longest = int(tokens[:images].max()) + images % MORE_PADDING
        return {HEIGHT: longest * pixels, WIDTH: (longest + 1) * pixels}

    def draw(images: int, generator: torch.Generator) -> ModelInputs:
        drawn = draw_pixels((images, channels, *sizes(images).values()), values, generator)
        is_upright = torch.rand(images, 1, generator=generator) < 1 / 2  # as many tokens: it may be drawn again alone
        own = tokens.repeat(images, 1)[:images] * pixels
        return {PIXELS: drawn, IMAGE_SIZES: torch.where(is_upright, own.flip(1), own)}

    axes: Axes = {PIXELS: {0: IMAGES, 2: HEIGHT, 3: WIDTH}, IMAGE_SIZES: {0: IMAGES}}
    return ImageForm(axes, draw, sizes=sizes)


def _tiled(config: Any, folder: Path, shape: tuple[int, int, int], note: str) -> ImageForm:
    """A whole image and its tiles, padded to a number of tiles, and the height and width of each image (LLaVA-NeXT)."""
    resolutions = config.image_grid_pinpoints
    _, high, wide = shape
    own = torch.tensor([[high, wide + wide // 2], [high + high // 4, 2 * wide + 1]])
    values = pixel_range(folder, shape[0])
    best = [resolutions[number] for number in best_resolutions(own, resolutions).tolist()]
    counts = [1 + -(-rows // high) * -(-columns // wide) for rows, columns in best]  # rounded up

    def sizes(images: int) -> Sizes:
        return {TILES: max(counts[:images]) + images % MORE_PADDING}

    def draw(images: int, generator: torch.Generator) -> ModelInputs:
        pixels = draw_pixels((images, sizes(images)[TILES], *shape), values, generator)
        return {PIXELS: pixels, IMAGE_SIZES: own.repeat(images, 1)[:images]}

    axes: Axes = {PIXELS: {0: IMAGES, 1: TILES}, IMAGE_SIZES: {0: IMAGES}}
    return ImageForm(axes, draw, sizes=sizes, note=note)


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
        return {**sizes, "sequence": sizes["sequence"] + self._longest(sizes), **self.form.sizes(sizes[IMAGES])}

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
    """The number of features of each image, from their list, (images, tokens, width), or (all tokens, width).

    A list of one entry has those of all images of one row.
    """
    if isinstance(found, list | tuple) and len(found) == 1:
        (found,) = found
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
