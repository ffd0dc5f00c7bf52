"""Build the site of the documentation: `make site`. The pages are the guide's own files. Needs zensical, no network.

BUILD/VERSION has the pages, each also as Markdown; BUILD/versions.json the versions that are there, for the selector;
BUILD/llms.txt the list of pages for programs. Build into a folder that has older versions, and they stay.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import yaml
from packaging.version import Version

import links
import pages
import published
from lora_export.version import __version__

HERE = Path(__file__).parent


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=pages.ROOT / "build/site")
    options.add_argument("--version", default=__version__)
    options.add_argument("--owner", default="", help="who publishes https://github.com/OWNER/lora-export")
    chosen = options.parse_args()
    found = as_published(pages.pages(), chosen.owner)
    with tempfile.TemporaryDirectory() as place:
        source = Path(place).resolve()
        stage(found, source, chosen.owner)
        built = build(source)
        if wrong := links.problems(built):
            raise SystemExit("\n".join([*wrong, f"{len(wrong)} links are wrong. Nothing was written."]))
        publish(built, chosen.out, chosen.version, found)
    print(f"{len(found)} pages of {chosen.version} are in {chosen.out}")
    print(f"To read them: {sys.executable} -m http.server --directory {chosen.out}")


def as_published(found: list[pages.Page], owner: str) -> list[pages.Page]:
    """The pages for those who have no clone. Without an owner they stay those of the clone."""
    return [replace(page, text=published.published(page.text, owner)) for page in found] if owner else found


def stage(found: list[pages.Page], folder: Path, owner: str = "") -> None:
    """Write what zensical reads: `docs`, and the configuration with the navigation."""
    for page in found:
        _write(folder / "docs" / page.path, page.text)
    for path, file in {**pages.files(), "site.css": HERE / "site.css"}.items():
        (folder / "docs" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / "docs" / path)
    groups = dict.fromkeys(page.group for page in found)
    navigation = [{group: [page.path for page in found if page.group == group]} for group in groups if group]
    own = [page.path for page in found if not page.group]
    config = yaml.safe_load((HERE / "mkdocs.yml").read_text(encoding="utf-8"))
    if owner:
        config["extra"]["social"] = [{"icon": "fontawesome/brands/github", "link": published.repository(owner)}]
    _write(folder / "mkdocs.yml", yaml.safe_dump(config | {"nav": [*own, *navigation]}))


def build(folder: Path) -> Path:
    """Run zensical, which refuses a page without a place, and links in Markdown that lead nowhere."""
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if (program := shutil.which("zensical", path=search)) is None:
        raise SystemExit("zensical is not installed. make site installs it, or: pip install '.[site]'")
    done = subprocess.run([program, "build", "--strict"], cwd=folder, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr.partition("Traceback")[0]))
    return folder / "site"


def publish(built: Path, out: Path, version: str, found: list[pages.Page]) -> None:
    """Put a version beside those that are there, with its Markdown, and let the newest be the first page."""
    target = out / version
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(built, target)
    for page in found:
        _write(target / page.path, page.text)
    _write(target / "llms.txt", llms(found))
    versions = sorted((path.name for path in out.iterdir() if path.is_dir() and path.name[0].isdigit()), key=Version)
    newest = versions[-1]
    entries = [{"version": one, "title": one, "aliases": ["latest"] * (one == newest)} for one in versions[::-1]]
    _write(out / "versions.json", json.dumps(entries))
    _write(out / "index.html", f'<!doctype html><meta http-equiv="refresh" content="0; url={newest}/">\n')
    _write(out / "llms.txt", (out / newest / "llms.txt").read_text(encoding="utf-8").replace("](", f"]({newest}/"))
    _write(out / ".nojekyll", "")


def llms(found: list[pages.Page]) -> str:
    """The list of pages for programs (llmstxt.org)."""
    first, *others = found
    lines = [f"# {first.title}", "", f"> {yaml.safe_load((HERE / 'mkdocs.yml').read_text())['site_description']}"]
    for group in dict.fromkeys(page.group for page in others):
        lines += ["", f"## {group}", ""]
        lines += [
            f"- [{page.title}]({page.path}){f': {page.about}' if page.about else ''}"
            for page in others
            if page.group == group
        ]
    return "\n".join(lines) + "\n"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
