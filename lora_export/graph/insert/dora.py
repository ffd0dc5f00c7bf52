"""What DoRA multiplies each output by: m / ‖W + sBA‖, from the weights that a graph itself stores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from lora_export import sums
from lora_export.errors import InputRefused
from lora_export.graph.readers import Site
from lora_export.plan import Layout, Step

OUTPUTS = 512  # of a weight, whose lengths are computed in fp64 at a time


def length_factor(step: Step, site: Site) -> NDArray[np.float64]:
    """m / ‖W + sBA‖ of each output (out,), a convolution's (out, 1...), in fp64.

    Reads what the site stores, whole. Raises InputRefused where an output of W + sBA is zero.
    """
    (term,) = step.terms  # a plan lets no other of its adapter stand beside DoRA
    matrix = site.array.T if site.layout is Layout.EMBEDDING else site.matrix
    weight = matrix.reshape(term.pair.shape[0], -1)
    a = term.pair.a.reshape(term.pair.rank, -1).astype(np.float64)
    b = term.pair.b.reshape(-1, term.pair.rank).astype(np.float64) * term.scale
    parts = [slice(begin, begin + OUTPUTS) for begin in range(0, len(weight), OUTPUTS)]
    squares = np.concatenate([sums.squared_norms(weight[part].astype(np.float64) + b[part] @ a) for part in parts])
    return sums.dora_factors(step, squares).reshape(-1, *[1] * (term.pair.a.ndim - 2))


def length_factors(
    steps: Iterable[Step], adapter: str, site_of: Callable[[str], Sequence[Site]]
) -> dict[str, NDArray[np.float64]]:
    """For each weight that one adapter changes by DoRA, the factor of its outputs, which all readers have to share.

    `site_of` tells where a weight is read. Raises InputRefused where readers hold different numbers, and as
    `length_factor` does.
    """
    found = {}
    for step in steps:
        own = step.for_adapter(adapter)
        if own is not None and own.magnitude is not None:
            found[step.weight] = _shared(own, site_of(step.weight))
    return found


def _shared(step: Step, there: Sequence[Site]) -> NDArray[np.float64]:
    first, *others = {(site.holder, site.block): site for site in there}.values()
    factor = length_factor(step, first)
    for site in others:
        if not np.array_equal(length_factor(step, site), factor):
            raise InputRefused(
                f"{step.weight} is stored more than once in the graph, and not with the same numbers: DoRA would need "
                "a factor for each. Merge the adapter into the weights instead"
            )
    return factor
