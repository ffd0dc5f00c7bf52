"""The shares of layers on a terminal."""

from __future__ import annotations

import io
from pathlib import Path

from lora_export.adapters.low_rank import LayerShare
from lora_export.report.console import console
from lora_export.report.shares import print_shares


def printed(*shares: float, whole: bool = False, rank: int = 4) -> list[str]:
    file = io.StringIO()
    layers = [LayerShare(f"layer.{n}", (8, 8), rank - n % 2, 8, share, 1.0) for n, share in enumerate(shares)]
    print_shares(console(file), Path("out\nsame: forged"), layers, whole=whole)
    return file.getvalue().splitlines()


def test_the_layers_with_the_least_share_come_first() -> None:
    lines = printed(0.9, 0.5, 0.7, 0.99, 1.0, 0.8)
    assert lines[0] == r"wrote out\nsame: forged: 6 pairs of rank 3 to 4, 81.5% of ‖ΔW‖²"
    assert [line.split()[0] for line in lines[2:-1]] == ["layer.1", "layer.2", "layer.5", "layer.0", "layer.3"]
    assert lines[-1] == "1 more layer, with the same share or a higher one (-v)"
    assert len(printed(0.9, 0.5, 0.7, 0.99, 1.0, 0.8, whole=True)) == 8


def test_nothing_is_listed_where_nothing_is_lost() -> None:
    assert printed(1.0, 1.0) == [r"wrote out\nsame: forged: 2 pairs of rank 3 to 4, 100.0% of ‖ΔW‖²"]


def test_a_loss_is_not_rounded_away() -> None:
    assert "over 99.9%" in printed(0.99999)[0]
