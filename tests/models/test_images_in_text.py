"""Images among the tokens of a text: as many placeholders as features, at places that the sizes determine."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_export.errors import InputRefused
from lora_export.models.images import ImageForm, ImagesInText, images_in_text
from lora_export.models.load import load_model
from support.small_models import small_model

IMAGE = 5
FORM = ImageForm({"pixel_values": {0: "images"}}, lambda images, _: {"pixel_values": torch.zeros(images, 3, 2, 2)})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixed(images: int, batch: int, length: int, **more: Any) -> dict[str, list[list[int]]]:
    """Rows with the texts 10, 11, 12 ... and images of two and three tokens."""
    inserted = ImagesInText(IMAGE, FORM, (2, 3), **more)
    sizes = inserted.derived({"batch": batch, "images": images, "sequence": length})
    text = {"input_ids": torch.arange(10, 10 + length).repeat(batch, 1), "attention_mask": torch.ones(batch, length)}
    made = inserted.put_into(text, sizes, 0, generator())
    return {name: value.long().tolist() for name, value in made.items() if name != "pixel_values"}


def test_an_image_follows_the_first_token_of_a_row() -> None:
    assert mixed(1, 1, 4) == {"input_ids": [[10, 5, 5, 11, 12, 13]], "attention_mask": [[1] * 6]}


def test_two_images_of_a_row_have_a_token_between() -> None:
    assert mixed(2, 1, 4)["input_ids"] == [[10, 5, 5, 11, 5, 5, 5, 12, 13]]


def test_a_row_with_fewer_images_has_padding_on_its_own_side() -> None:
    rows = mixed(1, 3, 4)
    assert rows["input_ids"] == [[10, 5, 5, 11, 12, 13], [10, 11, 12, 13, 0, 0], [0, 0, 10, 11, 12, 13]]
    assert rows["attention_mask"] == [[1] * 6, [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]]


def test_a_row_with_padding_before_it_has_its_image_at_the_end() -> None:
    assert mixed(3, 3, 4)["input_ids"][2] == [0, 10, 11, 12, 5, 5, 13]  # the second image is the longest


def test_token_types_mark_the_images_or_the_answer_after_them() -> None:
    assert mixed(1, 1, 4, token_types="mm_token_type_ids")["mm_token_type_ids"] == [[0, 1, 1, 0, 0, 0]]
    (marks,) = mixed(1, 1, 40, token_types="token_type_ids", marks_suffix=True)["token_type_ids"]
    assert marks == sorted(marks) and marks[:3] == [0, 0, 0] and 0 < sum(marks) < 40


def test_a_text_too_short_for_its_images_is_refused() -> None:
    inserted = ImagesInText(IMAGE, FORM, (2, 3))
    assert inserted.text_length({"batch": 1, "images": 2, "sequence": 9}) == 4
    with pytest.raises(InputRefused, match="the images of one text take 5 tokens, and the text with them may have 8"):
        inserted.text_length({"batch": 1, "images": 2, "sequence": 8})


FAMILIES = ["llava", "paligemma", "gemma3", "internvl", "idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
FAMILIES += ["llava_next", "pixtral", "mistral3"]
IMAGES = ("pixel_values", "image_grid_thw", "pixel_attention_mask", "image_sizes")


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_gets_as_many_placeholders_as_features(name: str, tmp_path: Path) -> None:
    model = load_model(str(small_model(name, tmp_path)))
    rows = set()
    for sizes in model.checked_sizes({}):
        inputs = model.inputs(sizes, seed=3)
        is_image = inputs["input_ids"] == model.placeholders[0]
        assert (inputs["attention_mask"][is_image] == 1).all()
        images = {key: value for key, value in inputs.items() if key in IMAGES}
        with torch.no_grad():
            features = model.module.get_image_features(**images).pooler_output
            model.module(**inputs)
        assert int(is_image.sum()) == sum(each[..., 0].numel() for each in features)
        rows |= {int(count) for count in is_image.sum(1)}
    assert 0 in rows and len(rows) >= 3  # rows without an image, with one, and with two


@pytest.mark.parametrize("name", ["llava", "idefics3", "qwen2_vl", "mistral3"])
def test_another_draw_of_one_input_alone_is_valid(name: str, tmp_path: Path) -> None:
    model = load_model(str(small_model(name, tmp_path)))
    sizes = model.checked_sizes({})[2]
    before, after = (model.inputs(sizes, seed=seed) for seed in (1, 2))
    for changed in before:
        with torch.no_grad():
            model.module(**{**before, changed: after[changed]})


def test_a_position_table_too_short_for_images_leaves_texts_with_the_reason(tmp_path: Path) -> None:
    base = small_model("llava", tmp_path)
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 48
    (base / "config.json").write_text(json.dumps(config))
    model = load_model(str(base))
    assert model.input_names == ("input_ids", "attention_mask")
    assert "a text with its images takes 61 tokens, and the model has positions for 48" in model.not_judged[0]


def test_a_candidate_without_images_is_given_texts_alone(tmp_path: Path) -> None:
    model = load_model(str(small_model("llava", tmp_path)))
    assert model.taking(()) is model and model.taking(["input_ids", "attention_mask", "pixel_values"]) is model
    texts = model.taking(["input_ids", "attention_mask"])
    assert texts.input_names == ("input_ids", "attention_mask") and texts.module is model.module
    assert "with images among its tokens" in texts.not_judged[0] and not model.not_judged


def test_models_without_placeholders_or_a_tower_have_none(tmp_path: Path) -> None:
    takes = ["input_ids", "pixel_values"]
    assert images_in_text(SimpleNamespace(config=SimpleNamespace()), takes, tmp_path) == (None, "")
    towerless = SimpleNamespace(config=SimpleNamespace(image_token_id=5))
    assert images_in_text(towerless, ["input_ids"], tmp_path) == (None, "")
    assert images_in_text(towerless, takes, tmp_path) == (None, "it has no get_image_features")
