"""What every HTML report shows: facts in one line, factors, bars, adapters, files."""

from __future__ import annotations

from typing import Any

import pytest

from lora_export.report import html_facts


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "none"),
        (True, "yes"),
        (False, "no"),
        (3, "3"),
        ("cpu", "cpu"),
        ([2, 300], "2 x 300"),
        (["a", None], "a, none"),
        ({"ids": [2, 7], "mask": True}, "ids 2 x 7, mask yes"),
        ([], ""),
    ],
)
def test_a_fact_is_one_line_of_text(value: Any, text: str) -> None:
    assert html_facts.inline(value) == text


@pytest.mark.parametrize(
    ("factor", "text"), [(1.3449, "× 1.34"), (0.5, "× 0.5"), (999, "× 999"), (8494, "× 8,490"), (1e6, "× 1,000,000")]
)
def test_a_factor_has_three_digits(factor: float, text: str) -> None:
    assert html_facts.times(factor) == text


@pytest.mark.parametrize(("used", "width"), [(0.5, 50.0), (0.0, 2.0), (1.0, 100.0), (17.0, 100.0), (0.33333, 33.3)])
def test_a_bar_is_full_at_the_limit_and_never_invisible(used: float, width: float) -> None:
    assert html_facts.bar_width(used) == width


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], ""),
        (["adapter"], "its adapter"),
        (["english"], "its adapter “english”"),
        (["en", "fr"], "its adapters “en” and “fr”"),
        (["en", "fr", "de"], "its adapters “en”, “fr” and “de”"),
        (["en", "adapter"], "its 2 adapters"),
    ],
)
def test_adapters_are_named_where_the_name_is_one(names: list[str], text: str) -> None:
    assert html_facts.with_adapters([{"name": name} for name in names]) == text


@pytest.mark.parametrize(
    ("candidate", "name"), [("out/merged", "merged"), ({"path": "out/model.onnx"}, "model.onnx"), ({}, "")]
)
def test_the_candidate_is_called_by_its_file_name(candidate: Any, name: str) -> None:
    assert html_facts.candidate_name({"candidate": candidate}) == name


def test_a_run_without_facts_has_no_candidate_adapters_or_files() -> None:
    assert html_facts.candidate_name({}) == ""
    assert html_facts.adapters_of({}) == html_facts.adapters_of({"adapters": "english"}) == []
    assert html_facts.adapters_of({"adapters": [{"name": "en"}, "fr"]}) == [{"name": "en"}]
    assert html_facts.files({"candidate": "merged", "model": "base"}) == []


def test_every_file_that_was_read_is_listed_with_its_hash() -> None:
    about = {
        "candidate": {"path": "m.onnx", "sha256": {"m.onnx": "aa", "m.data": "bb"}},
        "model": {"source": "base", "sha256": "cc"},
        "adapters": [{"name": "en", "sha256": "dd", "weight": 1}, {"name": "fr", "sha256": "ee", "weight": 0.25}],
    }
    assert html_facts.files(about) == [
        ("candidate", "m.onnx", "aa"),
        ("candidate", "m.data", "bb"),
        ("model's weights", "base", "cc"),
        ("adapter", "en", "dd"),
        ("adapter, × 0.25", "fr", "ee"),
    ]


def test_facts_leave_out_what_is_shown_elsewhere() -> None:
    about = {"candidate": "m", "model": "b", "command": [], "created": "today", "inputs": {}, "adapters": [], "seed": 3}
    assert html_facts.facts(about) == [("seed", "3")]
