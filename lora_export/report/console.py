"""Lines and tables on the terminal: no number in them is cut, and no name in them is markup."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import TextIO

from rich.console import Console
from rich.text import Text

from lora_export.errors import one_line, printable


def console(file: TextIO | None = None) -> Console:
    """A console on stdout, plain where that is no terminal. It never reads markup in names that come from files."""
    return Console(file=file, soft_wrap=True, markup=False, highlight=False, emoji=False)


def print_table(to: Console, rows: Sequence[Sequence[str]], marked: Iterable[int] = ()) -> None:
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


def print_line(to: Console, line: str, *, style: str = "") -> None:
    """Print a line that the console does not break, without control characters."""
    to.print(Text(printable(line), style=style), soft_wrap=True)


def print_wrapped(to: Console, line: str, style: str) -> None:
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
