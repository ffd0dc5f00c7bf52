"""Which tokens of texts, completions and dialogues are predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from lora_export.errors import InputRefused
from lora_export.training.encoders.texts import AnswerEncoder, Tokens, chat_tokens, completion_tokens, text_tokens
from support.small_models import WORDS, words_tokenizer

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


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return hf.AutoTokenizer.from_pretrained(words_tokenizer(tmp_path))


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


def test_dialogues_without_a_place_for_each_turn_are_refused(tokenizer: Any) -> None:
    with pytest.raises(InputRefused, match="the tokenizer has no chat template"):
        chat_tokens(tokenizer)
    tokenizer.chat_template = "{{ messages | length }} {% for m in messages %}{{ m.content }} {% endfor %}"
    with pytest.raises(InputRefused, match="changes earlier turns, so that message 2 has no fixed place"):
        chat_tokens(tokenizer)(DIALOGUE)
    tokenizer.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(InputRefused, match=r"the chat template refuses the messages .*no system"):
        chat_tokens(tokenizer)(DIALOGUE)


def test_a_decoder_begins_with_its_start_token(tokenizer: Any) -> None:
    encoder = AnswerEncoder(tokenizer, 9, 8)
    rows = ({"prompt": "a film", "completion": "good"}, {"prompt": "a", "completion": "very bad"})
    inputs, labels = encoder.collate([encoder.encode(row) for row in rows], [(0, 0), (0, 1)])
    assert inputs["input_ids"].tolist() == [[7, 6, 2], [7, 2, 0]]
    assert labels.tolist() == [[4, 2, -100], [5, 3, 2]]
    assert inputs["decoder_input_ids"].tolist() == [[8, 4, 0], [8, 5, 3]]
