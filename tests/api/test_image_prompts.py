"""Images in the texts of generation: transformers' processors are the measure."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import transformers as hf
from PIL import Image

from lora_export.api.generation_prompts import tokens_with_images
from lora_export.api.generation_settings import GenerationSettings
from lora_export.api.image_prompts import ImageSize, read_images
from lora_export.errors import InputRefused
from support.image_text import FULL_PROCESSORS, MARKERS, image_files, image_text_processor, processor_inputs

IMAGE = 5
SIZES = {"pixel_values": (None, 3, 16, 16), "pixel_attention_mask": (None, None, 16, 16)}
IN_ONE_ROW = {"pixel_values": (None, None, 3, 16, 16)}
ANY_SIZE = {"pixel_values": (None, 3, None, None), "image_sizes": (None, 2)}
ROWS = {"pixtral": 4, "mistral3": 8}  # pixels of a token
TYPES = {"pixtral": "llava"}
ALONE = [name for name in FULL_PROCESSORS if name != "llava_next"]  # whose graph alone knows the number of tokens


def parts(name: str, folder: Path) -> tuple[GenerationSettings, Any, Any]:
    """The settings and the tokenizer of a folder, and what reads images as its vision encoder takes them."""
    image_text_processor(name, folder)
    tower = {"vision_config": {"model_type": "pixtral"}} if name in ROWS else {}
    (folder / "config.json").write_text(json.dumps({"model_type": TYPES.get(name, name), **tower}))
    has_masks = name in ("idefics3", "smolvlm")
    inputs = {**SIZES, **IN_ONE_ROW} if has_masks else {"pixel_values": SIZES["pixel_values"]}
    inputs = ANY_SIZE if name in ROWS else inputs
    model = SimpleNamespace(image_inputs=inputs, pixels=ROWS.get(name, 0))
    return GenerationSettings(folder), hf.AutoTokenizer.from_pretrained(folder), model


@pytest.mark.parametrize("name", ALONE)
def test_texts_and_images_are_those_of_the_processor(name: str, tmp_path: Path) -> None:
    settings, tokenizer, model = parts(name, tmp_path)
    paths = image_files(tmp_path / "images", (40, 24), (23, 61), (16, 16))
    marker = MARKERS.get(name, "<image>")
    texts = [f"what is on {marker} and that {marker} ?", f"compare {marker} with one"]
    read = read_images(paths, cast(Any, model), settings)
    by_tile = 16 if name == "paligemma" else 4
    counts = [by_tile * tiles for tiles in read.tiles] or [rows * columns for rows, columns in read.grids]
    sizes = list(map(ImageSize, counts, read.grids))
    found = tokens_with_images(texts, sizes, IMAGE, tokenizer, settings, chat=False)
    count = 0
    for text, own, tokens in zip(texts, (paths[:2], paths[2:]), found, strict=True):
        expected = processor_inputs(name, tmp_path, text, [Image.open(path) for path in own])
        assert tokens == expected["input_ids"][0].tolist()
        count += expected["pixel_values"].shape[:-3].numel()
    assert sum(read.tiles) == (0 if name in ROWS else count)
    with pytest.raises(InputRefused, match=f"3 images: the texts need {marker} as often"):
        tokens_with_images([*texts, texts[1]], sizes, IMAGE, tokenizer, settings, chat=False)


def test_token_ids_have_the_tokens_of_the_images_alone(tmp_path: Path) -> None:
    settings, tokenizer, _ = parts("gemma3", tmp_path)
    size = ImageSize(3, (0, 0))
    assert tokens_with_images([[9, 5, 9]], [size], IMAGE, tokenizer, settings, chat=False) == [[9, 5, 5, 5, 9]]
    assert tokens_with_images([[9, 5, 9]], [size], IMAGE, None, settings, chat=False) == [[9, 5, 5, 5, 9]]
    with pytest.raises(InputRefused, match="0 images: the texts need the token 5 as often"):
        tokens_with_images([[9, 5, 9]], [], IMAGE, None, settings, chat=False)


def test_a_tokenizer_without_the_tokens_around_an_image_is_refused(tmp_path: Path) -> None:
    settings, tokenizer, _ = parts("internvl", tmp_path)
    tokenizer._special_tokens_map.pop("end_image_token")
    with pytest.raises(InputRefused, match="the tokenizer has no end_image_token, which is written beside"):
        tokens_with_images(["<image>"], [ImageSize(3, (0, 0))], IMAGE, tokenizer, settings, chat=False)


@pytest.mark.parametrize("count", [0, 1])
def test_a_raw_token_of_images_in_a_text_is_refused(count: int, tmp_path: Path) -> None:
    settings, tokenizer, _ = parts("gemma3", tmp_path)
    raw = tokenizer.convert_ids_to_tokens(IMAGE)
    text, sizes = f"what {raw} is on {MARKERS['gemma3'] * count}", [ImageSize(3, (0, 0))] * count
    found = f"has the token 5 of images {3 * count + 1} times, where its images have {3 * count}: write"
    with pytest.raises(InputRefused, match=f"the prompt 'what {raw} is on .* {found}"):
        tokens_with_images([text], sizes, IMAGE, tokenizer, settings, chat=False)


def test_an_image_token_that_the_tokenizer_lacks_is_refused(tmp_path: Path) -> None:
    settings, tokenizer, _ = parts("paligemma", tmp_path)
    with pytest.raises(InputRefused, match="the tokenizer has no token 1000000, which is that of an image"):
        tokens_with_images(["None ?"], [ImageSize(3, (0, 0))], 10**6, tokenizer, settings, chat=False)


def test_crops_are_refused(tmp_path: Path) -> None:
    settings, _, model = parts("gemma3", tmp_path)
    crops = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 8, "pan_and_scan_max_num_crops": 4}
    size = {"height": 16, "width": 16}
    hf.Gemma3ImageProcessorPil(size=size, pan_and_scan_min_ratio_to_activate=1.2, **crops).save_pretrained(tmp_path)
    with pytest.raises(InputRefused, match=r"crops images \(do_pan_and_scan\), which is not supported"):
        read_images(image_files(tmp_path / "images", (64, 16)), cast(Any, model), settings)
