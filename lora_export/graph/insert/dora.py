"""The factors of DoRA: each output is multiplied by m / ‖W + sBA‖, from the weights that the graph stores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from lora_export import sums
from lora_export.errors import InputRefused
from lora_export.graph.site import Site
from lora_export.plan import Layout, Step

OUTPUTS_AT_ONCE = 512  # outputs of a weight whose norms are computed in fp64 at a time


def site_dora_factors(step: Step, site: Site) -> NDArray[np.float64]:
    """m / ‖W + sBA‖ of each output, in fp64: (out,); of a convolution, (out, 1...).

    Reads the whole weight of the site. Raises InputRefused where an output of W + sBA is zero.
    """
    (term,) = step.terms  # a plan allows no second adapter where one has DoRA
    matrix = site.array.T if site.layout is Layout.EMBEDDING else site.matrix
    weight = matrix.reshape(term.pair.shape[0], -1)
    a = term.pair.a.reshape(term.pair.rank, -1).astype(np.float64)
    b = term.pair.b.reshape(-1, term.pair.rank).astype(np.float64) * term.scale
    parts = [slice(begin, begin + OUTPUTS_AT_ONCE) for begin in range(0, len(weight), OUTPUTS_AT_ONCE)]
    squares = np.concatenate([sums.squared_norms(weight[part].astype(np.float64) + b[part] @ a) for part in parts])
    return sums.dora_factors(step, squares).reshape(-1, *[1] * (term.pair.a.ndim - 2))


def dora_factors_by_weight(
    steps: Iterable[Step], adapter: str, sites_of: Callable[[str], Sequence[Site]]
) -> dict[str, NDArray[np.float64]]:
    """The factors of all weights that one adapter changes by DoRA, by weight. All readers of a weight share a factor.

    `sites_of` returns the sites of a weight. Raises InputRefused where they store different numbers, and as
    `site_dora_factors` does.
    """
    factors = {}
    for step in steps:
        own = step.for_adapter(adapter)
        if own is not None and own.magnitude is not None:
            factors[step.weight] = _common_factor(own, sites_of(step.weight))
    return factors


def _common_factor(step: Step, sites: Sequence[Site]) -> NDArray[np.float64]:
    first, *others = {(site.holder, site.block): site for site in sites}.values()
    factor = site_dora_factors(step, first)
    for site in others:
        if not np.array_equal(site_dora_factors(step, site), factor):
            raise InputRefused(
                f"{step.weight} is stored more than once in the graph, with different numbers: DoRA would need a "
                "factor for each. Merge the adapter into the weights instead"
            )
    return factor
