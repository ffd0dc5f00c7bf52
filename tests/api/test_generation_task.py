"""The task of a model, before and after it is loaded, and the file of its first graph."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_export.api.generation_task import first_file, generating_model, task_of
from lora_export.callbacks import ignore
from lora_export.errors import InputRefused, WrongUsage
from lora_export.models.load import load_model
from lora_export.options.export import IMAGE_TEXT_TO_TEXT, IMAGE_TO_TEXT, SPEECH_TO_TEXT, TEXT_GENERATION, TEXT_TO_TEXT
from support.generators import DECODERS, ENCODER_DECODERS, small_decoder, small_encoder_decoder
from support.small_models import small_model


@pytest.mark.parametrize(
    ("config", "task"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, TEXT_GENERATION),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, TEXT_TO_TEXT),
        ({"architectures": ["WhisperForConditionalGeneration"], "is_encoder_decoder": True}, SPEECH_TO_TEXT),
        ({"architectures": ["VisionEncoderDecoderModel"], "is_encoder_decoder": True}, IMAGE_TO_TEXT),
        ({"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}, IMAGE_TEXT_TO_TEXT),
        ({"model_type": "llava", "vision_config": {"model_type": "siglip_vision_model"}}, IMAGE_TEXT_TO_TEXT),
        ({"model_type": "llava", "vision_config": {"model_type": "pixtral"}}, IMAGE_TEXT_TO_TEXT),
        ({"model_type": "llava", "vision_config": {"model_type": "vit"}}, TEXT_GENERATION),
        ({"architectures": ["PaliGemmaForConditionalGeneration"], "model_type": "paligemma"}, IMAGE_TEXT_TO_TEXT),
        ({"architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next"}, IMAGE_TEXT_TO_TEXT),
        ({"architectures": ["LlamaForCausalLM"], "model_type": ["llava"]}, TEXT_GENERATION),
        ({"architectures": ["NoSuchModel"], "is_encoder_decoder": True}, TEXT_TO_TEXT),
        ({"architectures": [7], "is_encoder_decoder": True}, TEXT_TO_TEXT),
        ({"architectures": "T5", "is_encoder_decoder": True}, TEXT_TO_TEXT),
    ],
)
def test_config_tells_the_task(tmp_path: Path, config: object, task: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert task_of(tmp_path) == task_of(str(tmp_path)) == task


def test_module_tells_its_task() -> None:
    assert task_of((ENCODER_DECODERS["whisper"](), {})) == SPEECH_TO_TEXT
    assert task_of((DECODERS["llama"](), {})) == TEXT_GENERATION
    assert task_of((torch.nn.Linear(2, 2), {})) == TEXT_GENERATION
    assert task_of("model.py:factory") == TEXT_GENERATION, "a factory is not called"


def test_images_of_a_model_are_left_out_where_they_are_not_taken(tmp_path: Path) -> None:
    folder = small_model("llava", tmp_path)
    assert task_of(folder, takes_images=False) == TEXT_GENERATION
    llava = load_model(str(folder))
    assert generating_model(llava, IMAGE_TEXT_TO_TEXT, ignore) is llava
    texts = generating_model(llava, TEXT_GENERATION, ignore)
    assert texts.input_names == ("input_ids", "attention_mask")
    assert "a graph of text-generation takes texts alone" in texts.not_judged[0]
    with pytest.raises(InputRefused, match='its inputs have no images\nIts texts alone: task="text-generation"'):
        generating_model(replace(llava, text_only=None), IMAGE_TEXT_TO_TEXT, ignore)
    other = load_model(str(small_decoder("llama", tmp_path / "llama")))
    with pytest.raises(InputRefused, match="LlamaForCausalLM is no model whose images are exported"):
        generating_model(other, IMAGE_TEXT_TO_TEXT, ignore)


def test_first_file_is_in_the_folder(tmp_path: Path) -> None:
    assert first_file(tmp_path / "out", TEXT_GENERATION) == tmp_path / "out" / "model.onnx"
    assert first_file(tmp_path / "out.onnx", TEXT_GENERATION) == tmp_path / "out.onnx"
    assert first_file(tmp_path / "qwen2.5", TEXT_GENERATION) == tmp_path / "qwen2.5" / "model.onnx"
    assert first_file(tmp_path / "llava-1.5", IMAGE_TEXT_TO_TEXT) == tmp_path / "llava-1.5" / "vision_encoder.onnx"
    assert first_file(tmp_path / "out", IMAGE_TEXT_TO_TEXT) == tmp_path / "out" / "vision_encoder.onnx"
    assert first_file(tmp_path / "out", TEXT_TO_TEXT) == tmp_path / "out" / "encoder_model.onnx"
    with pytest.raises(WrongUsage, match=r"becomes three graphs: -o .*out\.onnx has to name a folder"):
        first_file(tmp_path / "out.onnx", TEXT_TO_TEXT)


def test_model_that_does_another_task_is_refused(tmp_path: Path) -> None:
    llama = load_model(str(small_decoder("llama", tmp_path / "llama")))
    bart = load_model(str(small_encoder_decoder("bart", tmp_path / "bart")))
    said: list[str] = []
    assert generating_model(bart, TEXT_TO_TEXT, said.append) is bart
    assert said == ["task: text2text-generation, BartForConditionalGeneration with its key/value cache"]
    for model, task, message in (
        (llama, TEXT_TO_TEXT, "LlamaForCausalLM does text-generation, not text2text-generation"),
        (bart, TEXT_GENERATION, "BartForConditionalGeneration does text2text-generation, not text-generation"),
        (bart, SPEECH_TO_TEXT, 'does text2text-generation, not automatic-speech-recognition: task="text2text-gen'),
    ):
        with pytest.raises(InputRefused, match=message):
            generating_model(model, task, said.append)
