"""Outputs of blocks that are recorded: which blocks are computed again, and modules in which all must be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lora_export import layers, plan
from lora_export.layers.attachments import Branch, attached_modules, attachment_of
from lora_export.lora import Adapter, LoraPair
from lora_export.runtime.runner import Arrays
from lora_export.verification.references import recorded_blocks
from lora_export.verification.references.recorded_blocks import RecordedBlocks

COUNT = 4


class Block(nn.Module):
    """A layer that counts its runs, and adds what `state` has to its result."""

    def __init__(self, state: list[float]) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2, bias=False)
        nn.init.eye_(self.linear.weight)
        self.runs, self.state = 0, state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        return self.linear(x) + sum(self.state)


class Caching(Block):
    """A block that fills a cache, which the next ones read."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = super().forward(x)
        self.state.append(float(result.sum()))
        return result


class WithObject(Block):
    """A block that returns more than tensors."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, object]:  # type: ignore[override]
        return super().forward(x), object()


class Stack(nn.Module):
    def __init__(self, kind: type[Block] = Block, order: tuple[int, ...] = tuple(range(COUNT))) -> None:
        super().__init__()
        self.state: list[float] = []
        self.layers = nn.ModuleList(kind(self.state) for _ in range(COUNT))
        self.head = nn.Linear(2, 2, bias=False)
        nn.init.eye_(self.head.weight)
        self.order = order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.state.clear()
        for number in self.order:
            x = self.layers[number](x)
            if isinstance(x, tuple):
                x = x[0]
            x += 1  # in place: what is recorded must not change
        return self.head(x)

    def runs(self) -> list[int]:
        """How often each block ran since the last call."""
        counts = [block.runs for block in self.layers]
        for block in self.layers:
            block.runs = 0
        return counts


def attached(module: Stack) -> list[Branch]:
    """Attach a pair to each block and to the head; return them in this order."""
    names = [*(f"layers.{number}.linear" for number in range(COUNT)), "head"]
    pairs = {name: LoraPair(np.ones((1, 2)), np.ones((2, 1)), 0.5 + 0.25 * i) for i, name in enumerate(names)}
    layers.attach(module, plan.make([Adapter(name="a", format="test", pairs=pairs)], layers.specs(module)))
    return [branch for owner in attached_modules(module) for branch in attachment_of(owner).branches]


def run(module: nn.Module) -> Arrays:
    with torch.no_grad():
        return {"y": module(torch.ones(1, 2)).numpy()}


def without(module: nn.Module, off: list[Branch]) -> list[list[float]]:
    with layers.without_branches(module, off):
        return run(module)["y"].tolist()


def recorded(module: nn.Module) -> RecordedBlocks:
    return RecordedBlocks(module, lambda: run(module))


def test_blocks_before_the_pair_are_not_computed() -> None:
    module = Stack()
    branches = attached(module)
    blocks = recorded(module)
    module.runs()
    for number, branch in enumerate(branches[:COUNT]):
        found = blocks.run_without([branch])["y"].tolist()
        assert module.runs() == [int(block >= number) for block in range(COUNT)]
        assert found == without(module, [branch]) != run(module)["y"].tolist()
        module.runs()
    pair = [branches[3], branches[1]]
    assert blocks.run_without(pair)["y"].tolist() == without(module, pair)
    assert "forward" not in module.layers[0].__dict__


def test_pair_outside_of_all_blocks_needs_a_whole_run() -> None:
    module = Stack()
    branches = attached(module)
    blocks = recorded(module)
    module.runs()
    assert blocks.run_without([branches[-1]])["y"].tolist() == without(module, [branches[-1]])
    assert module.runs() == [2] * COUNT


def test_block_that_runs_twice_is_computed_from_its_first_run_on() -> None:
    module = Stack(order=(0, 1, 0, 2))
    branches = attached(module)
    blocks = recorded(module)
    module.runs()
    for number, runs in ((0, [2, 1, 1, 0]), (1, [1, 1, 1, 0]), (2, [0, 0, 1, 0])):
        found = blocks.run_without([branches[number]])["y"].tolist()
        assert module.runs() == runs
        assert found == without(module, [branches[number]])
        module.runs()


@pytest.mark.parametrize("kind", [Caching, WithObject])
def test_blocks_that_share_more_than_their_outputs_are_computed(kind: type[Block]) -> None:
    module = Stack(kind)
    branches = attached(module)
    blocks = recorded(module)
    module.runs()
    assert blocks.run_without([branches[3]])["y"].tolist() == without(module, [branches[3]])
    assert module.runs() == [2] * COUNT


def test_large_outputs_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded_blocks, "MOST_RECORDED", 3 * 8)
    module = Stack()
    branches = attached(module)
    blocks = recorded(module)
    module.runs()
    blocks.run_without([branches[3]])
    assert module.runs() == [1] * COUNT
