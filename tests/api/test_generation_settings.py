"""The configs beside a graph tell how its texts start, go on and end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers as hf

from lora_export.api.generation_settings import GenerationSettings
from lora_export.errors import InputRefused
from lora_export.runtime.generation.loop import NO_RULES, Sampling, TokenRules

SMALL = {"vocab_size": 40, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2} | {
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 8,
    "decoder_ffn_dim": 8,
    "max_target_positions": 16,
    "pad_token_id": 0,
}
SPEECH = {
    "lang_to_id": {"<|en|>": 11, "<|de|>": 12},
    "task_to_id": {"transcribe": 21, "translate": 22},
    "no_timestamps_token_id": 30,
}


def settings(folder: Path, *, generation: Any = None, model: Any = None, genai: Any = None) -> GenerationSettings:
    files = {"generation_config.json": generation, "config.json": model, "genai_config.json": genai}
    for name, content in files.items():
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return GenerationSettings(folder)


def test_first_config_that_has_a_value_counts(tmp_path: Path) -> None:
    own = settings(
        tmp_path,
        generation={"eos_token_id": 3, "vocab_size": None},
        model={"eos_token_id": 4, "pad_token_id": 5, "text_config": {"vocab_size": 60}},
        genai={"model": {"pad_token_id": 6, "bos_token_id": 7}},
    )
    assert (own.end_tokens, own.padding, own.vocabulary, own.value("bos_token_id")) == (frozenset({3}), 5, 60, 7)


@pytest.mark.parametrize(
    ("encoder", "given", "first"), [("vit", [7, 8], [1, 7, 8]), ("vit", [1, 7], [1, 7]), ("donut-swin", [7, 8], [7, 8])]
)
def test_the_start_token_is_before_given_ones(encoder: str, given: list[int], first: list[int], tmp_path: Path) -> None:
    model = {"decoder_start_token_id": 1, "encoder": {"model_type": encoder}}
    assert settings(tmp_path, model=model).first_tokens(given) == first


def test_texts_end_as_the_first_config_says(tmp_path: Path) -> None:
    assert settings(tmp_path, generation={"eos_token_id": [3, 9]}, model={"eos_token_id": 4}).end_tokens == {3, 9}
    assert settings(tmp_path, generation={}, model={"eos_token_id": 4}).end_tokens == frozenset()


def test_without_configs_nothing_is_known(tmp_path: Path) -> None:
    own = settings(tmp_path)
    assert (own.end_tokens, own.padding, own.vocabulary, own.rules) == (frozenset(), 0, None, NO_RULES)
    with pytest.raises(InputRefused, match=r"no config in .* has a decoder_start_token_id"):
        _ = own.start_token


def test_rules_are_those_of_the_first_config(tmp_path: Path) -> None:
    generation = {
        "repetition_penalty": 1.1,
        "no_repeat_ngram_size": 3,
        "forced_bos_token_id": 0,
        "forced_eos_token_id": [2, 3],
        "suppress_tokens": [-1, 5],
        "begin_suppress_tokens": [6],
    }
    expected = TokenRules(1.1, 3, forced_bos=0, forced_eos=(2, 3), suppress=(5,), begin_suppress=(6,))
    assert settings(tmp_path, generation=generation, model={"repetition_penalty": 9.0}).rules == expected


@pytest.mark.parametrize(
    ("generation", "sampling", "named"),
    [
        (
            {"num_beams": 4, "min_length": 0, "min_new_tokens": 2, "bad_words_ids": None, "top_k": 50, "top_p": 0.8},
            Sampling(),
            ["num_beams 4", "min_new_tokens 2"],
        ),
        (
            {"stop_strings": ["###"], "exponential_decay_length_penalty": [9, 1.5], "token_healing": False},
            Sampling(),
            ["stop_strings ['###']", "exponential_decay_length_penalty [9, 1.5]"],
        ),
        ({"top_k": 20, "top_p": 0.8, "min_p": 0.0}, Sampling(0.7), ["top_k 20", "top_p 0.8"]),
        ({"top_k": 0, "top_p": 0.8, "min_p": 0.1}, Sampling(0.7, top_p=0.9), ["min_p 0.1"]),
        ({"do_sample": True, "temperature": 0.6, "top_k": 20}, Sampling(), ["do_sample True", "temperature 0.6"]),
        ({"do_sample": True, "temperature": 0.6}, Sampling(0.6), []),
        ({"do_sample": False, "temperature": 0.6}, Sampling(), []),
    ],
)
def test_what_is_not_done_is_named(
    generation: dict[str, Any], sampling: Sampling, named: list[str], tmp_path: Path
) -> None:
    assert settings(tmp_path, generation=generation).not_done(sampling) == named


@pytest.mark.parametrize(
    ("generation", "new_tokens", "named"),
    [
        ({"max_length": 448}, 128, ["max_length 448"]),
        ({"max_length": 20, "max_new_tokens": 256}, 128, ["max_new_tokens 256"]),
        ({"max_new_tokens": 128}, 128, []),
        ({"max_length": 448, "max_new_tokens": 256}, None, []),  # the run states its own
    ],
)
def test_another_length_of_texts_is_named(
    generation: dict[str, Any], new_tokens: int | None, named: list[str], tmp_path: Path
) -> None:
    assert settings(tmp_path, generation=generation).not_done(Sampling(), new_tokens) == named


@pytest.mark.parametrize(("kind", "length"), [("phi3", 4096), ("llama", None)])
def test_tokens_of_phi_3_are_computed_again(kind: str, length: int | None, tmp_path: Path) -> None:
    model = {"model_type": kind, "original_max_position_embeddings": 4096}
    assert settings(tmp_path, generation={}, model=model).recomputed_beyond == length


def test_decoder_starts_with_its_token(tmp_path: Path) -> None:
    assert settings(tmp_path, model={"decoder_start_token_id": 0, "bos_token_id": 1}).start_token == 0
    assert settings(tmp_path, model={"bos_token_id": 1}).start_token == 1


def test_speech_starts_with_language_and_task(tmp_path: Path) -> None:
    own = settings(tmp_path, generation=SPEECH | {"decoder_start_token_id": 1})
    for name in ("de", "<|de|>", "German"):
        assert own.speech_start(name) == [1, 12, 21, 30]
    assert own.speech_start(translate=True) == [1, None, 22, 30]
    with pytest.raises(InputRefused, match="no token of the language 'fr'; it has: de, en"):
        own.speech_start("fr")


@pytest.mark.parametrize(
    ("generation", "given"),
    [
        ({"forced_decoder_ids": [[1, 30]], "no_timestamps_token_id": 30}, {}),  # a model of English
        ({"no_timestamps_token_id": 30}, {}),
        ({}, {}),
        (SPEECH | {"language": "german", "task": "transcribe"}, {}),  # a fine-tuned model
        (SPEECH | {"language": "<|en|>", "task": "translate"}, {}),
        (SPEECH | {"language": "en", "task": "translate"}, {"language": "de"}),
        (SPEECH | {"forced_decoder_ids": [[1, 12], [2, 22], [3, 30]]}, {}),
        (SPEECH | {"forced_decoder_ids": [[1, 12], [2, 22], [3, 30]]}, {"language": "en"}),
        (SPEECH | {"forced_decoder_ids": [[1, 12], [2, 21]], "language": "en"}, {}),
    ],
)
def test_speech_starts_as_the_configs_ask_for(generation: Any, given: Any, tmp_path: Path) -> None:
    model = hf.WhisperForConditionalGeneration(hf.WhisperConfig(**SMALL))
    config = hf.GenerationConfig(decoder_start_token_id=1, return_timestamps=False, **generation | given)
    expected = model._retrieve_init_tokens(None, 1, config, model.config, 1, {})
    own = settings(tmp_path, generation={"decoder_start_token_id": 1, **generation}, model={"model_type": "whisper"})
    assert own.speech_start(**given) == expected[0].tolist()


def test_speech_of_one_language_cannot_translate(tmp_path: Path) -> None:
    own = settings(tmp_path, generation={"decoder_start_token_id": 1})
    assert own.languages == {}
    assert own.speech_start() == [1]
    with pytest.raises(InputRefused, match="no token for translating: it only transcribes"):
        own.speech_start(translate=True)


@pytest.mark.parametrize("value", [10**30, -1, "a", [], {"a": 1}, 1e999, True])
def test_values_that_no_model_has_are_not_read(tmp_path: Path, value: Any) -> None:
    names = ("pad_token_id", "eos_token_id", "vocab_size", "suppress_tokens", "repetition_penalty", "lang_to_id")
    own = settings(tmp_path, generation=dict.fromkeys(names, value))
    np.array([own.padding, own.vocabulary or 0, *own.end_tokens, *own.rules.suppress], np.int64)
    assert own.padding in (0, 1) and abs(own.rules.repetition_penalty) <= 1 and not set(own.languages) - {"a"}
