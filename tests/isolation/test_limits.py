"""Each limit is stated once, used by a reader, and shown in the guide."""

from __future__ import annotations

import re

from lora_export.isolation import limits
from support import ROOT
from support.pages import page_text

NAMES = [name for name, value in vars(limits).items() if name.isupper() and type(value) is int]


def shown(most: int, unit: str) -> str:
    if unit == "bytes":
        for size, name in ((limits.GIB, "GiB"), (limits.MIB, "MiB")):
            if most % size == 0:
                return f"{most // size} {name}"
    return f"{most:,} {unit}"


def test_the_guide_shows_every_limit() -> None:
    rows = (f"| {of} | {shown(most, unit)} |" for of, most, unit in limits.LIMITS)
    assert "\n".join(["| what | at most |", "|---|---|", *rows]) in page_text("limits")
    assert len(limits.LIMITS) == len(set(NAMES) - {"KIB", "MIB", "GIB"})


def test_every_limit_is_imported_by_a_reader() -> None:
    sources = [path.read_text() for path in (ROOT / "lora_export").rglob("*.py") if path.name != "limits.py"]
    used = set(
        re.findall(r"\w+", " ".join(re.findall(r"isolation\.limits import (\(.*?\)|.*)", "\n".join(sources), re.S)))
    )
    assert set(NAMES) - {"KIB", "MIB", "GIB", "MEMORY", "MEMORY_OF_FILE"} <= used


def test_a_large_file_may_take_more_memory() -> None:
    assert limits.memory_for(10) - limits.memory_for(0) == 40
