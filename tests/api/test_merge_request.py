"""What merges into checkpoints, graphs and pipelines share: notes, and the warning of rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import lora_export as le
from support.api import an_adapter


@pytest.fixture
def place(tmp_path: Path) -> Path:
    an_adapter(tmp_path / "adapter", scale=2**-6)
    rows = np.repeat(np.float16([0, 100]), 4)  # half of the change is lost beside large weights
    save_file({"dense.weight": np.tile(rows[:, None], 8)}, tmp_path / "base.safetensors")
    return tmp_path


def test_much_rounding_is_told_with_its_remedy(place: Path) -> None:
    seen: list[str] = []
    report = le.merge(
        place / "base.safetensors",
        place / "adapter",
        place / "out.safetensors",
        min_retention=0,
        on_message=seen.append,
    ).report
    assert report is not None and report.below_rounding
    (warning,) = (line for line in seen if line.startswith("warning:"))
    assert "rounding took more than a tenth of the change of 1 of 1 weights, most of dense.weight" in warning
    assert warning.endswith('; dtype="float32" keeps it')


def test_notes_of_a_plan_are_not_shown_twice(place: Path) -> None:
    save_file({"model.dense.weight": np.ones((8, 8), np.float32)}, place / "named.safetensors")
    notes = {}
    for dry_run in (True, False):
        output = place / f"{dry_run}.safetensors"
        notes[dry_run] = le.merge(place / "named.safetensors", place / "adapter", output, dry_run=dry_run).notes
    assert len(notes[False]) == len(notes[True]) + 1 and "prefix" in notes[False][-1]
