"""What the files of an adapter record beside its tensors."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lora_export.report.adapter_facts import adapter_facts
from support.written import adapter_of, low_rank


def facts(**metadata: Any) -> list[tuple[str, str]]:
    return list(adapter_facts(adapter_of({"fc": low_rank(2, 2, 1)}, metadata=metadata)))


def test_scales_and_plain_fields_are_shown() -> None:
    adapter = adapter_of(
        {"fc": low_rank(2, 2, 1)}, scale_source="alpha / rank", metadata={"r": 2, "task_type": "X", "more": [1]}
    )
    assert list(adapter_facts(adapter)) == [("scales", "alpha / rank"), ("r", "2"), ("task_type", "X")]


def test_trigger_words_and_frequent_tags_are_found_in_a_header() -> None:
    tags = {"10_a": {"ohwx ": 7, "a dog": 2}, "5_b": {"ohwx": 1, "cat": 9, "wrong": "many"}, "odd": 3}
    header = {
        "modelspec.trigger_phrase": "ohwx dog",
        "modelspec.title": "dogs",
        "ss_output_name": "dogs",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_tag_frequency": json.dumps(tags),
    }
    assert facts(header=header) == [
        ("title", "dogs"),
        ("trigger words", "ohwx dog"),
        ("trained for", "sdxl_base_v1-0"),
        ("most frequent tags", "cat, ohwx, a dog"),
        ("header", "5 entries (as_json= lists them)"),
    ]


@pytest.mark.parametrize("tags", ["{", "[1]", '{"a": 1}', '{"a": {"b": "c"}}', "[" * 100_000, "x" * 2_000_000])
def test_damaged_tags_are_left_out(tags: str) -> None:
    assert facts(header={"ss_tag_frequency": tags}) == [("header", "1 entries (as_json= lists them)")]


def test_long_values_are_shortened() -> None:
    assert facts(note="x" * 1000) == [("note", "x" * 100 + "...")]
