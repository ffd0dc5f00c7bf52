"""Regular expressions that came with an adapter, matched within bounds.

Python's own matcher goes back and tries again: `(a+)+b` in a config would keep it busy for years. Here a
pattern moves a *set* of places through the name, so that no way is gone twice, and the work is counted.
What cannot be followed so (references to groups, looking around) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from lora_export.errors import InputRefused

LONGEST = 1000  # characters of a pattern; modules' names have a tenth of it
DEEPEST = 20  # groups within groups
MOST_WORK = 10_000_000  # steps for one table of patterns and all modules, some seconds; thousandths of it are usual

Places = frozenset[int]
Matcher = Callable[[str, Places], Places]  # of a name, and where to begin: where it may end

TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?:|\{\d*,?\d*\}\??|[*+?]\??|.", re.DOTALL)
REPEAT = re.compile(r"(?P<sign>[*+?])\??|\{(?P<low>\d*)(?P<comma>,?)(?P<high>\d*)\}\??")
NO_CHARACTER = re.compile(r"\\[0-9A-Za-z](?<![dDsSwW])|\{,?\}\??|[*+?].*", re.DOTALL)
PLAIN = re.compile(r"(?:[\w.-]|\\[.d-])*", re.ASCII)  # one character after the other: nothing to go back for


class Patterns:
    """A table of patterns and what they stand for, in the file's order.

    A pattern fits a module's whole name, or its end behind a dot: `re.match(rf"(.*\\.)?({pattern})$", name)`,
    as PEFT has it. Raises InputRefused for a pattern that is none, or that cannot be matched within bounds.
    """

    def __init__(self, table: Mapping[str, Any], *, source: str = "the config"):
        self.source = source
        self.work = 0
        self.entries = [(self._parsed(pattern), value) for pattern, value in table.items()]

    def values(self, module: str) -> list[Any]:
        """What the patterns that fit the name stand for. Raises InputRefused when all the names took too long."""
        return [value for fits, value in self.entries if fits(module)]

    def _parsed(self, text: str) -> Callable[[str], bool]:
        if len(text) > LONGEST:
            raise self._refused(f"a pattern of {len(text)} characters is longer than {LONGEST}: {text[:50]!r}...")
        try:
            whole = re.compile(rf"(.*\.)?({text})$")
        except (re.error, OverflowError, RecursionError) as error:
            raise self._refused(f"the pattern {text!r} is no regular expression: {error}") from error
        if PLAIN.fullmatch(text):

            def fits_plainly(name: str) -> bool:
                self._spend(1 + len(name) // 64)
                return whole.match(name) is not None

            return fits_plainly
        moves = _Parser(text, self._spend, self._refused).everything()

        def fits(name: str) -> bool:
            behind_dots = [place + 1 for place, character in enumerate(name) if character == "."]
            return len(name) in moves(name, frozenset([0, *behind_dots]))

        return fits

    def _spend(self, steps: int) -> None:
        self.work += steps
        if self.work > MOST_WORK:
            raise self._refused(
                "these patterns take too long to match. Save the adapter with patterns that name its modules plainly"
            )

    def _refused(self, why: str) -> InputRefused:
        return InputRefused(f"{self.source}: {why}")


class _Parser:
    """Recursive descent: an alternation of sequences of atoms, each perhaps repeated."""

    def __init__(self, text: str, spend: Callable[[int], None], refused: Callable[[str], InputRefused]):
        self.text = text
        self.tokens = TOKEN.findall(text)[::-1]  # the next one is the last
        self.spend = spend
        self.refused = refused
        self.depth = 0

    def everything(self) -> Matcher:
        matcher = self.alternatives()
        if self.tokens:  # a bracket too many, which Python would pair with the one around the pattern
            raise self.beyond()
        return matcher

    def alternatives(self) -> Matcher:
        branches = [self.sequence()]
        while self.take("|"):
            branches.append(self.sequence())
        return lambda name, places: frozenset().union(*(branch(name, places) for branch in branches))

    def sequence(self) -> Matcher:
        parts = []
        while self.tokens and self.tokens[-1] not in ("|", ")"):
            parts.append(self.atom())

        def moves(name: str, places: Places) -> Places:
            for part in parts:
                places = part(name, places)
            return places

        return moves

    def atom(self) -> Matcher:
        token = self.tokens.pop()
        if token in ("(", "(?:"):
            self.depth += 1
            if self.depth > DEEPEST or (self.tokens and self.tokens[-1].startswith("?")):  # flags, looking around
                raise self.beyond()
            matcher = self.alternatives()
            self.depth -= 1
            if not self.take(")"):
                raise self.beyond()
        elif token in ("^", "$"):
            matcher = _anchor(at_end=token == "$")
        else:
            if NO_CHARACTER.fullmatch(token):
                raise self.beyond()
            matcher = self.character(token)
        repeat = REPEAT.fullmatch(self.tokens[-1]) if self.tokens else None
        if repeat is None or not (repeat["sign"] or repeat["low"] or repeat["high"] or repeat["comma"]):
            return matcher
        self.tokens.pop()
        low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(repeat["sign"]) or _limits(repeat)
        return _repeated(matcher, low, high)

    def character(self, token: str) -> Matcher:
        is_one = re.compile(token).fullmatch

        def moves(name: str, places: Places) -> Places:
            self.spend(1 + len(places))
            return frozenset(place + 1 for place in places if place < len(name) and is_one(name[place]))

        return moves

    def take(self, token: str) -> bool:
        if not self.tokens or self.tokens[-1] != token:
            return False
        self.tokens.pop()
        return True

    def beyond(self) -> InputRefused:
        return self.refused(
            f"the pattern {self.text!r} has more to it than names, character classes, repetitions and alternatives"
        )


def _anchor(*, at_end: bool) -> Matcher:
    return lambda name, places: places & {len(name) if at_end else 0}


def _limits(repeat: re.Match[str]) -> tuple[int, int | None]:
    low = int(repeat["low"] or 0)
    if not repeat["comma"]:
        return low, low
    return low, int(repeat["high"]) if repeat["high"] else None


def _repeated(matcher: Matcher, low: int, high: int | None) -> Matcher:
    def moves(name: str, places: Places) -> Places:
        for _ in range(low):
            further = matcher(name, places)
            if further == places:  # and so it would stay
                break
            places = further
        reached = fresh = places
        rounds = 0
        while fresh and (high is None or rounds < high - low):
            fresh = matcher(name, fresh) - reached
            reached |= fresh
            rounds += 1
        return reached

    return moves
