"""Pairs on layers of a model that its graph lacks, since no output reads them: a pooler, or a last block of a tower.

PEFT trains B from zeros, and no gradient reaches such a layer: its pair has no effect, and is left out with a note.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_export.errors import MatchError, Misfit, first_of
from lora_export.options.spelling import command, named
from lora_export.plan import Step

SHOWN_UNREAD = 5


def notes_on_unread(steps: Sequence[Step], *, planned: Sequence[Step]) -> list[str]:
    """The notes on steps without effect on weights that no graph of a model has: they are left out.

    Raises MatchError, with a way out, where other steps are among them. `planned` are all steps of the plan.
    """
    if lost := [step for step in steps if not _is_idle(step)]:
        remedy = (
            "The model has these layers, and its graph does not: no output reads them for the inputs of the export. "
            f"Merge the adapter into the checkpoint ({command('merge', 'BASE', 'ADAPTER')}), and export that; where "
            f"other inputs reach these layers, give them ({named('inputs', 'FILE.npz')})"
        )
        raise not_in_graph(lost, remedy, planned=planned)
    layers: dict[str, list[str]] = {}
    for step in steps:
        for adapter in step.adapters:
            layers.setdefault(adapter, []).append(_layer(step))
    return [
        f"the pairs of {adapter} on {first_of(own, SHOWN_UNREAD)}, which no output of the graph reads, have no effect: "
        "left out"
        for adapter, own in layers.items()
    ]


def not_in_graph(steps: Sequence[Step], remedy: str, *, planned: Sequence[Step]) -> MatchError:
    """The error for steps on weights that a graph lacks, among all that are planned."""
    misfits = [
        Misfit(adapter, _layer(step), f"the graph has no weight for {_layer(step)}")
        for step in steps
        for adapter in step.adapters
    ]
    return MatchError(misfits, targets=sum(len(step.adapters) for step in planned), remedy=remedy)


def _is_idle(step: Step) -> bool:
    only_pairs = bool(step.terms) and step.shift is None and not step.has_own_values
    return only_pairs and all(term.pair.is_identity for term in step.terms)


def _layer(step: Step) -> str:
    return step.weight.removesuffix(".weight")
