"""Tables that tests make and a README keeps: between `<!-- name -->` and `<!-- end of name -->`."""

from __future__ import annotations

import re
from pathlib import Path


def put(readme: Path, name: str, text: str) -> None:
    """Take the place of the former text of this name."""
    there = readme.read_text(encoding="utf-8")
    assert f"<!-- {name} -->" in there, f"{readme} has no place for {name}"
    readme.write_text(_between(name).sub(lambda found: f"{found[1]}\n{text}\n{found[3]}", there), encoding="utf-8")


def text(readme: Path, name: str) -> str:
    found = _between(name).search(readme.read_text(encoding="utf-8"))
    assert found, f"{readme} has no place for {name}"
    return found[2].strip()


def rows(table: str) -> dict[str, dict[str, str]]:
    """A Markdown table's cells, by what its rows and columns are called."""
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines() if line[:1] == "|"]
    head, _, *body = lines
    return {name: dict(zip(head[1:], cells, strict=True)) for name, *cells in body}


def table(cells: dict[str, dict[str, str]], corner: str) -> str:
    """The other way round."""
    head = list(next(iter(cells.values())))
    lines = [f"| {corner} | {' | '.join(head)} |", "|" + "---|" * (len(head) + 1)]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(row.values())} |" for name, row in cells.items())])


def _between(name: str) -> re.Pattern[str]:
    return re.compile(f"(<!-- {re.escape(name)} -->)(.*?)(<!-- end of {re.escape(name)} -->)", re.DOTALL)
