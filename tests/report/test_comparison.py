"""The table of ways to train a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_export.errors import EnvironmentLacking
from lora_export.report.comparison import TITLES, comparison_page, comparison_rows, draw_losses

MEMORY = {"weights": 4000, "gradients": 500, "optimizer": 1_000_000, "activations": 2_500_000, "peak": 1, "total": 1}
LORA: dict[str, Any] = {
    "label": "LoRA, rank 4", "strategy": "lora", "rank": 4, "trained_parameters": 1500, "all_parameters": 100_000,
    "memory": MEMORY, "step_seconds": 0.0125, "final_loss": 0.25, "best_loss": 0.2, "losses": [0.5, 0.2, 0.25],
    "held_out": {"loss": 0.3, "accuracy": 0.915, "count": 9},
}  # fmt: skip
BASE = LORA | {
    "label": "base <b>", "rank": None, "trained_parameters": 0, "step_seconds": None, "final_loss": None,
    "best_loss": None, "losses": [], "held_out": {"loss": 0.7, "accuracy": None, "count": 9},
}  # fmt: skip


def test_a_row_has_a_cell_for_each_title() -> None:
    lora, base = comparison_rows([LORA, BASE])
    assert lora == (
        "LoRA", "4", "1,500", "1.5 %", "4 KB", "500 bytes", "1 MB", "2.5 MB", "12.5 ms", "0.25", "0.2", "91.5 % (0.3)",
    )  # fmt: skip
    assert base == ("base <b>", "", "0", "0 %", "", "", "", "", "", "", "", "0.7")
    assert len(lora) == len(TITLES)


def test_the_page_escapes_names_and_shows_every_cell() -> None:
    document = {"model": "<script>", "data": "a & b", "settings": {"seed": 3}, "runs": [LORA, BASE]}
    page = comparison_page(document, "comparison.png")
    assert "<script>" not in page and "a &amp; b" in page and "base &lt;b&gt;" in page
    assert all(f"<td>{cell}</td>" in page for cell in comparison_rows([LORA])[0])
    assert 'src="comparison.png"' in page and "default-src 'none'" in page


def test_the_losses_are_drawn(tmp_path: Path) -> None:
    draw_losses({"one": [1.0, 0.5], "two": [1.0, 0.1]}, tmp_path / "a.png")
    draw_losses({"one": [1.0, 0.5]}, tmp_path / "b.png")
    draw_losses({"one": [1.0, 0.5]}, tmp_path / "c.png", held_out={1: 0.9, 2: 0.7})
    assert Image.open(tmp_path / "a.png").size == (1200, 675)
    colours = {
        name: set(Image.open(tmp_path / name).convert("RGB").get_flattened_data()) for name in ("b.png", "c.png")
    }
    orange = (0xD5, 0x5E, 0x00)
    assert [orange in colours[name] for name in ("b.png", "c.png")] == [False, True]
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(EnvironmentLacking, match="matplotlib"):
        draw_losses({}, tmp_path / "a.png")
