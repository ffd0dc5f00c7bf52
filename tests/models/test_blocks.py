"""Runs on shapes alone that compute blocks of one kind once: which ones are of one kind."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2Model, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from lora_export.layers.torch_internals import sizes_of_branches
from lora_export.models.blocks import blocks_of, each_kind_of_block_once

SIZES = {"vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "head_dim": 8}


class Block(nn.Module):
    def __init__(self, number: int, most: int = 99, width: int = 4, act: Any = torch.tanh, bias: bool = True) -> None:
        super().__init__()
        self.layer_idx, self.most, self.act = number, most, act
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, width, bias=bias)
        self.runs = nn.Identity()  # with a hook that counts

    def forward(self, x: Tensor, seen: dict[int, Tensor] | None = None) -> Tensor:
        if seen is not None:
            seen[self.layer_idx] = x
        x = self.runs(x)
        return self.act(self.fc(self.norm(x))) if x.shape[0] < self.most else x


class Stack(nn.Module):
    def __init__(self, *blocks: Block) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: Tensor, seen: dict[int, Tensor] | None = None) -> Tensor:
        for block in self.layers:
            x = block(x, seen)
        return x


def runs_of(module: nn.Module, run: Callable[[], object], part: type[nn.Module] = nn.Identity) -> int:
    seen: list[None] = []
    hooks = [
        each.register_forward_pre_hook(lambda *_: seen.append(None)) for each in module.modules() if type(each) is part
    ]
    with each_kind_of_block_once(module), torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return len(seen)


def gelu(approximate: str) -> Any:
    return functools.partial(F.gelu, approximate=approximate)


EQUAL = [Block(0), Block(1), Block(2)]


@pytest.mark.parametrize(
    ("blocks", "runs"),
    [
        (EQUAL, 1),
        ([Block(0), Block(1, most=50), Block(2)], 2),
        ([Block(0), Block(1, act=torch.relu), Block(2)], 2),
        ([Block(0, act=gelu("tanh")), Block(1, act=gelu("tanh")), Block(2, act=gelu("none"))], 2),
        ([Block(0), Block(1, bias=False), Block(2)], 2),
        ([Block(0), Block(1).eval(), Block(2)], 2),
        ([Block(0), Block(1).requires_grad_(False), Block(2)], 2),
    ],
)
def test_blocks_that_compute_alike_run_once(blocks: list[Block], runs: int) -> None:
    module = Stack(*blocks).to("meta")
    assert runs_of(module, lambda: module(torch.empty(3, 4, device="meta"))) == runs
    assert not any("forward" in block.__dict__ for block in blocks_of(module))


def test_a_block_runs_for_each_shape_of_its_arguments() -> None:
    module = Stack(*EQUAL).to("meta")

    def run() -> None:
        for shape, dtype in (((3, 4), torch.float32), ((5, 4), torch.float32), ((3, 4), torch.float32)):
            module(torch.empty(shape, dtype=dtype, device="meta"))

    assert runs_of(module, run) == 2


def test_a_block_that_may_write_into_an_argument_always_runs() -> None:
    module, seen = Stack(*EQUAL).to("meta"), dict[int, Tensor]()
    assert runs_of(module, lambda: module(torch.empty(3, 4, device="meta"), seen)) == 3
    assert seen.keys() == {0, 1, 2}


def test_the_branch_of_a_later_block_is_found() -> None:
    module = Stack(Block(0), Block(1), Block(2, most=40), Block(3))
    inputs, axes = {"x": torch.zeros(3, 4)}, {"x": {0: "rows"}}
    expected = sizes_of_branches(lambda given: module(**given), inputs, axes)
    with each_kind_of_block_once(module):
        assert sizes_of_branches(lambda given: module(**given), inputs, axes) == expected
    assert expected["rows"][1] == 39


@pytest.mark.parametrize(
    ("module", "kinds"),
    [
        (LlamaModel(LlamaConfig(**SIZES, num_hidden_layers=4)), 1),
        (GPT2Model(GPT2Config(n_embd=16, n_layer=4, n_head=2, vocab_size=23)), 1),
        (Gemma2Model(Gemma2Config(**SIZES, num_key_value_heads=2, num_hidden_layers=4, sliding_window=8)), 2),
    ],
    ids=["llama", "gpt2", "gemma2"],
)
def test_layers_of_transformers_are_of_few_kinds(module: Any, kinds: int) -> None:
    module.eval()
    ids = torch.zeros(1, 5, dtype=torch.long)
    shape = module(ids, use_cache=False).last_hidden_state.shape
    mlp = type(next(blocks_of(module)).mlp)
    found: list[torch.Size] = []
    runs = runs_of(module, lambda: found.append(module(ids, use_cache=False).last_hidden_state.shape), mlp)
    assert (runs, found) == (kinds, [shape])


def test_a_cache_keeps_blocks_running() -> None:
    module: Any = LlamaModel(LlamaConfig(**SIZES, num_hidden_layers=4)).eval()
    ids = torch.zeros(1, 5, dtype=torch.long)
    assert runs_of(module, lambda: module(ids, use_cache=True), type(module.layers[0].mlp)) == 4
