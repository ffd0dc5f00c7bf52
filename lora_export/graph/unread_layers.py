"""Pairs on layers of a model that its graph lacks, since no output reads them: a pooler, or a last block of a tower.

PEFT trains B from zeros, and no gradient reaches such a layer: its pair has no effect, and is left out with a note.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from lora_export.errors import MatchError, first_of
from lora_export.lora import Adapter
from lora_export.options.spelling import command, named
from lora_export.plan import Step
from lora_export.plan.match_tensors import NO_WEIGHT

SHOWN_UNREAD = 5


class ReadLayers(NamedTuple):
    """Adapters without their pairs on layers that no output reads, and what was left out."""

    adapters: list[Adapter]
    notes: list[str]


def without_idle_pairs(adapters: Sequence[Adapter], error: MatchError) -> ReadLayers:
    """The adapters without pairs of no effect for which a graph has no weight. The model has these weights.

    Raises the error, with a way out, where other tensors do not fit the graph either, or nothing of an adapter is left.
    """
    missing = {(misfit.adapter, misfit.key) for misfit in error.misfits if misfit.problem.startswith(NO_WEIGHT)}
    kept, notes, left_out = [], [], 0
    for adapter in adapters:
        idle = {
            name: None
            for name, pair in adapter.pairs.items()
            if pair.is_identity and (adapter.name, adapter.spelled(name)) in missing
        }
        pairs = {name: pair for name, pair in adapter.pairs.items() if name not in idle}
        kept.append(replace(adapter, pairs=pairs) if idle else adapter)
        left_out += len(idle)
        if idle:
            notes.append(f"{adapter.name} has pairs without effect on {_unread(list(idle))}: left out")
    if left_out < len(error.misfits) or not all(adapter.every_name for adapter in kept):
        if len(missing) < len(error.misfits) or error.remedy:
            raise error
        raise not_in_graph(error, way_to_unread())
    return ReadLayers(kept, notes)


def without_idle_steps(steps: Sequence[Step]) -> tuple[list[Step], list[str]]:
    """The steps on weights that no graph of a model has, without those that change nothing, and a note on these."""

    def is_idle(step: Step) -> bool:
        only_pairs = bool(step.terms) and step.shift is None and not step.has_own_values
        return only_pairs and all(term.pair.is_identity for term in step.terms)

    names = [step.weight.removesuffix(".weight") for step in steps if is_idle(step)]
    notes = [f"the pairs on {_unread(names)}, have no effect: left out"] if names else []
    return [step for step in steps if not is_idle(step)], notes


def not_in_graph(error: MatchError, remedy: str) -> MatchError:
    """The same error, about the graph in place of the base."""
    return error.with_words(NO_WEIGHT, "the graph has no weight for").with_remedy(remedy)


def way_to_unread() -> str:
    """What helps where an adapter changes such a layer."""
    return (
        "The model has these layers, and its graph does not: no output reads them for the inputs of the export. Merge "
        f"the adapter into the checkpoint ({command('merge', 'BASE', 'ADAPTER')}), and export that; where other inputs "
        f"reach these layers, give them ({named('inputs', 'FILE.npz')})"
    )


def _unread(names: Sequence[str]) -> str:
    return f"{first_of(names, SHOWN_UNREAD)}, which no output of the graph reads"
