"""Which output is the next value of which input of the cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_export.errors import InputRefused
from lora_export.graph.cache_names import IMAGE_TOKENS_KEY, ImageTokens, image_tokens_of, present_by_past


def test_names_are_paired_without_their_first_part() -> None:
    inputs = ["input_ids", "past_key_values.0.key", "past_key_values.0.value", "past/1.key", "past_key_values.7.key"]
    outputs = ["logits", "present.0.value", "present.0.key", "present_1/1.key"]
    assert present_by_past(inputs, outputs) == {
        "past_key_values.0.key": "present.0.key",
        "past_key_values.0.value": "present.0.value",
        "past/1.key": "present_1/1.key",
    }


def test_states_of_one_layer_are_told_apart() -> None:
    inputs, outputs = ["past_conv.0", "past_recurrent.0"], ["present_recurrent.0", "present_conv.0"]
    assert present_by_past(inputs, outputs) == dict(zip(inputs, reversed(outputs), strict=True))


def test_state_of_one_name_is_its_own_next_value() -> None:
    assert present_by_past(["state", "x"], ["state", "y"]) == {"state": "state"}


def test_what_was_recorded_is_read() -> None:
    tokens = ImageTokens(151655, 2)
    assert image_tokens_of(tokens.properties, Path("graph")) == tokens
    assert image_tokens_of({IMAGE_TOKENS_KEY: '{"token": 5}'}, Path("graph")) == ImageTokens(5, 0)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "graph does not record the token of its images"),
        ({IMAGE_TOKENS_KEY: '{"token": -1}'}, "graph records no token of its images"),
        ({IMAGE_TOKENS_KEY: '{"token": 5, "merge": "2"}'}, "graph records no token of its images"),
        ({IMAGE_TOKENS_KEY: "{"}, "the image token in graph"),
    ],
)
def test_nonsense_is_refused(metadata: dict[str, str], message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        image_tokens_of(metadata, Path("graph"))
