"""Prompts of an encoder: texts that are padded, sounds, arrays, and what it does not read."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import transformers as hf
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from lora_export.api.generation_prompts import encoder_inputs, first_tokens, token_ids
from lora_export.api.generation_settings import GenerationSettings
from lora_export.errors import InputRefused, WrongUsage
from lora_export.runtime.generation.decoder import EncoderDecoder
from support.generators import small_tokenizer
from support.sounds import small_whisper, write_sound

TEXTS: dict[str, Any] = {"takes": {"input_ids": (None, None)}, "takes_mask": True}
SPEECH: dict[str, Any] = {"takes": {"input_features": (None, 8, 40)}, "takes_mask": False}
WAVES: dict[str, Any] = {"takes": {"input_values": (None, None)}, "takes_mask": True}
IMAGES: dict[str, Any] = {"takes": {"pixel_values": (None, 3, 4, 4)}, "takes_mask": False}


def inputs(folder: Path, encoder: dict[str, Any], prompts: list[Any], tokenizer: Any = None) -> dict[str, np.ndarray]:
    model = cast(EncoderDecoder, SimpleNamespace(**encoder))
    return encoder_inputs(prompts, model, GenerationSettings(folder), tokenizer, chat=False)


def test_texts_are_padded_behind(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"pad_token_id": 9, "vocab_size": 20}))
    made = inputs(tmp_path, TEXTS, ["5 6 7", [4]], lambda text: {"input_ids": [int(word) for word in text.split()]})
    assert made["input_ids"].tolist() == [[5, 6, 7], [4, 9, 9]]
    assert made["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert inputs(tmp_path, {**TEXTS, "takes_mask": False}, [[4]]).keys() == {"input_ids"}
    with pytest.raises(InputRefused, match="a prompt has the token 20"):
        inputs(tmp_path, TEXTS, [[4, 20]])


def test_an_encoder_may_have_more_tokens_than_its_decoder(tmp_path: Path) -> None:
    model = {"encoder": {"vocab_size": 30}, "decoder": {"vocab_size": 20}, "pad_token_id": 0}
    (tmp_path / "config.json").write_text(json.dumps(model))
    assert inputs(tmp_path, TEXTS, [[4, 29]])["input_ids"].tolist() == [[4, 29]]
    with pytest.raises(InputRefused, match="a prompt has the token 30; the model has rows for 0 to 29"):
        inputs(tmp_path, TEXTS, [[4, 30]])
    with pytest.raises(InputRefused, match="a prompt has the token 20; the model has rows for 0 to 19"):
        token_ids([4, 20], None, GenerationSettings(tmp_path), chat=False)


def test_features_are_taken_as_they_are(tmp_path: Path) -> None:
    own = [np.full((8, 40), number, np.float64) for number in (1, 2)]
    made = inputs(tmp_path, SPEECH, own)["input_features"]
    assert made.dtype == np.float32
    np.testing.assert_array_equal(made, np.stack(own))


def test_sounds_go_through_the_extractor(tmp_path: Path) -> None:
    extractor = hf.Wav2Vec2FeatureExtractor(sampling_rate=8000, do_normalize=False, return_attention_mask=True)
    extractor.save_pretrained(tmp_path)
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setsampwidth(2)
        file.setnchannels(1)
        file.setframerate(8000)
        file.writeframes(np.full(5, 8192, "<i2").tobytes())
    made = inputs(tmp_path, WAVES, [tmp_path / "a.wav", np.array([0.5, -0.5, 0.5])])
    assert made["input_values"].tolist() == [[0.25] * 5, [0.5, -0.5, 0.5, 0, 0]]
    assert made["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]


def test_a_sound_that_whisper_would_cut_is_refused(tmp_path: Path) -> None:
    folder = small_whisper(tmp_path / "whisper")
    assert inputs(folder, SPEECH, [write_sound(tmp_path / "a.wav", seconds=1.0)])["input_features"].shape == (1, 8, 40)
    with pytest.raises(InputRefused, match=r"b\.wav takes 1\.5 s, and the model hears 1 s; cut it into parts"):
        inputs(folder, SPEECH, [write_sound(tmp_path / "b.wav", seconds=1.5)])


def test_image_files_go_through_the_processor(tmp_path: Path) -> None:
    ViTImageProcessorPil(size={"height": 4, "width": 4}).save_pretrained(tmp_path)
    Image.new("RGB", (9, 7), (255, 0, 0)).save(tmp_path / "a.png")
    made = inputs(tmp_path, IMAGES, [tmp_path / "a.png"])["pixel_values"]
    assert made.shape == (1, 3, 4, 4) and made[0, :, 0, 0].tolist() == [1, -1, -1]


@pytest.mark.parametrize(
    ("encoder", "prompts", "message"),
    [
        (TEXTS, [np.zeros((8, 40))], "the model reads texts alone, no sounds and no images: a prompt is a text"),
        (TEXTS, [Path("a.wav")], "the model reads texts"),
        (SPEECH, ["a.wav"], r"the model reads sounds: a prompt is the path of a sound, or an array"),
        (SPEECH, [[1, 2]], "the model reads sounds"),
        (SPEECH, [np.zeros((8, 41), np.float32)], r"the shape \[8, 41\]; the graph takes input_features of \[8, 40\]"),
        (WAVES, [np.zeros((8, 41), np.float32)], r"the shape \[8, 41\]; the graph takes input_values of \[any\]"),
        (SPEECH, [np.zeros((8, 40)), np.zeros((8, 39))], "have to be arrays of one shape, or sounds all of them"),
        (SPEECH, [np.zeros((8, 40)), np.zeros(40)], "have to be arrays of one shape"),
        (SPEECH, [np.zeros(40)], r"has no preprocessor_config\.json"),
        (IMAGES, ["a.png"], "the model reads images: a prompt is the path of an image, or an array"),
        (IMAGES, [Path("a.png")], r"has no image processor \(preprocessor_config\.json\)"),
        (IMAGES, [np.zeros((3, 4, 4)), Path("a.png")], "have to be arrays of one shape, or images all of them"),
        (IMAGES, [np.zeros((3, 5, 4))], r"the graph takes pixel_values of \[3, 4, 4\]"),
        (IMAGES, [np.zeros(4)], "have to be arrays of one shape"),
    ],
)
def test_other_prompts_are_refused(tmp_path: Path, encoder: dict[str, Any], prompts: list[Any], message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        inputs(tmp_path, encoder, prompts)


def test_first_tokens_are_those_of_one_text_or_of_each(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"decoder_start_token_id": 1, "vocab_size": 20}))
    own, tokenizer = GenerationSettings(tmp_path), small_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="w3 $A w3", special_tokens=[("w3", 3)])
    assert tokenizer("w5")["input_ids"] == [3, 5, 3]  # special tokens are not added to the first tokens
    assert first_tokens("w5 w6", 2, tokenizer, own) == [[1, 5, 6]] * 2
    assert first_tokens(["w5 w6"], 2, tokenizer, own) == [[1, 5, 6]] * 2
    assert first_tokens(["w5", [6, 7]], 2, tokenizer, own) == [[1, 5], [1, 6, 7]]
    with pytest.raises(WrongUsage, match="there are 2 prompts for 3 images: give one for all, or one for each"):
        first_tokens(["w5", "w6"], 3, tokenizer, own)
    with pytest.raises(InputRefused, match="a prompt has the token 20"):
        first_tokens([[20]], 1, None, own)
    with pytest.raises(InputRefused, match="a prompt has no token"):
        first_tokens([""], 1, tokenizer, own)


def test_token_ids_are_python_numbers(tmp_path: Path) -> None:
    found = token_ids(tuple(np.array([3, 4])), None, GenerationSettings(tmp_path), chat=False)
    assert found == [3, 4]
    assert all(type(token) is int for token in found)
