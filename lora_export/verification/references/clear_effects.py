"""Which pairs change the outputs by far more than the limits: by one backward pass, without a run for each pair.

A factor on a pair is 1 where the pair is on, and 0 where it is off. The derivative of the outputs with respect to it is
the pair's effect, to first order. One backward pass gives the products of all effects with one random direction. The
product with an effect is normally distributed, and its deviation is the effect's length. So a product that is many
times as large as a limit shows that the effect is larger than the limit. A small one shows nothing.

The pair with the smallest of these products is also switched off. The product with what that changes must agree with
its derivative. Otherwise the module is no smooth function of its pairs, and nothing is taken from derivatives.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from lora_export import layers
from lora_export.errors import RuntimeRefused
from lora_export.layers.attachments import Branch
from lora_export.runtime.runner import Arrays
from lora_export.runtime.torch_runners import Fp64Runner
from lora_export.verification.parity import Outputs, Wide

# Limits that a product is larger than. By chance it is 8 times as large as the effect in one of 1e15 cases, and an
# effect may be half of what its derivative is.
CLEAR = 16.0
SAME_EFFECT = 0.5  # relative difference of an effect from its derivative


def clear_effects(
    runner: Fp64Runner,
    inputs: Arrays,
    groups: Mapping[str, Sequence[Branch]],
    weights: Mapping[str, Wide],
    change_without: Callable[[str], Outputs | None],
) -> frozenset[str]:
    """The groups of pairs without which the outputs are far beyond the limits.

    `weights` make an error at the limit one of length 1. `change_without` switches off one group, and gives what that
    changes in the outputs; None where the gates do not detect it. Where derivatives cannot be had, no group is clear.
    """
    rng = np.random.default_rng(0)
    direction = {name: rng.standard_normal(weight.shape) * weight for name, weight in weights.items()}
    try:
        products = _products(runner, inputs, groups, direction)
    except (RuntimeRefused, RuntimeError, MemoryError):
        return frozenset()
    least = CLEAR * math.sqrt(max(1, len(weights)))
    clear = {name: product for name, product in products.items() if least <= abs(product) < math.inf}
    weakest = min(clear, key=lambda name: abs(clear[name]), default="")
    change = change_without(weakest) if clear else None
    if change is None:
        return frozenset()
    exact = -sum(float(np.sum(each * change[name])) for name, each in direction.items())
    return frozenset(clear) if abs(exact - clear[weakest]) <= SAME_EFFECT * abs(clear[weakest]) else frozenset()


def _products(
    runner: Fp64Runner, inputs: Arrays, groups: Mapping[str, Sequence[Branch]], direction: Mapping[str, Wide]
) -> dict[str, float]:
    """Group -> the product of its effect, to first order, with a direction."""
    factors = {branch: torch.ones((), requires_grad=True) for branch in itertools.chain.from_iterable(groups.values())}

    def product(outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack([(outputs[name] * torch.from_numpy(each)).sum() for name, each in direction.items()]).sum()

    with layers.switched_branches(runner.module, factors):
        found = dict(zip(factors, runner.gradients(inputs, product, list(factors.values())), strict=True))
    return {name: sum(found[branch] for branch in off) for name, off in groups.items()}
