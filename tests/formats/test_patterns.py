"""The patterns of a config: what Python's own matcher says of them, in a time that a hostile one cannot stretch."""

from __future__ import annotations

import re
import time
import warnings

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lora_export.errors import InputRefused
from lora_export.formats import patterns
from lora_export.formats.patterns import Patterns


def fits(pattern: str, name: str) -> bool:
    return Patterns({pattern: 1}).values(name) == [1]


@pytest.mark.parametrize(
    ("pattern", "fitting", "others"),
    [
        ("fc", ["fc", "a.fc", "a.b.fc"], ["afc", "fc.a", "f"]),
        ("h.fc", ["h.fc", "a.h.fc", "h_fc"], ["fc", "hfc"]),
        (r"blocks\.\d\.up", ["blocks.1.up", "model.blocks.9.up"], ["blocks.12.up", "blocks_1_up"]),
        (r"layers\.(1[0-9]|2[0-3])\..*q_proj", ["layers.10.a.q_proj", "m.layers.23.q_proj"], ["layers.24.q_proj"]),
        ("^model.fc", ["model.fc"], ["a.model.fc"]),
        (r".*\.(up|down)_proj$", ["a.up_proj", "a.b.down_proj"], ["up_proj", "a.gate_proj"]),
        (r"h\.[0-9]+\.fc_?\d{1,2}", ["h.10.fc_1", "h.1.fc22"], ["h..fc1", "h.1.fc123"]),
        ("(?:a|b)+?c*", ["abba", "x.bcc"], ["c", "abx"]),
        ("a{1,3}(b){,2}", ["a", "aaabb"], ["aaaa", "abbb", "bb"]),
        ("", ["", "a."], ["a"]),
    ],
)
def test_a_pattern_fits_a_whole_name_or_its_end_behind_a_dot(pattern, fitting, others):
    assert [name for name in [*fitting, *others] if fits(pattern, name)] == fitting


def test_all_that_fit_are_told_in_the_files_order():
    table = Patterns({"up": 1, r"blocks\..*": 2, "down": 3, ".*up": 4})
    assert table.values("blocks.0.up") == [1, 2, 4]
    assert table.values("norm") == []


PIECES = st.sampled_from(
    [*"aab.^$|()", "[ab]", "[^a]", "[]a]", r"\.", r"\w", "*", "+", "?", "*?", "{2}", "{,2}", "{1,}"]
)


@given(st.lists(PIECES, max_size=8).map("".join), st.text("ab.", max_size=6))
@settings(max_examples=1500, deadline=None)
@example("a)|(b", "x.b")  # only valid within the brackets that are put around it
@example("(a|b){2}?", "ab")
@example("a{}", "a{}")
@example("(a*){3}", "aaa")
@example("(a|){2,3}b", "aab")
def test_whatever_is_not_refused_is_what_pythons_matcher_says(pattern, name):
    try:
        ours = fits(pattern, name)
    except InputRefused:
        return
    assert ours == (re.match(rf"(.*\.)?({pattern})$", name) is not None)


def test_nearly_all_that_python_takes_is_taken():
    # Or the test above would hold for a matcher that refuses everything.
    for pattern in ("a|b", "(a)(b)", "(a|b)*", "a+?", "[^a]{2,}", "((a?)b)*", r"\w\.\d", "a|", "()"):
        assert fits(pattern, "ab") == (re.match(rf"(.*\.)?({pattern})$", "ab") is not None)


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+b", "(a|a)*b", "(.*a){20}b", "((a?){50}){50}b", "a?" * 30 + "a" * 30, "(.*)*" * 50 + "b", "(a*)*" * 9],
)
@pytest.mark.parametrize("name", ["a" * 60, "a." * 500])
@pytest.mark.fault(18)
def test_no_pattern_takes_long(pattern, name):
    begun = time.process_time()
    try:
        fits(pattern, name)
    except InputRefused as error:
        assert "take too long to match" in str(error)
    assert time.process_time() - begun < 5


@pytest.mark.fault(18)
def test_many_patterns_on_many_names_do_not_take_long_either(monkeypatch):
    monkeypatch.setattr(patterns, "MOST_WORK", 1000)
    table = Patterns({f"layer.{number}": number for number in range(100)})
    assert table.values("model.layer.7") == [7]
    with pytest.raises(InputRefused, match="the config: these patterns take too long to match"):
        for number in range(10):
            table.values(f"model.layer.{number}")


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a)\1",
        "(?=a)a",
        "(?!b)a",
        "(?<=a)b",
        "(?P<n>a)",
        "(?i:a)",
        r"\ba",
        r"a\Z",
        "a*+",
        "(?>a)",
        r"\x61",
        "a)|(b",
        "(" * 90 + ")" * 90,
    ],
)
def test_what_a_set_of_places_cannot_follow_is_refused(pattern):
    with pytest.raises(InputRefused, match=re.escape(f"the pattern {pattern!r} has more to it than names")):
        Patterns({pattern: 1})


@pytest.mark.parametrize("pattern", ["(", "a)", "*a", "a**", "[a", "a{2}{3}", "(" * 400, "a{99999999999999999999}"])
def test_what_is_no_regular_expression_is_refused(pattern):
    with pytest.raises(InputRefused, match="is no regular expression"):
        Patterns({pattern: 1})


def test_a_pattern_that_is_too_long_is_not_even_parsed():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputRefused, match="a pattern of 1001 characters is longer than 1000: '"):
            Patterns({"[[" * 500 + "a": 1})
