"""Readers in a graph that have the table of the input embeddings, as in a tied model.

PEFT trains rows of the input embeddings for all names that are tied to them. The config of a checkpoint states the
ties. A graph alone does not: it stores the table once for all readers, or again for each. There equal tables are tied.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from lora_export.errors import InputRefused
from lora_export.graph.find_sites import Sites
from lora_export.graph.site import Site
from lora_export.lora import Adapter
from lora_export.plan import Layout, Plan, Step, TensorSpec, Tied
from lora_export.plan.match_names import BaseTensors
from lora_export.plan.spelling import spell
from lora_export.plan.ties import refuse_lost_rows
from lora_export.plan.types import are_same_change
from lora_export.sums import ROWS_AT_ONCE

if TYPE_CHECKING:
    from lora_export.weights.checkpoint import Checkpoint

MOST_ROUNDING = 0.5  # of a table: 4 bits move it by a tenth, and two tables of equal norms are 1.4 apart


def with_rows_of_equal_tables(plan: Plan, sites: Sites, checkpoint: Checkpoint | None) -> Plan:
    """The plan of an existing graph, whose rows of an embedding are rows of each reader with the same table, too.

    A reader with rows or a table of its own in the plan keeps these, where they are of the same adapters. `checkpoint`
    is what the graph was exported from: where its model ties nothing, the plan stays. Reads the tables where there are
    such rows. Raises InputRefused where such a reader has no name, may have the table rounded, or changes in another
    way, and where the model ties tables that the checkpoint stores with other values.
    """
    if not any(step.token_rows is not None for step in plan.steps):
        return plan
    if checkpoint is not None:
        from lora_export.weights.tied_tensors import is_tied  # few graphs are given with their checkpoint

        if is_tied(checkpoint) is False:
            return plan
        _refuse_rows_of_one(plan.adapters, checkpoint)
    tied: dict[str, Step] = {}
    for step in plan.steps:
        for other in _tied_steps(step, plan, sites) if step.token_rows is not None else ():
            if other.weight in tied and not are_same_change(tied[other.weight], other):
                raise InputRefused(f"{other.weight} has the values of two tables, of which adapters replace other rows")
            tied[other.weight] = other
    return replace(plan, steps=(*plan.steps, *tied.values())) if tied else plan


def tie_notes(before: Plan, after: Plan) -> list[str]:
    """What `with_rows_of_equal_tables` took for tied."""
    added = [step.weight for step in after.steps if step.weight not in before.by_weight]
    return [f"{', '.join(added)}: equal to the input embeddings, so taken for tied to them"] if added else []


def _refuse_rows_of_one(adapters: Sequence[Adapter], checkpoint: Checkpoint) -> None:
    """Raise InputRefused as a merge into the checkpoint. The graph cannot show it: transformers ties equal tables."""
    from lora_export.weights.tied_tensors import ties_of

    base = BaseTensors(checkpoint.specs)
    spelled = [spell(adapter, base, checkpoint.rules) for adapter in adapters if adapter.token_rows]
    ties = replace(ties_of(checkpoint, Tied.ERROR), remedy="Merge the adapter into the checkpoint, and export that")
    ties.classified((one.adapter, one.prefix) for one in spelled)


def _tied_steps(step: Step, plan: Plan, sites: Sites) -> Iterator[Step]:
    table = next((site for site in sites.by_name[step.weight] if site.layout is Layout.EMBEDDING), None)
    if table is None:
        return
    for site in sites.unnamed:
        if _have_one_table(table, site):
            raise InputRefused(
                f"{site.location} has the table of {step.weight}, of which the adapter replaces rows, and no certain "
                "name. Merge the adapter into the checkpoint, and export that"
            )
    for spec in sites.specs:
        readers = [site for site in sites.by_name.get(spec.name, ()) if site.layout is not Layout.OTHER]
        own = plan.by_weight.get(spec.name)
        if spec.name == step.weight:
            continue
        if own is not None and own.has_own_values and set(step.values_of) <= set(own.values_of):
            continue
        if any(_have_one_table(table, reader) for reader in readers):
            if own is not None:
                refuse_lost_rows(step, own)
                raise InputRefused(
                    f"{spec.name} has the table of {step.weight}, of which the adapter replaces rows, and changes in "
                    "another way, too. Merge the adapter into the checkpoint, and export that"
                )
            yield _of_reader(step, spec)


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


def _of_reader(step: Step, spec: TensorSpec) -> Step:
    """The step of the embedding on another reader. Its table is (width, words) where its layer is stored (in, out)."""
    step = replace(step, spec=spec)
    if spec.layout is not Layout.IN_OUT or step.token_rows is None:
        return step
    whole = None if step.replace is None else step.replace.T
    return replace(step, replace=whole, token_rows=step.token_rows.transposed)


def _have_one_table(table: Site, head: Site) -> bool:
    """Whether two readers read equal values. Raises InputRefused where one of them may read these values rounded."""
    if head.value is table.value:
        return True
    if len(head.shape) != 2 or (head.shape[::-1] if head.layout is Layout.IN_OUT else head.shape) != table.shape:
        return False
    first, second, distance, norm = table.array, head.matrix, 0.0, 0.0
    is_rounded = head.quantised is not None or table.quantised is not None or first.dtype != second.dtype
    for row in range(0, len(first), ROWS_AT_ONCE):
        one, other = (each[row : row + ROWS_AT_ONCE].astype(np.float32) for each in (first, second))
        if not is_rounded and not np.array_equal(one, other):
            return False
        distance, norm = distance + np.square(one - other).sum(), norm + np.square(one).sum()
    if is_rounded and distance <= MOST_ROUNDING**2 * norm:
        raise InputRefused(
            f"the table of {head.location} may be that of the input embeddings, of which the adapter replaces rows: it "
            "is as close as rounding makes it. Merge the adapter into the checkpoint, and export that"
        )
    return not is_rounded
