"""Lines and tables on the terminal: no number in them is cut, and no name in them is markup."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from lora_export.errors import one_line, printable

if TYPE_CHECKING:
    from rich.console import Console


class PlainConsole:
    """What a report uses of rich's Console, for a stream without colours. A merge in a pipe does not import rich."""

    is_terminal = False
    width = 0  # no line is broken

    def __init__(self, file: IO[str]) -> None:
        self.file = file

    def print(self, text: str, **_style: Any) -> None:
        """Write a line as it is."""
        print(text, file=self.file, flush=True)


AnyConsole: TypeAlias = "Console | PlainConsole"


def console(file: IO[str] | None = None) -> AnyConsole:
    """A console on stdout, plain where that is no terminal. It never reads markup in names that come from files."""
    file = sys.stdout if file is None else file
    if is_no_terminal(file):
        return PlainConsole(file)
    from rich.console import Console

    return Console(file=file, soft_wrap=True, markup=False, highlight=False, emoji=False)


def is_no_terminal(file: IO[str] | None) -> bool:
    """Whether this is certainly no terminal for rich, which need not be imported then."""
    if file is None or getattr(file, "closed", False) or {"FORCE_COLOR", "TTY_COMPATIBLE"} & os.environ.keys():
        return False
    return not (hasattr(file, "isatty") and file.isatty())  # a program may have put another object there


def print_table(to: AnyConsole, rows: Sequence[Sequence[str]], marked: Iterable[int] = ()) -> None:
    """Print rows of cells, of which the first is the header; none where there is no other row."""
    # Not rich's Table: it cuts cells on a narrow terminal and in a pipe, and a cut number is a wrong number.
    if len(rows) < 2:
        return
    rows = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for number, (first, *others) in enumerate(rows):
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        style = "dim" if number == 0 else "yellow" if number in marked else ""
        print_line(to, "  ".join(cells).rstrip(), style=style)


def print_line(to: AnyConsole, line: str, *, style: str = "") -> None:
    """Print a line that the console does not break, without control characters."""
    print_parts(to, (line, style))


def print_parts(to: AnyConsole, *parts: tuple[str, str]) -> None:
    """Print a line of parts, each with its style, as `print_line` does."""
    if isinstance(to, PlainConsole):
        to.print("".join(printable(text) for text, _ in parts))
        return
    from rich.text import Text

    to.print(Text.assemble(*((printable(text), style) for text, style in parts)), soft_wrap=True)


def print_wrapped(to: AnyConsole, line: str, style: str) -> None:
    """Print a line that is broken between words on a terminal, and whole elsewhere."""
    for part in _wrapped(printable(line), to.width) if to.is_terminal else [line]:
        print_line(to, part, style=style)


def _wrapped(line: str, width: int) -> list[str]:
    """The line broken between words, continued with a deeper indent.

    The terminal itself would break it anywhere, also within a number.
    """
    indent = len(line) - len(line.lstrip(" -"))
    wrapped = textwrap.wrap(
        line, width, subsequent_indent=" " * (indent + 2), break_long_words=False, break_on_hyphens=False
    )
    return wrapped if len(line) > width else [line]
