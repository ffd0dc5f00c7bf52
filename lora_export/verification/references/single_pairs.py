"""The control of every pair: a candidate that lacks one pair of the adapters must be detected.

The controls of a verdict switch the adapters off together. A gate that detects that may still miss one pair of many:
in half precision the rounding of a whole model is larger than what most pairs of a query and a key change. So each
pair is switched off by itself, in fp64, and the gates are applied to the outputs as if they were a candidate's. Where
they detect nothing, all errors of the candidate together show whether it lacks this pair (parity/missing_part.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
from torch import nn

from lora_export import layers
from lora_export.layers.adapted_layers import Branch, attachment_of, branch_parameter, is_attached
from lora_export.runtime.runner import Arrays
from lora_export.runtime.torch_runners import Fp64Runner
from lora_export.verification import parity
from lora_export.verification.pair_controls import PairControls

# Pairs × parameters up to which each pair is switched off by itself: some minutes. Beyond, the pairs of a layer are.
LARGEST_EFFORT = 2e10

Judge = Callable[[parity.Case, parity.Outputs], parity.MissingPart]


def control_pairs(
    module: nn.Module,
    inputs: Mapping[str, Arrays],
    cases: Sequence[parity.Case],
    judge: Judge,
    *,
    skip: Collection[str] = (),
    detected: Collection[str] = (),
) -> PairControls:
    """Switch off the pairs that are attached to a module, and `judge` the outputs.

    The module computes in fp64. `inputs` are by the name of the case. The smallest case comes first. Another one
    follows only for the pairs that were not detected so far. `skip` are modules whose pairs are known to be unreached,
    `detected` the names of those that are known to be detected.
    """
    groups, by_layer = _groups(module, skip)
    undetected = {name: off for name, off in groups.items() if name not in detected}
    silent = set(undetected)
    shares = dict.fromkeys(groups, parity.EffectShare())
    runner = Fp64Runner(module)
    for case in sorted(cases, key=lambda case: sum(array.size for array in inputs[case.name].values())):
        for name, off in list(undetected.items()):
            with layers.without_branches(module, off):
                outputs = runner.run(inputs[case.name])
            found = judge(case, _without_rounding(case, outputs))
            shares[name] += found.share
            if found.changes_outputs:
                silent.discard(name)
            if found.is_detected:
                del undetected[name]
    missing = {name: shares[name].missing for name in undetected if name not in silent}
    return PairControls(
        tuple(groups),
        without_effect=tuple(name for name in undetected if name in silent),
        missed=tuple(name for name, share in missing.items() if share is None),
        shares={name: share for name, share in missing.items() if share is not None},
        by_layer=by_layer,
    )


def _groups(module: nn.Module, skip: Collection[str]) -> tuple[dict[str, list[Branch]], bool]:
    """Name -> the pairs to switch off together, and whether these are all pairs of a layer."""
    pairs = [branch for branch in _pairs_with_effect(module) if branch.module not in skip]
    by_layer = len(pairs) * sum(parameter.numel() for parameter in module.parameters()) > LARGEST_EFFORT
    several = len({branch.adapter for branch in pairs}) > 1
    groups: dict[str, list[Branch]] = {}
    for branch in pairs:
        name = _layer_of(branch.module) if by_layer else branch.module
        groups.setdefault(f"{name} of {branch.adapter}" if several else name, []).append(branch)
    return groups, by_layer


def _pairs_with_effect(module: nn.Module) -> Iterator[Branch]:
    """The pairs whose product is not zero: whether a pair of zeros is there makes no difference."""
    for owner in module.modules():
        for branch in attachment_of(owner).branches if is_attached(owner) else ():
            factors = [branch_parameter(owner, part, branch) for part in ("lora_A", "lora_B")]
            if branch.dora or (branch.scale and all(bool(factor.any()) for factor in factors)):
                yield branch


def _layer_of(name: str) -> str:
    """`model.layers.3` of `model.layers.3.self_attn.q_proj`; the whole name where it has no number."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else name


def _without_rounding(case: parity.Case, outputs: Arrays) -> Arrays:
    """The reference's outputs without the pairs, from those of the module without them.

    They are the same, unless the reference rounds its weights: the module does not. Then the difference that the pairs
    make in the module is added to the reference's outputs.
    """
    if case.attached is None:
        return outputs
    wrong = {}
    for name, off in outputs.items():
        reference, on = case.reference[name], case.attached[name]
        with np.errstate(invalid="ignore"):  # inf - inf
            wrong[name] = np.where(np.isfinite(off) & np.isfinite(on), reference + (off - on), off)
    return wrong
