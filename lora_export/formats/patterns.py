"""Regular expressions that come with an adapter, matched as Python matches them, in bounded time and memory.

Python's own matcher backtracks: `(a+)+b` in a config would keep it busy for years. This one moves a *set* of positions
through the name, so that it follows no path twice, and it counts its steps. It refuses what needs backtracking
(references to groups, look-around).

It is ours because no library gives Python's answers within bounds. google-re2 answers differently for `{,2}`,
`[a[:digit:]]` and, in names outside ASCII, `\\w` and `\\d`; the time limit of `regex` leaves out compilation, in which
`(?:(?:a{99}b){1000}){1000}` takes more than 7 GB.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from lora_export.errors import InputRefused
from lora_export.isolation.limits import MAX_GROUP_DEPTH, MAX_PATTERN, MAX_PATTERNS, MAX_STEPS

TextPositions = frozenset[int]
Matcher = Callable[[str, TextPositions], TextPositions]  # (name, where a match may begin) -> where it may end

TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?:|\{\d*,?\d*\}\??|[*+?]\??|.", re.DOTALL)
REPEAT = re.compile(r"(?P<sign>[*+?])\??|\{(?P<low>\d*)(?P<comma>,?)(?P<high>\d*)\}\??")
NOT_A_CHARACTER = re.compile(r"\\[0-9A-Za-z](?<![dDsSwW])|\{,?\}\??|[*+?].*", re.DOTALL)
PLAIN = re.compile(r"(?:[\w.-]|\\[.d-])*", re.ASCII)  # one character after the other: Python's matcher is safe


class Patterns:
    r"""A table from patterns to values, in the file's order.

    A pattern matches a module's whole name, or its end after a dot, as in PEFT:
    `re.match(rf"(.*\.)?({pattern})$", name)`; with `whole`, only the whole name. Raises InputRefused for a pattern that
    is not a regular expression, or that cannot be matched within bounds.
    """

    def __init__(self, table: Mapping[str, Any], *, source: str = "the config", whole: bool = False):
        self.source, self.whole = source, whole
        self.steps = 0
        if len(table) > MAX_PATTERNS:  # each is compiled
            raise self._refused(f"{len(table):,} patterns; at most {MAX_PATTERNS:,} are read")
        self.entries = [(self._compiled(pattern), value) for pattern, value in table.items()]

    def values(self, module: str) -> list[Any]:
        """Return the values of the patterns that match a name. Raises InputRefused after MAX_STEPS in all."""
        return [value for matches, value in self.entries if matches(module)]

    def _compiled(self, pattern: str) -> Callable[[str], bool]:
        if len(pattern) > MAX_PATTERN:
            raise self._refused(
                f"a pattern of {len(pattern)} characters is longer than {MAX_PATTERN}: {pattern[:50]!r}..."
            )
        try:
            by_python = re.compile(rf"({pattern})$" if self.whole else rf"(.*\.)?({pattern})$")
        except (re.error, OverflowError, RecursionError) as error:
            raise self._refused(f"the pattern {pattern!r} is not a regular expression: {error}") from error
        if PLAIN.fullmatch(pattern):

            def matches_plainly(name: str) -> bool:
                self._count(1 + len(name) // 64)
                return by_python.match(name) is not None

            return matches_plainly
        ends = _Parser(pattern, self._count, self._refused).whole()

        def matches(name: str) -> bool:
            after_dots = [] if self.whole else [at + 1 for at, character in enumerate(name) if character == "."]
            return len(name) in ends(name, frozenset([0, *after_dots]))

        return matches

    def _count(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise self._refused(
                "these patterns take too long to match. Save the adapter with patterns that are its modules' names"
            )

    def _refused(self, why: str) -> InputRefused:
        return InputRefused(f"{self.source}: {why}")


class _Parser:
    """Recursive descent: alternatives are sequences of atoms, and each atom may be repeated."""

    def __init__(self, pattern: str, count: Callable[[int], None], refused: Callable[[str], InputRefused]):
        self.pattern, self.count, self.refused, self.depth = pattern, count, refused, 0
        self.tokens = TOKEN.findall(pattern)[::-1]  # the next one is the last

    def whole(self) -> Matcher:
        matcher = self.alternatives()
        if self.tokens:  # a bracket too many, which Python would pair with the one around the pattern
            raise self.unsupported()
        return matcher

    def alternatives(self) -> Matcher:
        branches = [self.sequence()]
        while self.take("|"):
            branches.append(self.sequence())
        return lambda name, positions: frozenset().union(*(branch(name, positions) for branch in branches))

    def sequence(self) -> Matcher:
        parts = []
        while self.tokens and self.tokens[-1] not in ("|", ")"):
            parts.append(self.repeated_atom())

        def ends(name: str, positions: TextPositions) -> TextPositions:
            for part in parts:
                positions = part(name, positions)
            return positions

        return ends

    def repeated_atom(self) -> Matcher:
        matcher = self.atom()
        repeat = REPEAT.fullmatch(self.tokens[-1]) if self.tokens else None
        if repeat is None or not (repeat["sign"] or repeat["low"] or repeat["high"] or repeat["comma"]):
            return matcher
        self.tokens.pop()
        if repeat["sign"]:
            return _repeated(matcher, *{"*": (0, None), "+": (1, None), "?": (0, 1)}[repeat["sign"]])
        low = int(repeat["low"] or 0)
        high = repeat["high"] if repeat["comma"] else low
        return _repeated(matcher, low, None if high == "" else int(high))

    def atom(self) -> Matcher:
        token = self.tokens.pop()
        if token in ("(", "(?:"):
            return self.group()
        if token in ("^", "$"):
            return lambda name, positions: positions & {len(name) if token == "$" else 0}
        if NOT_A_CHARACTER.fullmatch(token):
            raise self.unsupported()
        return self.character(token)

    def group(self) -> Matcher:
        self.depth += 1
        if self.depth > MAX_GROUP_DEPTH or (self.tokens and self.tokens[-1].startswith("?")):  # flags, look-around
            raise self.unsupported()
        matcher = self.alternatives()
        self.depth -= 1
        if not self.take(")"):
            raise self.unsupported()
        return matcher

    def character(self, token: str) -> Matcher:
        is_one = re.compile(token).fullmatch

        def ends(name: str, positions: TextPositions) -> TextPositions:
            self.count(1 + len(positions))
            return frozenset(at + 1 for at in positions if at < len(name) and is_one(name[at]))

        return ends

    def take(self, token: str) -> bool:
        if not self.tokens or self.tokens[-1] != token:
            return False
        self.tokens.pop()
        return True

    def unsupported(self) -> InputRefused:
        return self.refused(
            f"the pattern {self.pattern!r} contains more than names, character classes, repetitions and alternatives"
        )


def _repeated(matcher: Matcher, low: int, high: int | None) -> Matcher:
    def ends(name: str, positions: TextPositions) -> TextPositions:
        for _ in range(low):
            further = matcher(name, positions)
            if further == positions:  # further rounds would not change it
                break
            positions = further
        reached = fresh = positions
        rounds = 0
        while fresh and (high is None or rounds < high - low):
            fresh = matcher(name, fresh) - reached
            reached |= fresh
            rounds += 1
        return reached

    return ends
