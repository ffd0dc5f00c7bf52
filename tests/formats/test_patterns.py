"""The patterns of a config: Python's own answers, in a time that a hostile pattern cannot stretch."""

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


def matches(pattern: str, name: str) -> bool:
    return Patterns({pattern: 1}).values(name) == [1]


def by_python(pattern: str, name: str) -> bool:
    """As PEFT matches."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
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
def test_a_pattern_matches_a_whole_name_or_its_end_after_a_dot(pattern, matching, others):
    assert [name for name in [*matching, *others] if matches(pattern, name)] == matching


def test_all_matches_come_in_the_files_order():
    table = Patterns({"up": 1, r"blocks\..*": 2, "down": 3, ".*up": 4})
    assert table.values("blocks.0.up") == [1, 2, 4]
    assert table.values("norm") == []


PIECES = st.sampled_from(
    [*"aab.^$|()", "[ab]", "[^a]", "[]a]", r"\.", r"\w", "*", "+", "?", "*?", "{2}", "{,2}", "{1,}"]
)


@given(st.lists(PIECES, max_size=8).map("".join), st.text("ab.", max_size=6))
@settings(max_examples=500, deadline=None)
@example("a)|(b", "x.b")  # only valid within the brackets that are put around it
@example("(a|b){2}?", "ab")
@example("a{}", "a{}")
@example("(a*){3}", "aaa")
@example("(a|){2,3}b", "aab")
def test_what_is_not_refused_matches_as_python_does(pattern, name):
    try:
        ours = matches(pattern, name)
    except InputRefused:
        return
    assert ours == by_python(pattern, name)
    assert bool(Patterns({pattern: 1}, whole=True).values(name)) == (re.fullmatch(pattern, name) is not None)


# Where google-re2 and regex give another answer than Python.
@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        *[("a{,2}", "aa"), ("a{,}", "aaa"), ("[a[:digit:]]", "5"), ("[a[:digit:]]", "d]"), (r"\w", "é"), (r"\d", "٣")],
        *[("a{e}", "b"), ("a{e}", "a{e}"), (r"\W", "é"), ("a{1001}", "a" * 1001), ("((a?){50}){50}", "aa")],
    ],
)
def test_what_libraries_match_differently_matches_as_in_python(pattern, name):
    try:
        ours = matches(pattern, name)
    except InputRefused:
        assert pattern == "a{,}"
        return
    assert ours == by_python(pattern, name)


def test_nearly_every_common_pattern_is_accepted():
    # A matcher that refuses everything would pass the tests above.
    for pattern in ("a|b", "(a)(b)", "(a|b)*", "a+?", "[^a]{2,}", "((a?)b)*", r"\w\.\d", "a|", "()"):
        assert matches(pattern, "ab") == by_python(pattern, "ab")


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+b", "(a|a)*b", "(.*a){20}b", "((a?){50}){50}b", "a?" * 30 + "a" * 30, "(.*)*" * 50 + "b", "(a*)*" * 9],
)
@pytest.mark.parametrize("name", ["a" * 60, "a." * 500])
@pytest.mark.fault(18)
def test_no_pattern_takes_long(pattern, name):
    begun = time.process_time()
    try:
        matches(pattern, name)
    except InputRefused as error:
        assert "take too long to match" in str(error)
    assert time.process_time() - begun < 5


@pytest.mark.fault(18)
def test_many_patterns_on_many_names_do_not_take_long(monkeypatch):
    monkeypatch.setattr(patterns, "MAX_STEPS", 1000)
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
def test_what_needs_backtracking_or_flags_is_refused(pattern):
    with pytest.raises(InputRefused, match=re.escape(f"the pattern {pattern!r} contains more than names")):
        Patterns({pattern: 1})


@pytest.mark.parametrize("pattern", ["(", "a)", "*a", "a**", "[a", "a{2}{3}", "(" * 400, "a{99999999999999999999}"])
def test_what_is_not_a_regular_expression_is_refused(pattern):
    with pytest.raises(InputRefused, match="is not a regular expression"):
        Patterns({pattern: 1})


def test_a_too_long_pattern_is_refused_before_it_is_parsed():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputRefused, match="a pattern of 1001 characters is longer than 1000: '"):
            Patterns({"[[" * 500 + "a": 1})
