"""Where the links of a built site lead: every file and anchor exists, and nothing is loaded from another server."""

from __future__ import annotations

from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADING = {"img", "script", "link", "source", "iframe", "video"}  # elements whose address a browser loads


class _Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.anchors: set[str] = {"", "__top"}
        self.links: list[tuple[str, str]] = []  # element, address
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors |= {str(values[name]) for name in ("id", "name") if values.get(name)}
        self.links += [(tag, str(values[name])) for name in ("href", "src") if values.get(name)]


def problems(site: Path) -> list[str]:
    """A line for each link that leads nowhere, and for each thing that is loaded from another server."""
    read = {path: _Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    return [
        line for path, page in read.items() if path.name != "404.html" for line in _problems(path, page, read, site)
    ]


def _problems(path: Path, page: _Page, read: dict[Path, _Page], site: Path) -> Iterator[str]:
    place = path.relative_to(site).as_posix()
    for tag, address in page.links:
        parts = urlsplit(address)
        if parts.scheme or parts.netloc:
            if tag in LOADING and parts.scheme != "data":
                yield f"{place}: loads {address}"
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        target = target / "index.html" if target.is_dir() else target
        if not target.is_file() or site.resolve() not in target.resolve().parents:
            yield f"{place}: {address} does not exist"
        elif parts.fragment and target in read and unquote(parts.fragment) not in read[target].anchors:
            yield f"{place}: {address} has no such heading"
