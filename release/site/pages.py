"""The pages of the site as Markdown, from the files of the repository. Nothing is written for the site alone."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import reference
from lora_export.cli import COMMANDS
from lora_export.cli.guide import GROUPS, guide_page

ROOT = Path(__file__).resolve().parents[2]
PICTURES = Path(__file__).with_name("pictures")
GUIDE = "lora_export/guide"
# A file of the repository -> its page
DOCUMENTS = {
    "README.md": "index.md",
    "tests/README.md": "tested.md",
    "tests/benchmarks/README.md": "measured.md",
    "samples/README.md": "samples.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "AGENTS.md": "agents.md",
}
LANGUAGES = {".py": "python", ".mjs": "javascript", ".yml": "yaml"}
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()([^)#\s:]+)((?:#[^)]*)?\))")  # not to other hosts
NAMED_PAGE = re.compile(r"`(?:lora-export )?guide ([a-z][a-z-]*)`")


@dataclass(frozen=True)
class Page:
    """A page of the site."""

    path: str  # on the site
    group: str  # of the navigation
    text: str
    about: str = ""  # in one line

    @property
    def title(self) -> str:
        """Its heading."""
        return _title(self.text)


def pages() -> list[Page]:
    """All pages, in the order of the navigation."""
    found = [_document("README.md", "")]
    for group, topics in GROUPS.items():
        found += [_guide_page(topic, group, about) for topic, about in topics.items()]
    generated = {f"commands/{name}.md": (text, COMMANDS[name]) for name, text in reference.commands().items()}
    generated["parts.md"] = reference.parts(), "Classes and functions below the commands."
    found += [Page(path, "Commands", _for_the_site(text, path), about) for path, (text, about) in generated.items()]
    found += [_document(source, "Project") for source in DOCUMENTS if source != "README.md"]
    return found


def files() -> dict[str, Path]:
    """Path on the site -> the file: pictures, and what the pages link to that is no page."""
    found = {f"pictures/{path.name}": path for path in sorted(PICTURES.iterdir())}
    for source in DOCUMENTS:
        for target, _ in LINK.findall(_prose(ROOT / source)):
            path = _in_repository(source, target)
            if _page_of(path) == path and (ROOT / path).is_file():
                found[path] = ROOT / path
    return found


def _guide_page(topic: str, group: str, about: str) -> Page:
    return Page(f"{topic}.md", group, _for_the_site(guide_page(topic), f"{GUIDE}/{topic}.md"), about)


def _document(source: str, group: str) -> Page:
    text = re.sub(r"^<!--.*?-->\n", "", (ROOT / source).read_text(encoding="utf-8"), flags=re.M | re.S)
    if source == "samples/README.md":
        text = "\n\n".join([text.rstrip(), *_gallery()]) + "\n"
    return Page(DOCUMENTS[source], group, _for_the_site(text, source))


def _gallery() -> Iterator[str]:
    """Each sample with its picture and its text."""
    for path in sorted((ROOT / "samples").iterdir()):
        if path.suffix not in LANGUAGES:
            continue
        text = path.read_text(encoding="utf-8")
        yield f"## {path.name}"
        if path.suffix == ".py":
            yield (ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0]
        for picture in sorted(PICTURES.glob(f"{path.stem}*")):
            yield f"![What {path.name} draws](pictures/{picture.name})"
        code = f"```{LANGUAGES[path.suffix]}\n{text.rstrip()}\n```"
        yield f'??? note "{path.name}, {len(text.splitlines())} lines"\n' + re.sub(r"^(?=.)", "    ", code, flags=re.M)


def _for_the_site(text: str, source: str) -> str:
    """A file's Markdown with the links of the site. Blocks of code lose what their first line has for the tests."""
    page = _page_of(source)

    def link(found: re.Match[str]) -> str:
        return _relative(_page_of(_in_repository(source, found[1])), page) + found[2]

    def named(found: re.Match[str]) -> str:
        return f"[{_title(guide_page(found[1]))}]({_relative(f'{found[1]}.md', page)})"

    def outside(prose: str) -> str:
        return NAMED_PAGE.sub(named, LINK.sub(link, prose))

    def block(found: re.Match[str]) -> str:
        first = re.sub(r"^```(\w+) (\S+\.\w+)$", r'```\1 title="\2"', found[0].partition("\n")[0])
        first = first if "title=" in first else re.sub(r"^(```\w*) .*$", r"\1", first)
        return first + found[0][found[0].index("\n") :]

    parts = re.split(f"({FENCE.pattern})", text, flags=FENCE.flags)
    return "".join(FENCE.sub(block, part) if part.startswith("```") else outside(part) for part in parts)


def _title(text: str) -> str:
    return re.search(r"^# (.+)$", text, re.MULTILINE)[1]  # type: ignore[index]


def _prose(path: Path) -> str:
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def _in_repository(source: str, target: str) -> str:
    """The path in the repository of what a file links to."""
    if target.startswith("pictures/"):
        return target
    return os.path.normpath(os.path.join(os.path.dirname(source), target)).replace(os.sep, "/")  # noqa: PTH118, PTH120


def _page_of(path: str) -> str:
    """The path on the site of a file or folder of the repository. Files that are no pages have the same path."""
    if path in DOCUMENTS or f"{path}/README.md" in DOCUMENTS:
        return DOCUMENTS.get(path) or DOCUMENTS[f"{path}/README.md"]
    return path.removeprefix(f"{GUIDE}/")


def _relative(target: str, page: str) -> str:
    return os.path.relpath(target, os.path.dirname(page) or ".").replace(os.sep, "/")  # noqa: PTH120
