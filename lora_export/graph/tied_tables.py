"""Heads of a graph that have the table of the input embeddings, as in a tied model.

PEFT trains rows of the input embeddings for all names that are tied to them. The model's config states the ties. A
graph alone does not: it stores the table once for both readers, or twice.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

import numpy as np

from lora_export.errors import InputRefused
from lora_export.graph.find_sites import Sites
from lora_export.graph.site import Site
from lora_export.lora import Adapter
from lora_export.options.spelling import named
from lora_export.plan import Layout, Plan, Step, TensorSpec
from lora_export.sums import ROWS_AT_ONCE

MOST_ROUNDING = 0.5  # of a table: 4 bits move it by a tenth, and two tables of equal norms are 1.4 apart


def with_rows_of_tied_heads(plan: Plan, sites: Sites) -> Plan:
    """The plan of a graph alone, whose rows of an embedding are rows of each head with the same table, too.

    A head with rows or a table of its own in the plan keeps these. Reads the tables where there are such rows. Raises
    InputRefused where such a head has no name, is quantised, or changes in another way.
    """
    tied = [other for step in plan.steps if step.token_rows is not None for other in _tied_steps(step, plan, sites)]
    return replace(plan, steps=(*plan.steps, *tied)) if tied else plan


def _tied_steps(step: Step, plan: Plan, sites: Sites) -> Iterator[Step]:
    table = next((site for site in sites.by_name[step.weight] if site.layout is Layout.EMBEDDING), None)
    if table is None:
        return
    for site in sites.unnamed:
        if _have_one_table(table, site):
            raise InputRefused(
                f"{site.location} has the table of {step.weight}, of which the adapter replaces rows, and no certain "
                f"name. {named('checkpoint', 'CHECKPOINT')}, from which the graph was exported, finds it"
            )
    for spec in sites.specs:
        heads = [site for site in sites.by_name.get(spec.name, ()) if site.is_linear]
        own = plan.by_weight.get(spec.name)
        if spec.name == step.weight or (own is not None and own.has_own_values):
            continue
        if any(_have_one_table(table, head) for head in heads):
            if own is not None:
                raise InputRefused(
                    f"{spec.name} has the table of {step.weight}, of which the adapter replaces rows, and changes in "
                    f"another way, too. Merge the adapter into the checkpoint ({named('tied')}), and export that"
                )
            yield _of_head(step, spec)


def without_unread_rows(adapter: Adapter, names: Collection[str]) -> Adapter:
    """The adapter without rows of a tied table under a name that no graph reads: BART looks `shared` up as others.

    `names` are those that graphs read. Rows that none of these has stay, and are refused.
    """
    read = [rows for name, rows in adapter.token_rows.items() if name in names]
    own = {
        name: rows
        for name, rows in adapter.token_rows.items()
        if name in names or not any(rows.equals(other) for other in read)
    }
    return adapter if own.keys() == adapter.token_rows.keys() else replace(adapter, token_rows=own)


def _of_head(step: Step, spec: TensorSpec) -> Step:
    """The step of the embedding on a head, whose table is (width, words) where its layer is stored (in, out)."""
    step = replace(step, spec=spec)
    if spec.layout is not Layout.IN_OUT or step.token_rows is None:
        return step
    whole = None if step.replace is None else step.replace.T
    return replace(step, replace=whole, token_rows=step.token_rows.transposed)


def _have_one_table(table: Site, head: Site) -> bool:
    """Whether two readers read equal values. Raises InputRefused where one of them reads these values rounded."""
    if head.value is table.value:
        return True
    if len(head.shape) != 2 or (head.shape[::-1] if head.layout is Layout.IN_OUT else head.shape) != table.shape:
        return False
    is_rounded = head.quantised is not None or table.quantised is not None
    first, second, distance, norm = table.array, head.matrix, 0.0, 0.0
    for row in range(0, len(first), ROWS_AT_ONCE):
        one, other = (each[row : row + ROWS_AT_ONCE].astype(np.float32) for each in (first, second))
        if not is_rounded and not np.array_equal(one, other):
            return False
        distance, norm = distance + np.square(one - other).sum(), norm + np.square(one).sum()
    if is_rounded and distance <= MOST_ROUNDING**2 * norm:
        raise InputRefused(
            f"{head.location} is quantised, and its table may be that of the input embeddings, of which the adapter "
            "replaces rows. Merge the adapter into the checkpoint, and export and quantise that"
        )
    return not is_rounded
