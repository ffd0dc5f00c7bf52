"""The control of every pair of a module: a candidate that lacks one pair of the adapters must be detected.

The controls of a verdict switch the adapters off together. A gate that detects that may still miss one pair of many:
in half precision the rounding of a whole model is larger than what most pairs of a query and a key change. So each
pair is switched off by itself, in fp64, and the gates are applied to the outputs as if they were a candidate's. Where
they detect nothing, all errors of the candidate together show whether it lacks this pair (parity/missing_part.py).

A block of a list of layers, such as `model.layers.3`, that runs before any pair is missing has the inputs of the run
with all pairs, and so its outputs. They are recorded once. That the rest of the module depends on a block through
these outputs alone is tested first, bit by bit: a block that fills a cache, for example, is computed in every run.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map

from lora_export import layers
from lora_export.layers.attachments import Branch, attachment_of, branch_parameter, is_attached
from lora_export.runtime.runner import Arrays
from lora_export.runtime.torch_runners import Fp64Runner
from lora_export.verification import parity
from lora_export.verification.compare_outputs import same_bits
from lora_export.verification.pair_controls import (
    JudgeWithout,
    PairControls,
    grouped,
    switch_off,
    too_many,
    with_difference,
)

MOST_RECORDED = 1 << 28  # bytes of all outputs of blocks


class _Call(NamedTuple):
    block: nn.Module
    outputs: Any


class RecordedBlocks:
    """The outputs of a module's blocks in one run of it with all pairs. `run` is that run."""

    def __init__(self, module: nn.Module, run: Callable[[], Arrays]):
        self._module, self._run = module, run
        self._blocks = list(_blocks(module))
        self._calls: list[_Call] = []
        self._bytes = 0
        outputs = self._recorded()
        if self._calls and not self._can_be_left_out(outputs):
            self._calls = []

    def run_without(self, off: Sequence[Branch]) -> Arrays:
        """The outputs of the module without these branches."""
        first = self._first_call(off)
        with layers.without_branches(self._module, off):
            return self._run_from(first)

    def _recorded(self) -> Arrays:
        """Run the module, and record the outputs of its blocks; none where they are large, or more than tensors."""

        def forward(block: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            outputs = original(*args, **kwargs)
            leaves = tree_flatten(outputs)[0]
            tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            self._bytes += sum(tensor.nbytes for tensor in tensors)
            is_kept = self._bytes <= MOST_RECORDED and all(leaf is None or torch.is_tensor(leaf) for leaf in leaves)
            self._calls.append(_Call(block, tree_map(_copied, outputs) if is_kept else None))
            return outputs

        with self._forwards(forward):
            outputs = self._run()
        if any(call.outputs is None for call in self._calls):
            self._calls = []
        return outputs

    def _can_be_left_out(self, outputs: Arrays) -> bool:
        """Whether runs that begin in the middle, at the last block and behind it return the same bits."""
        count = len(self._calls)
        return all(same_bits(outputs, self._run_from(first)) for first in {count // 2, count - 1, count})

    def _first_call(self, off: Collection[Branch]) -> int:
        """How many calls of blocks come before the first that computes one of these branches."""
        changed = [block for block in self._blocks if not _branches(block).isdisjoint(off)]
        if not set(off) <= set[Branch]().union(*map(_branches, changed)):
            return 0  # one is outside of all blocks
        return next((number for number, call in enumerate(self._calls) if call.block in changed), 0)

    def _run_from(self, first: int) -> Arrays:
        """Run the module with the recorded outputs of the calls before this one."""
        if not first:
            return self._run()
        done = 0

        def forward(block: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal done
            number, done = done, done + 1
            if number >= first or self._calls[number].block is not block:
                return original(*args, **kwargs)
            return tree_map(_copied, self._calls[number].outputs)

        with self._forwards(forward):
            return self._run()

    @contextlib.contextmanager
    def _forwards(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Call `forward(block, its own forward, ...)` for each block while the context is active."""
        before = {block: block.__dict__.get("forward") for block in self._blocks}
        try:
            for block in self._blocks:
                block.__dict__["forward"] = functools.partial(forward, block, block.forward)
            yield
        finally:
            for block, own in before.items():
                if own is None:
                    block.__dict__.pop("forward", None)
                else:
                    block.__dict__["forward"] = own


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists of layers, each once."""
    seen: set[nn.Module] = set()
    for part in module.modules():
        if isinstance(part, nn.ModuleList) and part not in seen:
            for block in part:
                if block not in seen:
                    yield block
                seen.update(block.modules())


def _branches(block: nn.Module) -> set[Branch]:
    return {branch for part in block.modules() if is_attached(part) for branch in attachment_of(part).branches}


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


LEAST_RECORDED = 8  # groups of pairs for which it pays to record the outputs of blocks


def control_pairs(
    module: nn.Module,
    inputs: Mapping[str, Arrays],
    cases: Sequence[parity.Case],
    judge: JudgeWithout,
    *,
    skip: Collection[str] = (),
    detected: Collection[str] = (),
) -> PairControls:
    """Switch off the pairs that are attached to a module, and `judge` the outputs.

    The module computes in fp64. `inputs` are by the name of the case. `skip` are modules whose pairs are known to be
    unreached, `detected` the names of those that are known to be detected.
    """
    runner = Fp64Runner(module)
    recorded: dict[str, RecordedBlocks] = {}  # of the first case, in which all groups are switched off

    def run_without(off: Sequence[Branch], case: parity.Case) -> Arrays:
        run = functools.partial(runner.run, inputs[case.name])
        if not recorded and len(groups) >= LEAST_RECORDED:
            recorded[case.name] = RecordedBlocks(module, run)
        if case.name in recorded:
            outputs = recorded[case.name].run_without(off)
        else:
            with layers.without_branches(module, off):
                outputs = run()
        return outputs if case.attached is None else with_difference(case, outputs, case.attached)

    pairs = [branch for branch in _pairs_with_effect(module) if branch.module not in skip]
    by_layer = too_many(len(pairs), sum(parameter.numel() for parameter in module.parameters()))
    groups = grouped([(branch.module, branch.adapter, branch) for branch in pairs], by_layer=by_layer)
    ordered = sorted(cases, key=lambda case: sum(array.size for array in inputs[case.name].values()))
    return switch_off(groups, ordered, run_without, judge, detected=detected, by_layer=by_layer)


def _pairs_with_effect(module: nn.Module) -> Iterator[Branch]:
    """The pairs whose product is not zero: whether a pair of zeros is there makes no difference."""
    for owner in module.modules():
        for branch in attachment_of(owner).branches if is_attached(owner) else ():
            parts = () if branch.transform is not None else ("lora_A", "lora_B")
            factors = [branch_parameter(owner, part, branch) for part in parts]
            if branch.dora or (branch.scale and all(bool(factor.any()) for factor in factors)):
                yield branch
