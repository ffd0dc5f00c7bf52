"""The project speaks the field's language: no private words in code, messages, help, reports and guides."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from support import ROOT, offenders

# A private word -> the field's word for it.
INSTEAD = {
    r"referees?": "reference (fp64)",
    r"louder": 'control "scale × 1.1"',
    r"weav\w*|woven": "insert adapter nodes",
    r"told|says|said": "reports, detected, contains",
    r"stand-?ins?|standing in": "dequantised weights",
    r"everybody|whoever": "references, all runs",
    r"(?<!user )asked": "requested",
    r"ledgers?|tally|tallies": "merge report, statistics",
    r"workshops?|desks?|spares?": "backend, buffer, scratch buffer",
    r"specimens?": "example inputs",
    r"nouns?": "types",
    r"lies": "is stored, is",
    r"dear|faint|torn": "expensive, below rounding, broken",
    r"turned down|taken out again": "disabled, removed",
    r"made elsewhere": "existing graph",
}
BANNED = re.compile(rf"(?<![a-z])(?:{'|'.join(INSTEAD)})(?![a-z])")
BOUND = re.compile(r"\bthere *([=:,)]|in\b)|\bas there\b")  # as a variable may be
SUFFIXES = {".py", ".md", ".j2", ".json"}
READ = [path for path in sorted((ROOT / "lora_export").rglob("*")) if path.suffix in SUFFIXES]
READ += [ROOT / "README.md", *sorted((ROOT / "samples").glob("*.py"))]


def found(text: str) -> Iterator[str]:
    """Private words in a text, with their lines. Words of an identifier are separated by `_`."""
    for match in BANNED.finditer(text.replace("_", " ").lower()):
        number = text.count("\n", 0, match.start())
        yield f"line {number + 1}: {match[0]!r} in {text.splitlines()[number].strip()!r}"


def test_no_private_word_is_left() -> None:
    texts = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in READ}
    assert len(texts) > 300 and offenders({path: list(found(text)) for path, text in texts.items()}) == {}


def unnamed(source: str) -> list[int]:
    """The lines with a variable `there`."""
    nodes = ast.walk(ast.parse(source)) if BOUND.search(source) else ()
    return [node.lineno for node in nodes if "there" in (getattr(node, "id", ""), getattr(node, "arg", ""))]


def test_a_variable_is_named_after_what_it_holds() -> None:
    assert unnamed("there = 1\nlambda there: f(there=2)") == [1, 2, 2]
    sources = {str(path): path.read_text(encoding="utf-8") for path in READ if path.suffix == ".py"}
    assert len(sources) > 300 and offenders({path: unnamed(source) for path, source in sources.items()}) == {}


def test_private_words_are_recognised() -> None:
    text = "the referee\nbase_answers_told = 1\nan ordinary line: untold, hearsay, tornado\nwoven in"
    assert [line.partition(":")[0] for line in found(text)] == ["line 1", "line 2", "line 4"]
