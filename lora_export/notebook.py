"""Tables for notebooks: what `_repr_html_` of the public values returns, which Jupyter shows in place of `repr`."""

from __future__ import annotations

from collections.abc import Sequence

from lora_export.errors import one_line

MOST_ROWS = 40
LEFT = 'style="text-align: left"'


def html_table(headline: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, colour: str = "") -> str:
    """A headline and a table as HTML, every text escaped. Of many rows, the first `MOST_ROWS`."""
    style = f' style="color: {colour}"' if colour else ""
    lines = [f"<p><b{style}>{_text(headline)}</b></p>"]
    if rows:
        lines += [f"<table><tr>{_cells('th', columns)}</tr>"]
        lines += [f"<tr>{_cells('td', row)}</tr>" for row in rows[:MOST_ROWS]]
        lines += ["</table>"]
    if len(rows) > MOST_ROWS:
        lines.append(f"<p>and {len(rows) - MOST_ROWS} more</p>")
    return "\n".join(lines)


def _cells(tag: str, values: Sequence[object]) -> str:
    return "".join(f"<{tag} {LEFT}>{_text(value)}</{tag}>" for value in values)


def _text(value: object) -> str:
    from html import escape  # imported here: it brings the names of all entities, and few processes show a table

    return escape(one_line(f"{value:.3g}" if isinstance(value, float) else str(value)))
