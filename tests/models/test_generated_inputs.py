"""Inputs of Hugging Face models, generated from their configs: every kind, at every size that is checked."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lora_export.errors import InputRefused
from lora_export.models.generated_inputs import generated_inputs
from lora_export.models.load import load_model
from support.small_models import MODELS, TEXT, VISION, small_model

IMAGES = {"vit", "deit", "swin", "convnext", "dinov2", "segformer", "detr"}
WITH_TYPES = {"bert", "roberta", "electra"}
TAKES = dict.fromkeys(MODELS, ("input_ids", "attention_mask"))
TAKES |= dict.fromkeys(IMAGES, ("pixel_values",))
TAKES |= dict.fromkeys(WITH_TYPES, ("input_ids", "attention_mask", "token_type_ids"))
TAKES |= dict.fromkeys(("t5", "bart"), ("input_ids", "attention_mask", "decoder_input_ids"))
TAKES |= dict.fromkeys(("wav2vec2", "hubert"), ("input_values",))
TAKES |= {
    "layoutlm": ("input_ids", "bbox", "attention_mask", "token_type_ids"),
    "whisper": ("input_features", "decoder_input_ids"),
    "clip": ("input_ids", "pixel_values", "attention_mask"),
    "siglip": ("input_ids", "pixel_values", "attention_mask"),
    "blip": ("pixel_values", "input_ids", "attention_mask"),
    "clap": ("input_ids", "input_features", "attention_mask"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_takes_its_generated_inputs_at_every_size(name: str, tmp_path: Path) -> None:
    model = load_model(str(small_model(name, tmp_path)))
    assert set(model.input_names) == set(TAKES[name])
    wanted = [model.traced_sizes, *model.checked_sizes({})]
    has_text = bool({"input_ids", "decoder_input_ids"} & set(model.input_names))
    assert len({tuple(sizes.items()) for sizes in wanted}) == (5 if has_text and name != "whisper" else 4)
    for sizes in wanted:
        inputs = model.inputs(sizes, seed=1)
        assert list(inputs) == list(model.axes)
        for input_name, symbols in model.axes.items():
            assert {symbol: inputs[input_name].shape[axis] for axis, symbol in symbols.items()} == {
                symbol: sizes[symbol] for symbol in symbols.values()
            }
        with torch.no_grad():
            model.module(**inputs)


def test_lengths_of_a_sound_differ_by_whole_frames(tmp_path: Path) -> None:
    model = load_model(str(small_model("wav2vec2", tmp_path)))
    frames = set()
    for sizes in (model.traced_sizes, *model.checked_sizes({})):
        with torch.no_grad():
            frames.add(model.module(**model.inputs(sizes, seed=0)).logits.shape[1])
    assert len(frames) == 3  # the traced number, which one more sample does not change, and two others


def test_boxes_have_their_corners_in_order(tmp_path: Path) -> None:
    boxes = load_model(str(small_model("layoutlm", tmp_path))).example_inputs()["bbox"]
    assert (boxes[..., :2] <= boxes[..., 2:]).all()
    assert boxes.min() >= 0 and 50 < boxes.max() < 100


def test_a_text_of_clip_ends_where_its_padding_begins(tmp_path: Path) -> None:
    base = small_model("clip", tmp_path)
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 7
    (base / "config.json").write_text(json.dumps(config))
    inputs = load_model(str(base)).inputs({"batch": 3, "sequence": 9}, seed=2)
    for ids, mask in zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True):
        assert [position for position, token in enumerate(ids) if token == 7] == [
            max(position for position, seen in enumerate(mask) if seen)
        ]


def test_a_classifier_of_an_encoder_decoder_gets_texts_with_one_end(tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformers.BartForSequenceClassification(MODELS["bart"][1]()).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert model.input_names == ("input_ids", "attention_mask")
    inputs = model.inputs({"batch": 5, "sequence": 29}, seed=0)
    assert (inputs["input_ids"] == 2).sum(1).tolist() == [1] * 5
    with torch.no_grad():
        assert model.module(**inputs).logits.shape == (5, 3)


def test_special_tokens_are_drawn_and_padding_holds_its_token(tmp_path: Path) -> None:
    """A fault in the row of [MASK] or [PAD] could not show: in a large vocabulary they would never be drawn."""
    config = transformers.BertConfig(
        vocab_size=30_000,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        pad_token_id=3,
        bos_token_id=11,
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    tokens = [{"id": 101, "content": "[CLS]", "special": True}, {"id": 103, "content": "[MASK]", "special": True}]
    tokens += [{"id": 500, "content": "word", "special": False}, {"id": 10**6, "content": "far", "special": True}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    model = load_model(str(tmp_path))
    cases = [model.inputs(sizes, seed=seed) for seed, sizes in enumerate(model.checked_sizes({}))]
    drawn = {token for case in cases for token in case["input_ids"][case["attention_mask"] == 1].tolist()}
    assert {3, 11, 101, 103} <= drawn and 500 not in drawn and max(drawn) < 30_000
    assert {token for case in cases for token in case["input_ids"][case["attention_mask"] == 0].tolist()} == {3}


def test_images_among_tokens_are_left_out_with_a_note(tmp_path: Path) -> None:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION, image_size=8, patch_size=4),
        text_config=transformers.LlamaConfig(**TEXT), image_token_index=5,
    )  # fmt: skip
    transformers.LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert model.input_names == ("input_ids", "attention_mask")
    assert not any((model.inputs({"batch": 9, "sequence": 50}, seed=seed)["input_ids"] == 5).any() for seed in range(3))
    assert (
        "with images, videos and sounds among its tokens. They are no part of the generated inputs"
        in model.not_judged[0]
    )


class Strange(nn.Module):
    main_input_name = "input_features"
    config = SimpleNamespace(get_text_config=lambda decoder=False: SimpleNamespace())

    def forward(self, input_features: Any, other: Any = None) -> None: ...


def test_undetermined_inputs_are_refused_with_their_names(tmp_path: Path) -> None:
    message = (
        r"Strange takes input_features, and its config does not determine .*--inputs FILE.npz.*input_features, other"
    )
    with pytest.raises(InputRefused, match=message):
        generated_inputs(Strange(), tmp_path)
