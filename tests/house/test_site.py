"""The site of the documentation: its pages, its links, its versions, and how a browser shows it."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import lora_export
from lora_export.cli import COMMANDS, command_named
from lora_export.cli.guide import TOPICS
from support import ROOT
from support.browser import REPORT, needs_chromium, shown

SITE = ROOT / "release" / "site"
PROGRAMS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
needs_zensical = pytest.mark.skipif(
    shutil.which("zensical", path=PROGRAMS) is None, reason="zensical is not installed: make site"
)
FENCE = re.compile(r"^( *)```.*?^\1```$", re.M | re.S)


@pytest.fixture(scope="module")
def parts() -> Any:
    """The modules of `release/site`, by name."""
    sys.path.insert(0, str(SITE))
    try:
        return {name: importlib.import_module(name) for name in ("pages", "links", "reference", "published")}
    finally:
        sys.path.remove(str(SITE))


@pytest.fixture(scope="module")
def program(parts: Any) -> dict[str, Any]:
    """The names that `python release/site` defines."""
    return runpy.run_path(str(SITE / "__main__.py"), run_name="site_program")


@pytest.fixture(scope="module")
def found(parts: Any) -> dict[str, Any]:
    """Path -> page."""
    return {page.path: page for page in parts["pages"].pages()}


# --- The pages ---


def test_every_document_of_the_repository_is_a_page(found: dict[str, Any], parts: Any) -> None:
    assert {f"{topic}.md" for topic in TOPICS} | set(parts["pages"].DOCUMENTS.values()) <= found.keys()
    titles = [page.title for page in found.values()]
    assert len(set(titles)) == len(titles) == len(found)


def test_links_of_the_markdown_lead_to_pages_and_files(found: dict[str, Any], parts: Any) -> None:
    files, links = parts["pages"].files(), 0
    for page in found.values():
        for target in re.findall(r"\]\(([^)#\s:]+)[#)]", FENCE.sub("", page.text)):
            path = os.path.normpath(os.path.join(os.path.dirname(page.path), target))  # noqa: PTH118, PTH120
            assert path in found or path in files, f"{page.path}: {target}"
            links += 1
    assert links > 100


def test_words_for_the_tests_are_on_no_page(found: dict[str, Any]) -> None:
    fences = [line for page in found.values() for line in re.findall(r"^```.+$", page.text, re.M)]
    assert [line for line in fences if not re.fullmatch(r'```\w+(?: title="[\w./]+")?', line)] == []
    assert [path for path, page in found.items() if "<!-- not run" in page.text] == []
    assert '```python title="net.py"' in fences


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_of_a_command_has_its_options_on_both_sides(name: str, found: dict[str, Any], parts: Any) -> None:
    text = found[f"commands/{name}.md"].text
    flags = {flag for param in command_named(name).params for flag in param.opts if flag.startswith("--")}
    assert {flag for flag in flags if f"`{flag}`" not in text} == set()
    if function := parts["reference"]._function_of(name):
        keywords = set(re.findall(r"^\| `-[^|]*\| `(\w+)` \|", text, re.M))
        assert {"output", "adapters", "seed"} & keywords or name in ("inspect", "check", "generate")
        assert keywords <= inspect.signature(getattr(lora_export, function)).parameters.keys()
        assert f"lora_export.{function}(" in text and "<factory>" not in text and "= ," not in text


def test_every_public_name_is_in_the_reference(found: dict[str, Any], parts: Any) -> None:
    headings = set(re.findall(r"^## (\w+)$", found["parts.md"].text, re.M))
    of_commands = {parts["reference"]._function_of(name) for name in COMMANDS} - {""}
    assert headings | of_commands == set(lora_export.__all__) and not headings & of_commands


def test_each_sample_is_shown_with_its_pictures(found: dict[str, Any], parts: Any) -> None:
    text = found["samples.md"].text
    for path in (ROOT / "samples").glob("*.py"):
        assert f"## {path.name}\n" in text and path.read_text(encoding="utf-8").splitlines()[-1] in text
    pictures = {path.name for path in parts["pages"].PICTURES.iterdir()}
    assert pictures == set(re.findall(r"\(pictures/([^)]+)\)", text)) and len(pictures) >= 3


# --- What is checked and written ---


@pytest.mark.parametrize(
    ("html", "problem"),
    [
        ('<a href="other/#here">', ""),
        ('<a href="nowhere/">', "nowhere/ does not exist"),
        ('<a href="other/#gone">', "other/#gone has no such heading"),
        ('<a href="#gone">', "#gone has no such heading"),
        ('<a href="../../outside">', "../../outside does not exist"),
        ('<a href="https://example.org/">', ""),
        ('<script src="https://example.org/a.js">', "loads https://example.org/a.js"),
        ('<link rel="stylesheet" href="//example.org/a.css">', "loads //example.org/a.css"),
        ('<img src="gone.png">', "gone.png does not exist"),
    ],
)
def test_a_link_that_leads_nowhere_is_found(html: str, problem: str, parts: Any, tmp_path: Path) -> None:
    for name, text in (("index.html", html), ("other/index.html", '<h2 id="here">')):
        (tmp_path / "site" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / name).write_text(text)
    assert parts["links"].problems(tmp_path / "site") == ([f"index.html: {problem}"] if problem else [])


def test_a_site_with_an_owner_has_no_placeholder(program: dict[str, Any], found: dict[str, Any], parts: Any) -> None:
    pages, placeholder = list(found.values()), parts["published"].REPOSITORY
    assert program["as_published"](pages, "") == pages and any(placeholder in page.text for page in pages)
    assert [page.path for page in program["as_published"](pages, "acme") if placeholder in page.text] == []


def test_versions_stand_beside_each_other(program: dict[str, Any], found: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "built").mkdir()
    (tmp_path / "built" / "index.html").write_text("a page")
    for version in ("0.9.0", "0.10.0", "0.1.0"):
        program["publish"](tmp_path / "built", tmp_path / "out", version, list(found.values()))
    entries = json.loads((tmp_path / "out" / "versions.json").read_text())
    assert [(entry["version"], entry["aliases"]) for entry in entries] == [
        ("0.10.0", ["latest"]), ("0.9.0", []), ("0.1.0", []),
    ]  # fmt: skip
    assert "url=0.10.0/" in (tmp_path / "out" / "index.html").read_text()
    for list_of_pages in (tmp_path / "out" / "0.9.0" / "llms.txt", tmp_path / "out" / "llms.txt"):
        targets = re.findall(r"^- \[.+?\]\(([^)]+)\)", list_of_pages.read_text(), re.M)
        assert len(targets) == len(found) - 1
        assert [target for target in targets if not (list_of_pages.parent / target).is_file()] == []


# --- In a browser ---

LOOK = """<iframe id="frame" style="border:0"></iframe><script type="module">
const frame = document.querySelector("#frame"), rows = [];
const wait = (time) => new Promise((done) => setTimeout(done, time));
const versions = () => [...frame.contentDocument.querySelectorAll(".md-version__link")];
frame.style.height = "900px";
for (const page of PAGES) {
  await new Promise((done) => { frame.onload = done; frame.src = page; });
  const shown = frame.contentDocument;
  for (let turn = 0; turn < 200 && !versions().length; turn++) await wait(50);  // they are read after the page
  for (const width of [400, 1280]) {
    frame.style.width = width + "px";
    await new Promise((done) => frame.contentWindow.requestAnimationFrame(() => setTimeout(done)));
    const heading = shown.querySelector("h1").getBoundingClientRect();
    rows.push({
      page, width, over: shown.documentElement.scrollWidth - width,
      heading: heading.width > 0 && heading.left >= 0 && heading.right <= width && heading.top < 900,
      pictures: [...shown.images].filter((image) => !image.naturalWidth).map((image) => image.src),
      loaded: frame.contentWindow.performance.getEntriesByType("resource").map((one) => one.name),
      versions: versions().map((one) => one.textContent.trim()),
    });
  }
}
await report(rows);
</script>"""

SEARCHES = """<iframe id="frame" style="width:1280px;height:900px"></iframe>
<script type="module">
const frame = document.querySelector("#frame"), wait = (time) => new Promise((done) => setTimeout(done, time));
await new Promise((done) => { frame.onload = done; frame.src = "1.0.0/tasks/"; });
const shown = frame.contentDocument;
shown.querySelector(".md-search__button").click();
let field = null, found = [];
for (let turn = 0; turn < 1500 && !found.length; turn++) {
  await wait(50);
  const root = [...shown.querySelectorAll("*")].map((one) => one.shadowRoot).find((one) => one?.querySelector("input"));
  if (root && !field) {
    field = root.querySelector("input");
    const typed = Object.getOwnPropertyDescriptor(frame.contentWindow.HTMLInputElement.prototype, "value");
    typed.set.call(field, "residual");
    field.dispatchEvent(new frame.contentWindow.Event("input", { bubbles: true }));
  }
  if (root) found = [...root.querySelectorAll("a[href]")].map((one) => one.href);
}
await report(found);
</script>"""


@needs_chromium
@pytest.mark.parametrize(
    ("script", "message"),
    [("gone()", "gone is not defined"), ("await Promise.reject('no index')", "no index"), ("", "reported nothing")],
)
def test_a_page_that_does_not_run_fails_its_test(script: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(f'{REPORT}<script type="module">{script}</script>')
    with pytest.raises(AssertionError, match=message):
        shown(tmp_path, "page.html", tmp_path / "home", limit=60 if script else 2)


@pytest.mark.slow
@needs_zensical
@needs_chromium
def test_the_built_site_is_whole_and_readable_at_two_widths(
    program: dict[str, Any], found: dict[str, Any], parts: Any, tmp_path: Path
) -> None:
    pages = list(found.values())
    (tmp_path / "source").mkdir()
    program["stage"](pages, tmp_path / "source")
    built = program["build"](tmp_path / "source")
    assert parts["links"].problems(built) == []
    program["publish"](built, tmp_path / "out", "1.0.0", pages)
    names = [f"1.0.0/{path.removesuffix('.md')}/" if path != "index.md" else "1.0.0/" for path in found]
    (tmp_path / "out" / "look.html").write_text(REPORT + LOOK.replace("PAGES", json.dumps(names)))
    (tmp_path / "out" / "search.html").write_text(REPORT + SEARCHES)
    results = shown(tmp_path / "out", "search.html", tmp_path / "home")
    index = tmp_path / "out" / "1.0.0" / "search.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"items": []}))  # reading it takes a second a page
    rows = shown(tmp_path / "out", "look.html", tmp_path / "home")
    assert [result for result in results if "/merging/" in result or "/commands/unmerge/" in result], results
    assert len(rows) == 2 * len(found)
    assert [(row["page"], row["width"], row["over"]) for row in rows if row["over"] > 0 or not row["heading"]] == []
    assert [picture for row in rows for picture in row["pictures"]] == []
    hosts = {urlsplit(name).hostname for row in rows for name in row["loaded"]}
    assert hosts == {"127.0.0.1"}
    assert [row["page"] for row in rows if row["versions"] != ["1.0.0"]] == []


@pytest.mark.slow
@needs_zensical
def test_a_broken_link_ends_the_build(program: dict[str, Any], parts: Any, tmp_path: Path) -> None:
    page = parts["pages"].Page
    program["stage"]([page("index.md", "", "# A\n\n[gone](b.md#gone)\n"), page("b.md", "B", "# B\n")], tmp_path)
    with pytest.raises(SystemExit) as error:
        program["build"](tmp_path)
    assert "anchor does not exist" in str(error.value) and "b.md#gone" in str(error.value)
