"""The control of every pair of a module: a candidate that lacks one pair of the adapters must be detected.

The controls of a verdict switch the adapters off together. A gate that detects that may still miss one pair of many:
in half precision the rounding of a whole model is larger than what most pairs of a query and a key change. So each
pair is switched off by itself, in fp64, and the gates are applied to the outputs as if they were a candidate's. Where
they detect nothing, all errors of the candidate together show whether it lacks this pair (parity/missing_part.py).
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import nn

from lora_export import layers
from lora_export.layers.attachments import Branch, attachment_of, branch_parameter, is_attached
from lora_export.runtime.runner import Arrays
from lora_export.runtime.torch_runners import Fp64Runner
from lora_export.verification import parity
from lora_export.verification.pair_controls import (
    JudgeWithout,
    PairControls,
    grouped,
    switch_off,
    too_many,
    with_difference,
)
from lora_export.verification.references.recorded_blocks import RecordedBlocks

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
            factors = [branch_parameter(owner, part, branch) for part in ("lora_A", "lora_B")]
            if branch.dora or (branch.scale and all(bool(factor.any()) for factor in factors)):
                yield branch
