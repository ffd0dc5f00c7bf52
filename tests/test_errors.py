"""Expected failures: exit codes, names from untrusted files, and the list of misfits."""

from __future__ import annotations

import pytest

from lora_export import errors
from lora_export.errors import (
    InputRefused,
    MatchError,
    Misfit,
    count,
    escaped_lines,
    first_line,
    listed,
    one_line,
    printable,
    refuse_unprintable,
)


@pytest.fixture(autouse=True)
def not_on_github(monkeypatch):
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        *(("InputRefused", 3), ("MatchError", 3), ("Different", 4), ("Undecided", 5)),
        *(("EnvironmentLacking", 6), ("OutputFailed", 7), ("RuntimeRefused", 8)),
    ],
)
def test_each_failure_has_its_exit_code(name, code):
    failure = getattr(errors, name)
    assert failure.exit_code == code and issubclass(failure, errors.LoraExportError)


def test_one_line_escapes_line_breaks_and_printable_keeps_them():
    assert one_line("a\nb\x1b[2J\u202ec") == r"a\nb\x1b[2J\u202ec"
    assert printable("a\nb\x1b[2J") == "a\nb" + r"\x1b[2J"
    assert one_line("größer α") == "größer α"


def test_an_error_without_a_message_is_told_by_its_type():
    assert first_line(ValueError("  no\nmatter")) == "no" and first_line(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_names_with_control_characters_are_refused_and_listed():
    refuse_unprintable(["fc.weight", "größe"], "the file")
    with pytest.raises(InputRefused, match=r"^the file has names with control characters: 'a\\nb', '\\x1b'$"):
        refuse_unprintable(["fc.weight", "a\nb", "\x1b"], "the file")


def test_misfits_are_listed_by_adapter():
    misfits = [Misfit("one", "a", "no such weight"), Misfit("two", "b", "x\ny"), Misfit("one", "c", "too wide")]
    error = MatchError(misfits, targets=5)
    assert error.misfits == tuple(misfits)
    assert str(error).splitlines() == [
        "3 of 5 targets do not fit the base.",
        "  in one:",
        "    a: no such weight",
        "    c: too wide",
        "  in two:",
        r"    b: x\ny",
    ]


def test_only_the_first_misfits_are_listed_and_all_are_kept():
    misfits = [Misfit("fr", f"layer {number}", "no such weight") for number in range(224)]
    error = MatchError([*misfits, Misfit("de", "x", "too wide")], targets=300, made_for={"fr": "owner/model\x1b"})
    assert str(error).splitlines() == [
        "225 of 300 targets do not fit the base.",
        "  in fr:",
        *(f"    layer {number}: no such weight" for number in range(5)),
        "    and 219 more",
        r"    it was trained for owner/model\x1b (base_model_name_or_path in its config)",
        "  in de:",
        "    x: too wide",
    ]
    assert len(error.misfits) == 225


def test_counts_have_the_number_of_their_word():
    assert [count(number, "case") for number in (0, 1, 2, 1000)] == ["0 cases", "1 case", "2 cases", "1,000 cases"]
    assert [count(number, "entry", "entries") for number in (1, 2)] == ["1 entry", "2 entries"]


def test_only_the_lines_of_a_message_break_it():
    error = InputRefused("a\nb\u2028c", listed(["d\ne", "f"], 1), escaped_lines("g", "h\x1b"))
    assert str(error).split("\n") == [r"a\nb\u2028c", r"  d\ne", "  and 1 more", "g", r"h\x1b"]
    assert str(InputRefused("before:", error.lines)) == f"before:\n{error}"
    assert str(InputRefused(f"before: {error}")) == r"before: " + str(error).replace("\n", r"\n")
