"""What the tests of fleets share."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_export.storage import atomic_output
from support.fleets import small_fleet


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small fleet in the current folder."""
    monkeypatch.chdir(tmp_path)
    return small_fleet(tmp_path)


@pytest.fixture(autouse=True)
def _no_flushes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the flushes of each record and output: they are half of a small fleet's time, and no power fails."""
    monkeypatch.setattr(atomic_output, "_fsync", lambda path, flags: None)
