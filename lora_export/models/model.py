"""A PyTorch model with what its inputs look like: shapes, axes that vary, and seeded examples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from lora_export.models.pt2.example_inputs import Limits

Inputs = dict[str, torch.Tensor]

Axes = dict[str, dict[int, str]]  # input -> axis -> the size's symbol

Sizes = dict[str, int]  # symbol -> size

Make = Callable[[Sizes, torch.Generator], Inputs]

# Sizes to trace with: two rows and more, since a size of one is taken for a constant.
TRACED = {"batch": 2, "sequence": 11, "target": 7}

# Sizes to check at: none of them is the traced one, and one batch has a single row.
CHECKED = (
    {"batch": 1, "sequence": 7, "target": 5},
    {"batch": 3, "sequence": 16, "target": 9},
    {"batch": 5, "sequence": 29, "target": 13},
)


@dataclass(frozen=True, eq=False)
class Model:
    """A PyTorch model as the user named it, adapters not applied, in eval mode, and in fp32 unless told otherwise."""

    source: str
    module: nn.Module
    axes: Axes  # the axes whose sizes may vary, by input, in the order of forward's parameters
    make: Make
    sizes: Sizes  # what the example inputs are made with
    is_huggingface: bool = False
    limits: Limits = field(default_factory=dict)  # sizes that a symbol may have, where not any
    notes: tuple[str, ...] = ()  # what a verdict on it has to say

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(self.axes)

    def examples(self) -> Inputs:
        """The inputs to trace with. The same on every call."""
        return self.inputs(self.sizes, seed=0)

    def inputs(self, sizes: Mapping[str, int], *, seed: int) -> Inputs:
        """Seeded inputs of these sizes; symbols that `sizes` lacks keep their traced size."""
        return self.make({**self.sizes, **sizes}, torch.Generator().manual_seed(seed))

    def fingerprint(self) -> str:
        """The SHA-256 of all weights with their names."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def checked_sizes(self, fixed: Mapping[str, int], limits: Limits | None = None) -> list[Sizes]:
        """Three sets of sizes that differ from the traced ones in every dynamic axis, but for the `fixed` ones.

        They stay within the model's `limits`, and within those that are given.
        """
        symbols = sorted({symbol for axes in self.axes.values() for symbol in axes.values()})
        sets = []
        for number, chosen in enumerate(CHECKED):
            sizes = {symbol: chosen.get(symbol, self.sizes[symbol] + 1 + 2 * number) for symbol in symbols}
            for low_high in (self.limits, limits or {}):
                for symbol, (low, high) in low_high.items():
                    if symbol in sizes:
                        least = max(sizes[symbol], low)
                        sizes[symbol] = least if high is None else min(least, high)
            sets.append({**sizes, **fixed})
        return sets
