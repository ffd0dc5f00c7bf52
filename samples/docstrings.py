"""Real text that every machine has: docstrings of Python's standard library.

    python samples/docstrings.py texts.jsonl

Each text is labelled with the package it comes from. They are collected from this Python: nothing is
shipped, and nothing is downloaded.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Packages that every Python from 3.11 on has, with about a hundred docstrings and more each.
PACKAGES = (
    "asyncio",
    "email",
    "encodings",
    "http",
    "importlib",
    "logging",
    "multiprocessing",
    "unittest",
    "urllib",
    "xml",
)
SHORTEST = 5  # words
MOST = 120  # texts for each package: classes of one size, and a demo that ends soon


def docstrings(package: Path) -> Iterator[str]:
    """Yield every docstring in the sources of a package, each on one line. Parses, and imports nothing."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, documented) and (text := ast.get_docstring(node)):
                yield " ".join(text.split())


def _shuffled(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write(path: Path) -> int:
    """Write a line {"text": docstring, "label": package} for each text. Returns how many."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    rows = []
    for package in PACKAGES:
        # A text in two files is one example. Which texts are taken depends on the texts alone.
        texts = sorted({text for text in docstrings(stdlib / package) if len(text.split()) >= SHORTEST}, key=_shuffled)
        rows += [{"text": text, "label": package} for text in texts[:MOST]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(rows)


if __name__ == "__main__":
    print(f"{write(Path(sys.argv[1]))} docstrings")
