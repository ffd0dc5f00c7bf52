"""What the tests of fleets share."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.fleets import small_fleet


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small fleet in the current folder."""
    monkeypatch.chdir(tmp_path)
    return small_fleet(tmp_path)
