"""The table of ways to train a model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from PIL import Image

from lora_export.errors import EnvironmentLacking
from lora_export.report.training import TITLES, comparison_page, comparison_rows, draw_losses, model_card, running_means

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
    (slow,) = comparison_rows([LORA | {"step_seconds": 1.0104}])
    assert slow[8] == "1,010 ms"


def test_the_page_escapes_names_and_shows_every_cell() -> None:
    document = {"model": "<script>", "data": "a & b", "settings": {"seed": 3}, "runs": [LORA, BASE]}
    page = comparison_page(document, "comparison.png")
    assert "<script>" not in page and "a &amp; b" in page and "base &lt;b&gt;" in page
    assert all(f"<td>{cell}</td>" in page for cell in comparison_rows([LORA])[0])
    assert 'src="comparison.png"' in page and "default-src 'none'" in page


def colour_at(path: Path, colour: tuple[int, int, int]) -> NDArray[np.bool_]:
    """Which pixels (height, width) of a picture have a colour."""
    return (np.asarray(Image.open(path).convert("RGB")) == colour).all(-1)


def test_the_losses_are_drawn(tmp_path: Path) -> None:
    draw_losses({"one": [1.0, 0.5], "two": [1.0, 0.1]}, tmp_path / "a.png")
    draw_losses({"one": [1.0, 0.5]}, tmp_path / "b.png")
    draw_losses({"one": [1.0, 0.5]}, tmp_path / "c.png", held_out={1: 0.9, 2: 0.7})
    assert Image.open(tmp_path / "a.png").size == (1200, 675)
    orange = (0xD5, 0x5E, 0x00)
    assert [colour_at(tmp_path / name, orange).any() for name in ("b.png", "c.png")] == [False, True]
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_many_steps_are_smoothed(tmp_path: Path) -> None:
    assert running_means([4.0, 2.0, 6.0, 0.0], 2) == [4.0, 3.0, 4.0, 3.0]
    assert running_means([4.0, 2.0, 6.0], 1) == [4.0, 2.0, 6.0]
    noisy = [step % 2 + 1.0 for step in range(100)]
    draw_losses({"one": noisy}, tmp_path / "many.png")
    blue = colour_at(tmp_path / "many.png", (0x00, 0x72, 0xB2))
    height, width = blue.shape
    rows = blue[:, width // 2 :].any(1).nonzero()[0]  # of the later steps
    assert rows.max() - rows.min() < height // 4  # the losses themselves are as far apart as the axes


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(EnvironmentLacking, match="matplotlib"):
        draw_losses({}, tmp_path / "a.png")


# --- The README.md of a trained adapter. ---


def facts(**changes: Any) -> dict[str, Any]:
    known: dict[str, Any] = {"base": "owner/model", "base_sha256": "ab", "data": "texts.jsonl", "data_sha256": "cd"}
    known |= {
        "base_quantization": "",
        "examples": "9 examples",
        "adapter": {"r": 4},
        "settings": {"learning rate": 0.001},
    }
    return known | {"figures": {"held out": "loss 0.3"}, "versions": {"torch": "2.10"}, "plot": ""} | changes


def test_a_card_has_a_header_for_the_hub_and_every_fact() -> None:
    _, header, text = model_card(facts()).split("---\n", 2)
    assert yaml.safe_load(header) == {"base_model": "owner/model", "library_name": "peft", "tags": ["lora"]}
    for row in ("| SHA-256 of the data | `cd` |", "| r | `4` |", "| learning rate | `0.001` |", "| torch | `2.10` |"):
        assert row in text.splitlines()


def test_a_plot_is_shown_below_the_figures() -> None:
    with_plot, without = model_card(facts(plot="losses.png")), model_card(facts())
    assert "| held out | `loss 0.3` |\n\n![The loss of each step](losses.png)\n\n## Versions" in with_plot
    assert "![" not in without


def test_a_base_in_4_bits_is_named() -> None:
    card = model_card(facts(base_quantization="2 layers in 4 bits"))
    assert "| quantisation of the base | `2 layers in 4 bits` |" in card
    assert "quantisation" not in model_card(facts())


def test_no_name_leaves_its_cell_or_the_header() -> None:
    name = 'x"\n---\n# no | `code`'
    card = model_card(facts(base=name))
    (line,) = card.splitlines()[1:2]
    assert line == f"base_model: {json.dumps(name)}" and yaml.safe_load(line) == {"base_model": name}
    assert "| base | `x\" --- # no \\| 'code'` |" in card
