"""How long texts may be, by a model's position tables, and the one long text that passes its sliding window."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from torch import nn

from lora_export.models import text_lengths
from lora_export.models.text_lengths import LONG, PAST_WINDOW
from support.small_models import MODELS, TEXT

TEXTS, BOTH = {"batch", "sequence"}, {"batch", "sequence", "target"}


def lengths_of(config: Any, symbols: set[str] = TEXTS, architecture: str = "") -> text_lengths.TextLengths:
    cls = getattr(transformers, architecture) if architecture else transformers.AutoModel
    module = cls(config) if architecture else cls.from_config(config)
    return text_lengths.text_lengths(module, symbols)


def mistral(window: int | None, **fields: Any) -> Any:
    return transformers.MistralConfig(**TEXT, num_key_value_heads=2, sliding_window=window, **fields)


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("bert", 64),
        ("roberta", 64),  # 66 rows, of which two are before the first token
        ("gpt2", 64),
        ("opt", 2048),  # 2050 rows
        ("clip", 40),
        ("t5", None),
    ],
)
def test_position_tables_limit_the_length(name: str, most: int | None) -> None:
    architecture, config = MODELS[name]
    found = lengths_of(config(), TEXTS, architecture)
    assert found.limits["sequence"] == (0, most)
    assert found.long == {"sequence": min(LONG, most or LONG)}


def test_encoder_and_decoder_have_limits_of_their_own() -> None:
    architecture, config = MODELS["bart"]
    made = config()
    module = getattr(transformers, architecture)(made)
    module.model.decoder.embed_positions = nn.Embedding(30, 16)
    found = text_lengths.text_lengths(module, BOTH)
    assert (found.most("sequence"), found.most("target")) == (64, 30)
    assert found.long == {"sequence": 64, "target": 30}


@pytest.mark.parametrize(("window", "length"), [(None, LONG), (32, LONG), (200, 200 + PAST_WINDOW)])
def test_long_text_passes_the_sliding_window(window: int | None, length: int) -> None:
    found = lengths_of(mistral(window, max_position_embeddings=512))
    assert (found.long, found.not_judged) == ({"sequence": length}, "")


def test_window_too_long_for_a_mask_is_noted() -> None:
    found = lengths_of(mistral(100_000, max_position_embeddings=200_000))
    assert found.long == {"sequence": LONG}
    assert found.not_judged.startswith(
        "what its sliding window of 100,000 tokens leaves out. Generated texts have up to 96"
    )


def test_large_models_get_shorter_texts_and_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    config = mistral(200, max_position_embeddings=512)
    parameters = sum(each.numel() for each in transformers.AutoModel.from_config(config).parameters())
    monkeypatch.setattr(text_lengths, "MOST_WORK", 100.0 * parameters)
    found = lengths_of(config)
    assert found.long == {"sequence": LONG}
    assert found.not_judged == (
        "what its sliding window of 200 tokens leaves out. Generated texts have up to 96 tokens. Give a "
        "longer one by inputs="
    )
    monkeypatch.setattr(text_lengths, "MOST_WORK", 10.0 * parameters)
    found = lengths_of(mistral(None, max_position_embeddings=512))
    assert not found.long and found.not_judged.startswith("texts of more than 29 tokens")


def test_window_beyond_the_position_table_is_not_noted() -> None:
    found = lengths_of(mistral(200, max_position_embeddings=100))
    assert (found.long, found.not_judged) == ({"sequence": 100}, "")


def test_models_without_texts_have_no_long_text() -> None:
    found = lengths_of(MODELS["vit"][1](), {"batch"}, MODELS["vit"][0])
    assert found == text_lengths.TextLengths({}, {})
