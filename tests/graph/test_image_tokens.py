"""The record of a model's image token in a graph's metadata."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_export.errors import InputRefused
from lora_export.graph.image_tokens import IMAGE_TOKENS_KEY, ImageTokens, image_tokens_of


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
