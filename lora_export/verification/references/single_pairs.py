"""The control of every pair of a module: a candidate that lacks one pair of the adapters must be detected.

The controls of a verdict switch the adapters off together. A gate that detects that may still miss one pair of many:
in half precision the rounding of a whole model is larger than what most pairs of a query and a key change. So each
pair is switched off by itself, in fp64, and the gates are applied to the outputs as if they were a candidate's. Where
they detect nothing, all errors of the candidate together show whether it lacks this pair (parity/judging.py).

Pairs are off in the rows of a batch, each in its own row: a weight is read, and the module's code run, once for all of
them. Nothing is estimated. A batch is used where one of its rows agrees with a run by itself, and a row with all pairs
with the reference. Modules whose code reads values, such as the routers of experts, run once for each pair.

A block of a list of layers, such as `model.layers.3`, that runs before any pair is missing has the inputs of the run
with all pairs, and so its outputs. They are recorded once. That the rest of the module depends on a block through
these outputs alone is tested first, bit by bit: a block that fills a cache, for example, is computed in every run.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map

from lora_export import layers
from lora_export.errors import RuntimeRefused
from lora_export.layers.adapted_layers import has_own_branches
from lora_export.layers.attachments import Branch, attachment_of, branch_parameter, is_attached
from lora_export.models.blocks import blocks_of
from lora_export.runtime.runner import Arrays
from lora_export.runtime.torch_runners import Fp64Runner
from lora_export.verification import parity
from lora_export.verification.compare_outputs import LARGEST_DEVIATION, distance, same_bits
from lora_export.verification.pair_controls import (
    JudgeWithout,
    PairControls,
    grouped,
    switch_off,
    too_many,
    with_difference,
)

LEAST_RECORDED = 8  # runs for which it pays to record the outputs of blocks
MOST_RECORDED = 1 << 28  # bytes of all outputs of blocks


Ran = TypeVar("Ran")


class _Call(NamedTuple):
    block: nn.Module
    outputs: Any


class RecordedBlocks:
    """The outputs of a module's blocks in one run of it with all pairs.

    With so few `runs` to come that it does not pay, nothing is recorded: each computes all blocks.
    """

    def __init__(self, module: nn.Module, runner: Fp64Runner, inputs: Arrays, *, runs: int):
        self._module, self._run = module, functools.partial(runner.run, inputs)
        self._run_each = functools.partial(runner.run_each, inputs)
        self._blocks = list(blocks_of(module))
        self._calls: list[_Call] = []
        self._bytes = 0
        outputs = self._recorded() if runs >= LEAST_RECORDED else {}
        if self._calls and not self._can_be_left_out(outputs):
            self._calls = []

    def run_without(self, off: Sequence[Branch]) -> Arrays:
        """The outputs of the module without these branches."""
        first = self._first_call(off)
        with layers.without_branches(self._module, off):
            return self._run_from(first, self._run)

    def run_together(self, offs: Sequence[Sequence[Branch]]) -> list[Arrays]:
        """The outputs of the module without each of these groups of branches, in one batch."""
        branches = list(dict.fromkeys(itertools.chain.from_iterable(offs)))
        rows = torch.tensor([[branch not in off for branch in branches] for off in offs])

        def switched(row: torch.Tensor) -> contextlib.AbstractContextManager[None]:
            return layers.switched_branches(self._module, dict(zip(branches, row.unbind(), strict=True)))

        return self._run_from(self._first_call(branches), functools.partial(self._run_each, rows, switched))

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
        return all(same_bits(outputs, self._run_from(first, self._run)) for first in {count // 2, count - 1, count})

    def _first_call(self, off: Collection[Branch]) -> int:
        """How many calls of blocks come before the first that computes one of these branches."""
        changed = [block for block in self._blocks if not _branches(block).isdisjoint(off)]
        called = {call.block for call in self._calls}
        if not called.issuperset(changed) or not set(off) <= set[Branch]().union(*map(_branches, changed)):
            return 0  # one is outside of all blocks, or in one of which a part is called by itself
        return next((number for number, call in enumerate(self._calls) if call.block in changed), 0)

    def _run_from(self, first: int, run: Callable[[], Ran]) -> Ran:
        """Run the module with the recorded outputs of the calls before this one."""
        if not first:
            return run()
        done = 0

        def forward(block: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal done
            number, done = done, done + 1
            if number >= first or self._calls[number].block is not block:
                return original(*args, **kwargs)
            return tree_map(_copied, self._calls[number].outputs)

        with self._forwards(forward):
            return run()

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


def _branches(block: nn.Module) -> set[Branch]:
    return {branch for part in block.modules() if is_attached(part) for branch in attachment_of(part).branches}


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


LARGEST_BATCH = 32  # groups of pairs that are switched off in one batch
MOST_BATCHED = 1 << 27  # bytes of the largest result of one operator, for a whole batch
CLEAR_EFFECT = 10 * LARGEST_DEVIATION  # what pairs that change less are computed by themselves


def outputs_without(
    module: nn.Module, inputs: Arrays, groups: Mapping[str, Sequence[Branch]], on: parity.Outputs
) -> Iterator[tuple[str, Arrays]]:
    """The name of each group, and the module's outputs without its pairs. `on` are the outputs with all pairs.

    Groups are switched off in batches, which are used where they agree with single runs. A group whose effect is near
    the rounding of fp64, and those that no batch can have, are switched off by themselves.
    """
    switchable, alone = _switchable(module), dict(groups)
    together = {name: off for name, off in groups.items() if switchable.issuperset(off)}
    for name, outputs in _in_batches(module, inputs, together, on):
        del alone[name]
        yield name, outputs
    blocks = RecordedBlocks(module, Fp64Runner(module), inputs, runs=len(alone))
    for name, off in alone.items():
        yield name, blocks.run_without(off)


def _in_batches(
    module: nn.Module, inputs: Arrays, groups: Mapping[str, Sequence[Branch]], on: parity.Outputs
) -> Iterator[tuple[str, Arrays]]:
    """As many of the groups as batches can have, and the outputs without each.

    The first is computed by itself, and once more in the first batch. In the last row of each, all pairs are on.
    """
    if len(groups) < 3:
        return
    runner = Fp64Runner(module)
    (first, off), *others = groups.items()
    with layers.without_branches(module, off):
        known = runner.run(inputs)
    yield first, known
    size = min(LARGEST_BATCH, MOST_BATCHED // max(1, runner.largest_result))
    blocks = RecordedBlocks(module, runner, inputs, runs=len(others) // size if size > 1 else 0)
    tested = {"": off}  # of the first batch alone
    for begin in range(0, len(others), size) if size > 1 else ():
        batch = tested | dict(others[begin : begin + size])
        try:
            *found, with_all = blocks.run_together([*batch.values(), []])
        except (RuntimeRefused, RuntimeError, MemoryError):
            return
        checked = [(with_all, on), *([(found[0], known)] if tested else [])]
        if not all(distance(row, single) <= LARGEST_DEVIATION for row, single in checked):
            return
        for name, outputs in zip(batch, found, strict=True):
            if name and same_bits(outputs, with_all):
                yield name, dict(on)
            elif name and distance(outputs, on) > CLEAR_EFFECT:
                yield name, outputs
        tested = {}


def control_pairs(
    module: nn.Module,
    inputs: Mapping[str, Arrays],
    cases: Sequence[parity.Case],
    judge: JudgeWithout,
    *,
    skip: Collection[str] = (),
    detected: Collection[str] = (),
    in_case: Callable[[str], contextlib.AbstractContextManager[None]] | None = None,
) -> PairControls:
    """Switch off the pairs that are attached to a module, and `judge` the outputs.

    The module computes in fp64. `inputs` are by the name of the case. `skip` are modules whose pairs are known to be
    unreached, `detected` the names of those that are known to be detected. Runs of a case are `in_case` of its name.
    """

    def run_without(groups: Mapping[str, Sequence[Branch]], case: parity.Case) -> Iterator[tuple[str, Arrays]]:
        on = case.reference if case.attached is None else case.attached
        with contextlib.nullcontext() if in_case is None else in_case(case.name):
            for name, outputs in outputs_without(module, inputs[case.name], groups, on):
                yield name, outputs if case.attached is None else with_difference(case, outputs, on)

    pairs = [branch for branch in _pairs_with_effect(module) if branch.module not in skip]
    by_layer = too_many(len(pairs), sum(parameter.numel() for parameter in module.parameters()))
    groups = grouped([(branch.module, branch.adapter, branch) for branch in pairs], by_layer=by_layer)
    ordered = sorted(cases, key=lambda case: sum(array.size for array in inputs[case.name].values()))
    return switch_off(groups, ordered, run_without, judge, detected=detected, by_layer=by_layer)


def _switchable(module: nn.Module) -> set[Branch]:
    """The pairs that are branches beside W x, and so can be switched for each row of a batch."""
    return {
        branch
        for owner in module.modules()
        if is_attached(owner) and has_own_branches(attachment_of(owner).original)
        for branch in attachment_of(owner).branches
        if branch.transform is None and branch.region is None
    }


def _pairs_with_effect(module: nn.Module) -> Iterator[Branch]:
    """The pairs that change a weight: whether a pair of zeros is there, or a turn by nothing, makes no difference."""
    for owner in module.modules():
        for branch in attachment_of(owner).branches if is_attached(owner) else ():
            if branch.transform is not None:
                has_effect = branch.scale and not branch.transform.is_identity
            else:
                factors = [branch_parameter(owner, part, branch) for part in ("lora_A", "lora_B")]
                has_effect = branch.dora or (branch.scale and all(bool(factor.any()) for factor in factors))
            if has_effect:
                yield branch
