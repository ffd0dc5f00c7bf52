"""Each limit is stated once, used by a reader, and shown in the guide."""

from __future__ import annotations

import re

from lora_export.isolation import limits
from support import ROOT
from support.pages import page_text

NAMES = [name for name, value in vars(limits).items() if name.isupper() and type(value) is int]


def test_the_guide_shows_every_limit() -> None:
    assert "\n".join(limits.table_lines()) in page_text("limits")
    assert len(limits.LIMITS) == len(set(NAMES) - {"KIB", "MIB", "GIB"})


def test_every_limit_is_imported_by_a_reader() -> None:
    sources = [path.read_text() for path in (ROOT / "lora_export").rglob("*.py") if path.name != "limits.py"]
    used = set(
        re.findall(r"\w+", " ".join(re.findall(r"isolation\.limits import (\(.*?\)|.*)", "\n".join(sources), re.S)))
    )
    assert set(NAMES) - {"KIB", "MIB", "GIB", "MEMORY", "MEMORY_OF_FILE"} <= used


def test_a_large_file_may_take_more_memory() -> None:
    assert limits.memory_for(10) - limits.memory_for(0) == 40
