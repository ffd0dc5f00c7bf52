"""Exercise 1: LoRA on all linear layers of an nn.TransformerEncoderLayer.

    python samples/all_linear_layers.py

First with the wrapper of lora_layer.py. It breaks here: this layer reads `.weight` of its linear layers
itself, and its attention stores query, key and value in one packed parameter that no wrapper reaches.
Then with `attach`, at three ranks. Before training, the layer computes what it did before, and only A
and B are trainable.
"""

from __future__ import annotations

import copy

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import lora_export as le
from lora_layer import LoRALayer

console = Console(highlight=False)


def wrap_naively(layer: nn.TransformerEncoderLayer) -> nn.TransformerEncoderLayer:
    """Replace every nn.Linear by a LoRALayer."""
    for path, child in list(layer.named_modules()):
        if isinstance(child, nn.Linear):
            parent, _, name = path.rpartition(".")
            setattr(layer.get_submodule(parent), name, LoRALayer(child))
    return layer


def main() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(d_model=256, nhead=4, dim_feedforward=1024, batch_first=True)
    x = torch.randn(2, 10, 256)

    console.print("[bold]Every nn.Linear replaced by a wrapper[/bold]")
    naive = wrap_naively(copy.deepcopy(layer))
    for mode in ("train", "eval"):
        try:
            getattr(naive, mode)()(x)
        except AttributeError as error:
            console.print(f"{mode + ' mode:':11} {error}")

    console.print("\n[bold]The same with lora_export.attach[/bold]")
    table = Table("rank", "trainable", "of all", "percent", "change in train mode", "in eval mode")
    for rank in (4, 8, 16):
        adapter = le.create_adapter(layer, targets="all-linear", rank=rank, alpha=2 * rank, seed=0)
        adapted = copy.deepcopy(layer)
        le.attach(adapted, le.make_plan([adapter], le.module_specs(layer), identity_ok=True), trainable=True)
        count = le.count_parameters(adapted)
        changes = [f"{largest_change(layer, adapted, x, training=training):.1g}" for training in (True, False)]
        table.add_row(
            str(rank), f"{count.trained:,}", f"{count.total:,}", f"{count.trained / count.total:.1%}", *changes
        )
    console.print(f"adapted: {', '.join(adapter.pairs)}")
    console.print(table)


def largest_change(layer: nn.Module, adapted: nn.Module, x: Tensor, *, training: bool) -> float:
    """The largest difference between the outputs of both layers, with the same dropout."""
    outputs = []
    for module in (layer, adapted):
        torch.manual_seed(1)
        outputs.append(module.train(training)(x))
    return (outputs[0] - outputs[1]).abs().max().item()


if __name__ == "__main__":
    main()
