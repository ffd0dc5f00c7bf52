"""An adapter on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from lora_export.errors import one_line
from lora_export.lora import Adapter, LoraPair
from lora_export.report.adapter_facts import adapter_facts
from lora_export.report.console import print_line, print_table


def print_adapter(to: Console, adapter: Adapter) -> None:
    """Print the contents of an adapter, a row for each module. ‖ΔW‖ is the Frobenius norm of s·BA at weight 1."""
    contents = contents_of(adapter)
    print_line(to, f"{adapter.name}: {adapter.format}, {contents}, {adapter.parameters:,} parameters", style="bold")
    for what, value in adapter_facts(adapter):
        print_line(to, one_line(f"  {what}: {value}"))
    rows = [["module", "rank", "scale", "shape", "‖ΔW‖", ""]]
    for module, pair in adapter.pairs.items():
        rows.append(
            [
                module,
                f"{pair.rank}",
                f"{pair.scale:g}",
                _shape(pair.shape),
                f"{pair.norm:.4g}",
                kind_of_pair(pair),
            ]
        )
    print_table(to, rows)
    if any(pair.magnitude is not None for pair in adapter.pairs.values()):
        print_line(to, "DoRA rescales W + ΔW, so the whole change also depends on the base's weights")
    for name, tensor in adapter.replaced.items():
        print_line(to, f"replaced as a whole: {name}  {_shape(tensor.shape)} {tensor.dtype}")
    for name, rows_of_table in adapter.token_rows.items():
        print_line(to, f"rows replaced: {name}  {_shape(rows_of_table.values.shape)} {rows_of_table.values.dtype}")
    for name, change in adapter.biases.items():
        print_line(to, f"added to a bias: {name}  {_shape(change.shape)}")
    if adapter.is_identity:
        print_line(to, "this adapter changes nothing: every B, A or scale is zero, as in a new adapter", style="yellow")
    for note in adapter.notes:
        print_line(to, f"note: {note}")


def contents_of(adapter: Adapter) -> str:
    """How many pairs, whole tensors, biases and rows an adapter has."""
    numbers = {
        ("low-rank pair", "low-rank pairs"): len(adapter.pairs),
        ("whole tensor", "whole tensors"): len(adapter.replaced),
        ("bias", "biases"): len(adapter.biases),
        ("row", "rows"): sum(rows.indices.size for rows in adapter.token_rows.values()),
    }
    return ", ".join(f"{n} {one if n == 1 else several}" for (one, several), n in numbers.items() if n) or "empty"


def kind_of_pair(pair: LoraPair) -> str:
    """DoRA, and the kind of layer where it is not linear."""
    layer = "embedding" if pair.embedding else "convolution" if len(pair.shape) > 2 else ""
    return " ".join(filter(None, ["" if pair.magnitude is None else "DoRA", layer]))


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
