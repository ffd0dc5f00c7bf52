"""Which pairs change the outputs by far more than the gates allow, found without switching each of them off.

What a pair changes is, to first order, a derivative: that of the outputs by a factor on the pair, at 1. One backward
pass gives the derivative of a weighted sum of the outputs for all pairs at once. With random weights such a sum is a
normal number, and its spread is the size of what the pair changes. So a few sums bound that size from below.

A pair is clear where this bound is EFFECT_MARGIN times what the gates allow: they would detect that it is missing.
Some of the clear pairs are switched off all the same. Where one of these changes the outputs in another way than its
derivative, or is not detected, no pair is clear. On a Llama of 98 pairs, of effects from 9e-7 to 0.05 of the outputs,
what pairs changed was within 5 % of their derivatives.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from lora_export import layers
from lora_export.errors import RuntimeRefused
from lora_export.layers.attachments import Branch
from lora_export.runtime.runner import Arrays
from lora_export.runtime.torch_runners import Fp64Runner
from lora_export.verification.parity import Outputs, Wide

SUMS = 8  # random sums of the outputs
# The root of the sum of squares of eight normal numbers of spread 1 is larger than this once in 1e15.
LARGEST_LENGTH = 9.5
EFFECT_MARGIN = 32.0  # a derivative describes small changes alone
TRIED = 4  # clear groups that are switched off
LARGEST_CURVATURE = 0.5  # of what a group changes, relative to its derivative

PairGroups = Mapping[str, Sequence[Branch]]
ErrorLimits = Mapping[str, float]  # of each output that counts: the rms of a change from which the gates detect it


@dataclass(frozen=True, eq=False)
class ClearEffects:
    """PairGroups of pairs that are clearly detected, if those of them that are `tried` agree with their derivatives."""

    on: Outputs  # with all pairs
    sums: Sequence[Arrays]  # the weights of each
    derivatives: Mapping[str, Wide]  # of each sum, by group
    tried: frozenset[str]

    @property
    def untried(self) -> frozenset[str]:
        """The groups that need not be switched off."""
        return frozenset(self.derivatives) - self.tried

    def agrees(self, name: str, without: Outputs, *, is_detected: bool) -> bool:
        """Whether outputs without a group are what is expected of them; True of a group that is not clear."""
        if name not in self.derivatives:
            return True
        changes = [sum(float(np.sum(own[one] * (self.on[one] - without[one]))) for one in own) for own in self.sums]
        curvature = np.linalg.norm(changes - self.derivatives[name])
        return is_detected and bool(curvature <= LARGEST_CURVATURE * np.linalg.norm(self.derivatives[name]))


def clear_effects(
    module: nn.Module, inputs: Arrays, groups: PairGroups, on: Outputs, limits: ErrorLimits
) -> ClearEffects:
    """The groups of pairs whose absence the gates detect by a margin; none where PyTorch derives no outputs.

    `on` are the outputs with all pairs. The pairs are branches beside W x.
    """
    sums = [_weights(on, limits, seed) for seed in range(SUMS)]
    try:
        derivatives = _derivatives(module, inputs, groups, sums) if groups and limits else {}
    except (RuntimeRefused, RuntimeError, MemoryError):
        derivatives = {}
    lengths = {name: float(np.linalg.norm(own)) for name, own in derivatives.items()}
    least = EFFECT_MARGIN * LARGEST_LENGTH * np.sqrt(len(limits))
    clear = sorted((name for name, length in lengths.items() if length > least), key=lengths.__getitem__)
    tried = clear[:: max(1, len(clear) // TRIED)]
    return ClearEffects(on, sums, {name: derivatives[name] for name in clear}, frozenset(tried))


def _weights(on: Outputs, limits: ErrorLimits, seed: int) -> Arrays:
    """Random weights. A change as large as the limit of an output has a sum of spread 1."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(on[name].shape) / (limit * np.sqrt(on[name].size)) for name, limit in limits.items()
    }


def _derivatives(module: nn.Module, inputs: Arrays, groups: PairGroups, sums: Sequence[Arrays]) -> dict[str, Wide]:
    """Group -> the derivative of each sum by a factor on its pairs."""
    branches = list(dict.fromkeys(itertools.chain.from_iterable(groups.values())))
    places = {branch: place for place, branch in enumerate(branches)}

    def scaled(factors: torch.Tensor) -> contextlib.AbstractContextManager[None]:
        return layers.switched_branches(module, dict(zip(branches, factors.unbind(), strict=True)))

    found = Fp64Runner(module).derivatives(inputs, torch.ones(len(branches)), scaled, sums)
    return {name: found[:, [places[branch] for branch in off]].sum(axis=1) for name, off in groups.items()}
