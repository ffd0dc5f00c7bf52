"""The expected failures, each with the exit code of the command line.

Raise these anywhere. `lora_export.cli` turns them into a line on stderr and an exit code. A message describes what is
wrong, where, and what to do. Every other exception is a bug: it ends as a traceback with code 1, never as a verdict.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, SupportsIndex

SHOWN_PROBLEMS = 5  # problems that a message lists
ALLOCATION_FAILED = "can't allocate memory"  # in the message of PyTorch's allocator on the CPU


def printable(text: str) -> str:
    """Escape control characters other than line breaks, so that untrusted names cannot control the terminal."""
    return "\n".join(map(one_line, text.split("\n")))


def one_line(text: str) -> str:
    """Escape control characters and line breaks, so that untrusted names cannot look like a line of this program."""
    text = text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return _no_command(text) if "GITHUB_ACTIONS" in os.environ else text


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip()


class EscapedLines(str):
    """A text of several lines. Each was escaped on its own, so every line break in it is this program's."""

    __slots__ = ()


def escaped_lines(*parts: object) -> EscapedLines:
    """Join the lines of a message. Each part is one line, whatever names it contains, or EscapedLines."""
    return EscapedLines("\n".join(part if isinstance(part, EscapedLines) else one_line(str(part)) for part in parts))


def listed(problems: Sequence[object], most: int = SHOWN_PROBLEMS, indent: str = "  ") -> EscapedLines:
    """The first problems, one a line and indented, and the number of the others. For a message."""
    more = [f"{indent}and {len(problems) - most} more"] if len(problems) > most else []
    return escaped_lines(*(f"{indent}{problem}" for problem in problems[:most]), *more)


def first_of(names: Sequence[str], most: int) -> str:
    """The first names, and the number of the others: `a, b and 3 more`."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def count(number: SupportsIndex, one: str, several: str = "") -> str:
    """`1 case`, `2 cases`, `1,000 cases`; of a plural without `s`, `several` is the word."""
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"


def hint_of_name(written: str, known: Iterable[str]) -> str:
    """`; the nearest is `NAME`` of the known names, for the end of a message on an unknown one; empty without any."""
    import difflib  # most names are spelled right

    found = difflib.get_close_matches(written, list(known), n=1, cutoff=0.3)
    return f"; the nearest is `{found[0]}`" if found else ""


def duration(seconds: float) -> str:
    """`40 s`, `5 min`, `3 h 20 min`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else f"{rest} s"


def count_that_are(number: SupportsIndex, what: str) -> str:
    """`1 value that is`, `2 values that are`."""
    return f"{count(number, what)} that {'is' if number == 1 else 'are'}"


def brief(value: object, *facts: object) -> str:
    """What `repr` shows of a value that holds arrays: its type and a few facts, `Plan(72 weights changed)`."""
    return f"{type(value).__name__}({', '.join(map(str, filter(None, facts)))})"


def _no_command(line: str) -> str:
    """Escape commands of GitHub's runner: it executes `::` at the start of a line and `##[` anywhere in one."""
    line = line.replace("##[", "##\\x5b")
    return line.replace("::", "\\x3a:", 1) if line.lstrip().startswith("::") else line


class LoraExportError(Exception):
    """An expected failure. `exit_code` is the exit code of the command line.

    Each argument is one line of the message, or EscapedLines: a line break in a name is shown as an escape.
    """

    exit_code = 1

    def __init__(self, *lines: object):
        super().__init__(escaped_lines(*lines))

    @property
    def lines(self) -> EscapedLines:
        """The message, to be a part of another one."""
        return EscapedLines(self)


class WrongUsage(LoraExportError):
    """Arguments that do not go together. Messages name them as the command line spells them."""

    exit_code = 2


class InputRefused(LoraExportError):
    """An input is damaged, unknown, does not fit, or would lose too much."""

    exit_code = 3


class NotTheSame(LoraExportError):
    """Parity is not proven. `proof` has every figure, where there are any."""

    def __init__(self, *lines: object, proof: Any = None):
        super().__init__(*lines)
        self.proof = proof


class Different(NotTheSame):
    """Parity: the candidate does not compute what the PyTorch model computes."""

    exit_code = 4


class Undecided(NotTheSame):
    """Parity: this check cannot distinguish a right candidate from a wrong one."""

    exit_code = 5


class EnvironmentLacking(LoraExportError):
    """A package, provider, device or memory is missing, or was not really used."""

    exit_code = 6


class OutputFailed(LoraExportError):
    """The output could not be written: disk full, locked by another run, no permission."""

    exit_code = 7


class RuntimeRefused(LoraExportError):
    """The exporter or the runtime refused the model."""

    exit_code = 8


def refuse_unprintable(names: Iterable[str], source: str) -> None:
    """Raise InputRefused for tensor names with control characters: only an attack has such names."""
    strange = [repr(name) for name in names if not name.isprintable()]
    if strange:
        raise InputRefused(f"{source} has names with control characters: {', '.join(strange)}")


@dataclass(frozen=True)
class Misfit:
    """One tensor of an adapter that does not fit the base."""

    adapter: str
    key: str  # as spelled in the adapter's file
    problem: str
    is_conflict: bool = False  # with another change of the same tensor, rather than with the base

    def __str__(self) -> str:
        return one_line(f"{self.key}: {self.problem}")


class MatchError(InputRefused):
    """Every misfit between adapters and base, in one error. Nothing has been written.

    `targets` counts what should have matched: the tensors of the adapters, and targeted layers without tensors.
    `made_for` is the base that an adapter's own file names, by the adapter's name. The message lists the first misfits
    of each adapter, and the `remedy`; `misfits` has all of them.
    """

    def __init__(
        self,
        misfits: Iterable[Misfit],
        *,
        targets: int,
        made_for: Mapping[str, str] = MappingProxyType({}),
        remedy: str = "",
    ):
        self.misfits, self.targets, self.made_for, self.remedy = tuple(misfits), targets, made_for, remedy
        by_adapter: dict[str, list[Misfit]] = {}
        for misfit in self.misfits:
            by_adapter.setdefault(misfit.adapter, []).append(misfit)
        lines: list[str] = [f"{len(self.misfits)} of {targets} targets do not fit the base."]
        for adapter, own_misfits in by_adapter.items():
            lines += [f"  in {adapter}:", listed(own_misfits, indent="    ")]
            if base := made_for.get(adapter):
                lines.append(f"    it was trained for {base} (base_model_name_or_path in its config)")
        super().__init__(*lines, *filter(None, [remedy]))

    def with_words(self, old: str, new: str) -> MatchError:
        """The same error, with `new` in place of `old` in its misfits."""
        misfits = [replace(misfit, problem=misfit.problem.replace(old, new)) for misfit in self.misfits]
        return MatchError(misfits, targets=self.targets, made_for=self.made_for, remedy=self.remedy)

    def with_remedy(self, remedy: str) -> MatchError:
        """The same error, whose message ends with what may help."""
        return MatchError(self.misfits, targets=self.targets, made_for=self.made_for, remedy=remedy)
