"""Pairs of a lower rank on the terminal: what they hold of the changes that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lora_export.adapters.low_rank import LayerShare, total_share
from lora_export.errors import count, one_line
from lora_export.report.console import print_table

LISTED_LAYERS = 5


def print_shares(
    to: Console, output: Path, layers: Sequence[LayerShare], tensors: Sequence[str] = (), *, whole: bool = False
) -> None:
    """Print one line for the adapter, and the layers of which it holds least; with `whole` all layers.

    `tensors` are those that the adapter saves whole.
    """
    ranks = sorted({layer.rank for layer in layers})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"rank {ranks[0]} to {ranks[-1]}"
    total = total_share(layers)
    to.print(f"wrote {one_line(str(output))}: {count(len(layers), 'pair')} of {rank}, {_percent(total)} of ‖ΔW‖²")
    if tensors:
        names = ", ".join(tensors if whole else tensors[:LISTED_LAYERS])
        more = "" if whole or len(tensors) <= LISTED_LAYERS else f" and {len(tensors) - LISTED_LAYERS} more"
        to.print(one_line(f"{count(len(tensors), 'tensor')} saved whole: {names}{more}"))
    least = sorted(layers, key=lambda layer: layer.share)[: None if whole else LISTED_LAYERS]
    if not whole and all(layer.share > 0.9995 for layer in least):
        return
    rows = [["layers with the least share" if not whole else "layer", "shape", "rank", "of", "‖ΔW‖", "share"]]
    for layer in least:
        shape = " x ".join(map(str, layer.shape))
        figures = [shape, f"{layer.rank}", f"{layer.of_rank}", f"{layer.norm:.4g}", _percent(layer.share)]
        rows.append([layer.module, *figures])
    print_table(to, rows)
    if len(layers) > len(least):
        more = count(len(layers) - len(least), "more layer")
        to.print(f"{more}, with the same share or a higher one (-v)")


def _percent(share: float) -> str:
    """A share as a percentage; 100 % only where nothing is missing at the precision shown."""
    text = f"{share:.1%}"
    return text if share >= 1 or text != "100.0%" else "over 99.9%"
