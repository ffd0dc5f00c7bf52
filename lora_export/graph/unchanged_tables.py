"""Tables that an adapter repeats: PEFT saves the base's own embeddings beside the pair that changes them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lora_export.graph.find_sites import Sites
from lora_export.graph.merge.isolate import as_stored
from lora_export.plan import Plan, Step


def without_unchanged_tables(plan: Plan, sites: Sites) -> Plan:
    """The plan without the whole tensors that are equal to the graph's own, beside pairs that change them."""
    return replace(plan, steps=tuple(_without_equal_table(step, sites) for step in plan.steps))


def _without_equal_table(step: Step, sites: Sites) -> Step:
    if not step.terms or step.replace is None:
        return step
    own_sites = sites.by_name.get(step.weight, ())
    for site in own_sites:
        table = as_stored(step, site).replace
        if site.quantised is not None or table is None:
            return step
        own = site.tensor.numpy()[site.block_slices]
        if not np.array_equal(own, table.astype(own.dtype)):
            return step
    return replace(step, replace=None) if own_sites else step
