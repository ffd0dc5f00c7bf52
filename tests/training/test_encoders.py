"""Rows as tensors: labelled texts, pairs and tags, and tokens that are predicted."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from PIL import Image
from tokenizers import processors
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from lora_export.errors import InputRefused
from lora_export.training.batches import BinaryCrossEntropy, CosineError, CrossEntropy, SquaredError
from lora_export.training.encoders import (
    AnswerEncoder,
    ImageEncoder,
    LabelEncoder,
    SimilarityEncoder,
    TagEncoder,
    TextEncoder,
    Tokens,
    chat_tokens,
    completion_tokens,
    decoder_shift,
    text_tokens,
)
from lora_export.training.records.opening import ImagesByClass
from lora_export.training.row_forms import LabelKind
from support.small_models import MODELS, WORDS, words_tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return hf.AutoTokenizer.from_pretrained(words_tokenizer(tmp_path))


def collated(encoder: Any, *rows: dict[str, Any]) -> Any:
    return encoder.collate([encoder.encode(row) for row in rows])


def test_labels_become_numbers_zeros_and_ones_or_values() -> None:
    one = LabelEncoder(LabelKind.CLASS, (9, 10))
    assert one.tensor(["10", 9]).tolist() == [1, 0] and isinstance(one.loss, CrossEntropy)
    several = LabelEncoder(LabelKind.CLASSES, ("a", "b", "c"))
    assert several.tensor([["c", "a"], []]).tolist() == [[1, 0, 1], [0, 0, 0]]
    assert isinstance(several.loss, BinaryCrossEntropy)
    value = LabelEncoder(LabelKind.VALUE, ())
    assert value.tensor(["0.5", 2]).tolist() == [0.5, 2.0] and isinstance(value.loss, SquaredError)


def test_texts_are_cut_and_padded_to_the_longest(tokenizer: Any) -> None:
    encoder = TextEncoder(tokenizer, 4, LabelEncoder(LabelKind.CLASS, ("x", "y")))
    rows = ({"text": "a good film", "label": "y"}, {"text": "bad", "label": "x"}, {"text": "a " * 9, "label": "x"})
    inputs, labels = collated(encoder, *rows)
    assert inputs["input_ids"].tolist() == [[7, 4, 6, 2], [3, 2, 0, 0], [7, 7, 7, 2]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert labels.tolist() == [1, 0, 0]


def test_a_second_text_is_read_with_the_first(tokenizer: Any) -> None:
    encoder = TextEncoder(tokenizer, 9, LabelEncoder(LabelKind.VALUE, ()))
    inputs, labels = collated(encoder, {"text": "a film", "text_pair": "good", "label": 0.5})
    both = tokenizer("a film", "good")["input_ids"]
    assert inputs["input_ids"].tolist() == [both] and 4 in both
    assert labels.tolist() == [0.5]


def test_the_first_token_of_a_word_has_its_tag(tokenizer: Any) -> None:
    encoder = TagEncoder(tokenizer, 9, LabelEncoder(LabelKind.CLASS, ("x", "y")))
    inputs, labels = collated(
        encoder, {"tokens": ["a", "good-film"], "tags": ["y", "x"]}, {"tokens": ["bad"], "tags": ["y"]}
    )
    assert inputs["input_ids"][0].tolist() == [7, 4, 1, 6, 2]  # a, good, -, film, <eos>
    assert labels.tolist() == [[1, 0, -100, -100, -100], [1, -100, -100, -100, -100]]
    slow = type("Slow", (), {"is_fast": False})()
    with pytest.raises(InputRefused, match="tags need a fast tokenizer"):
        TagEncoder(slow, 9, encoder.labels).encode({"tokens": ["a"], "tags": ["x"]})


def test_tags_follow_padding_at_the_left(tokenizer: Any, tmp_path: Path) -> None:
    left = hf.AutoTokenizer.from_pretrained(words_tokenizer(tmp_path), padding_side="left")
    encoder = TagEncoder(left, 9, LabelEncoder(LabelKind.CLASS, ("x", "y")))
    inputs, labels = collated(
        encoder, {"tokens": ["a", "good"], "tags": ["y", "x"]}, {"tokens": ["bad"], "tags": ["y"]}
    )
    assert inputs["input_ids"][1].tolist() == [0, 3, 2]
    assert labels[1].tolist() == [-100, 1, -100]


def test_all_first_sentences_come_before_all_second_ones(tokenizer: Any) -> None:
    encoder = SimilarityEncoder(tokenizer, 9)
    rows = (
        {"sentence1": "a", "sentence2": "the film", "score": "0.5"},
        {"sentence1": "bad", "sentence2": "good", "score": 1},
    )
    inputs, labels = collated(encoder, *rows)
    assert inputs["input_ids"].tolist() == [[7, 2, 0], [3, 2, 0], [8, 6, 2], [4, 2, 0]]
    assert torch.equal(labels, torch.tensor([0.5, 1.0])) and isinstance(encoder.loss, CosineError)


def test_images_are_prepared_as_the_models_processor_does(tmp_path: Path) -> None:
    processor = ViTImageProcessorPil(size={"height": 4, "width": 4})
    encoder = ImageEncoder(ImagesByClass(tmp_path, []), processor, LabelEncoder(LabelKind.CLASS, ("blue", "red")))
    Image.new("L", (9, 7), 128).save(tmp_path / "grey.png")
    Image.new("RGB", (5, 5), (255, 0, 0)).save(tmp_path / "red.png")
    rows = [
        {"image": tmp_path / "grey.png", "label": "blue"},
        {"image": Image.open(tmp_path / "red.png"), "label": "red"},
        {"image": "red.png", "label": "red"},
        {"image": {"bytes": (tmp_path / "red.png").read_bytes(), "path": "of elsewhere.png"}, "label": "red"},
    ]
    inputs, labels = encoder.collate([encoder.encode(row) for row in rows])
    pixels = inputs["pixel_values"]
    assert pixels.shape == (4, 3, 4, 4) and labels.tolist() == [0, 1, 1, 1]
    assert torch.allclose(pixels[1:, :, 0, 0], torch.tensor([[1.0, -1.0, -1.0]] * 3))  # (x / 255 - 0.5) / 0.5
    assert pixels[0].abs().max() < 0.01


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    encoder = ImageEncoder(ImagesByClass(tmp_path, []), None, LabelEncoder(LabelKind.CLASS, ("blue", "red")))
    with pytest.raises(InputRefused, match=r"no image that can be read: cannot identify image file"):
        encoder.encode({"image": tmp_path / "a.png", "label": "red"})


TURNS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}the {MARK}{{ m.content }} film{END} {% else %}"
    "very {{ m.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}the {% endif %}"
)
PLAIN = TURNS.replace("{MARK}", "").replace("{END}", "")
MARKED = TURNS.replace("{MARK}", "{% generation %}").replace("{END}", "{% endgeneration %}")
DIALOGUE = {
    "messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "good"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "bad"},
    ]
}


def predicted(tokens: Tokens) -> list[str]:
    """The words, those that are predicted in capitals."""
    return [WORDS[id].upper() if trained else WORDS[id] for id, trained in zip(*tokens, strict=True)]


def test_a_text_is_predicted_and_ends_once(tokenizer: Any) -> None:
    assert predicted(text_tokens(tokenizer, ends=True)({"text": "a film"})) == ["A", "FILM", "<EOS>"]
    tokenizer.eos_token = "film"
    assert predicted(text_tokens(tokenizer, ends=True)({"text": "a"})) == ["A", "<EOS>", "FILM"]
    assert predicted(text_tokens(tokenizer, ends=False)({"text": "a"})) == ["A", "<EOS>"]


def test_a_prompt_is_read_and_its_completion_predicted(tokenizer: Any) -> None:
    row = {"prompt": "a very", "completion": "good film"}
    assert predicted(completion_tokens(tokenizer)(row)) == ["a", "very", "GOOD", "FILM", "<EOS>"]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_the_assistants_turns_are_predicted(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    found = predicted(chat_tokens(tokenizer)(DIALOGUE))
    assert found == ["very", "a", "the", "GOOD", "FILM", "very", "a", "the", "BAD", "FILM"]
    tokenizer.chat_template = "{% for one in tools %}{{ one.name }} {% endfor %}" + template
    for tools in ([{"name": "film"}], '[{"name": "film"}]'):
        assert predicted(chat_tokens(tokenizer)({**DIALOGUE, "tools": tools})) == ["film", *found]


def test_dialogues_without_a_place_for_each_turn_are_refused(tokenizer: Any) -> None:
    with pytest.raises(InputRefused, match="the tokenizer has no chat template"):
        chat_tokens(tokenizer)
    tokenizer.chat_template = "{{ messages | length }} {% for m in messages %}{{ m.content }} {% endfor %}"
    with pytest.raises(InputRefused, match="changes earlier turns, so that message 2 has no fixed place"):
        chat_tokens(tokenizer)(DIALOGUE)
    tokenizer.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(InputRefused, match=r"the chat template refuses the messages .*no system"):
        chat_tokens(tokenizer)(DIALOGUE)


def test_a_decoder_reads_its_start_token_then_the_answer(tokenizer: Any) -> None:
    config = SimpleNamespace(pad_token_id=None, decoder_start_token_id=8)
    encoder = AnswerEncoder(tokenizer, 9, decoder_shift(SimpleNamespace(config=config)))
    rows = ({"prompt": "a film", "completion": "good"}, {"prompt": "a", "completion": "very bad"})
    inputs, labels = collated(encoder, *rows)
    assert inputs["input_ids"].tolist() == [[7, 6, 2], [7, 2, 0]]
    assert labels.tolist() == [[4, 2, -100], [5, 3, 2]]
    assert inputs["decoder_input_ids"].tolist() == [[8, 4, 2], [8, 5, 3]]


def test_mbart_reads_the_language_first_and_ends_once(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"extra_special_tokens": ["en_XX"]})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos> en_XX", special_tokens=[("<eos>", 2), ("en_XX", 9)]
    )
    module = getattr(hf, MODELS["mbart"][0])(MODELS["mbart"][1]())
    encoder = AnswerEncoder(tokenizer, 9, decoder_shift(module))
    inputs, labels = collated(encoder, *({"prompt": "a film", "completion": text} for text in ("good", "very bad")))
    assert labels.tolist() == [[4, 2, 9, -100], [5, 3, 2, 9]]
    assert inputs["decoder_input_ids"].tolist() == [[9, 4, 2, 9], [9, 5, 3, 2]]


def test_labels_stay_where_a_models_own_rule_fills_them_in_place() -> None:
    own = SimpleNamespace(prepare_decoder_input_ids_from_labels=lambda labels: labels.masked_fill_(labels < 0, 1))
    own.config, labels = SimpleNamespace(pad_token_id=1), torch.tensor([[4, -100]])  # as FSMT has it
    assert decoder_shift(own)(labels).tolist() == [[4, 1]] and labels.tolist() == [[4, -100]]


@pytest.mark.parametrize(("own", "lacking"), [(True, "pad_token_id"), (False, "decoder_start_token_id")])
def test_what_a_decoder_begins_with_must_be_known(own: bool, lacking: str) -> None:
    module = SimpleNamespace(config=SimpleNamespace(pad_token_id=None, decoder_start_token_id=None))
    if own:
        module.prepare_decoder_input_ids_from_labels = lambda labels: labels
    with pytest.raises(InputRefused, match=f"has no {lacking}, which its decoder needs"):
        decoder_shift(module)
