"""Combine adapters: within a plan, where all pairs of a weight meet, or by name into one adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_export.adapters.combination import combined_pair
from lora_export.adapters.low_rank import refuse_beyond_pairs
from lora_export.errors import InputRefused, listed
from lora_export.lora import Adapter
from lora_export.options.combining import Combination
from lora_export.options.spelling import named
from lora_export.plan import Plan, Term
from lora_export.plan.build import checked_strengths


@dataclass(frozen=True, eq=False)
class CombinedTerm(Term):
    """The pair that takes the place of several. Its adapter is the first of them."""

    text: str = ""

    def __str__(self) -> str:
        return self.text


def combine_in_plan(plan: Plan, combination: Combination, together: Sequence[str] = ()) -> Plan:
    """The plan with one pair on each weight, combined from the pairs of all adapters. The exact sum is the plan itself.

    Where the plan is that of one model of a pipeline, `together` are the names of all adapters: one alone may change
    this model, and its pairs go through the method as those of a weight that one adapter changes.

    Raises InputRefused for adapters that change more than pairs can express, and for pairs that the method cannot
    combine, with the names of the weights.
    """
    if combination.is_exact:
        return plan
    refuse_beyond_pairs(plan.adapters, named("combine", combination.method))
    names = together or [adapter.name for adapter in plan.adapters]
    if len(names) < 2:
        raise InputRefused(f"{named('combine', combination.method)} combines several adapters, and there is one")
    terms = {step.weight: step.terms for step in plan.steps}
    combined = _combined(terms, combination, plan.adapters, names)
    steps = tuple(dataclasses.replace(step, terms=(combined[step.weight],)) for step in plan.steps)
    note = f"the pairs of each weight are combined by {combination}, as PEFT does: not the exact sum"
    return dataclasses.replace(plan, steps=steps, notes=(*plan.notes, note))


def combine_adapters(
    adapters: Sequence[Adapter], strengths: Sequence[float], combination: Combination, name: str
) -> Adapter:
    """One adapter of several, called `name`: one pair of scale 1 for each module that any of them has.

    Modules are the same where their names are. Raises InputRefused as `combine_in_plan`, for one that has no effect,
    and where an adapter is given twice.
    """
    strengths = checked_strengths(adapters, strengths)
    refuse_beyond_pairs(adapters, "a combined adapter")
    if len(adapters) < 2 and not combination.is_exact:
        raise InputRefused(f"{named('combine', combination.method)} combines several adapters, and there is one")
    terms: dict[str, tuple[Term, ...]] = {}
    for adapter, strength in zip(adapters, strengths, strict=True):
        for module, pair in adapter.pairs.items():
            terms[module] = (*terms.get(module, ()), Term(adapter.name, module, pair, strength))
    combined = _combined(terms, combination, adapters, [adapter.name for adapter in adapters])
    metadata = [adapter.metadata for adapter in adapters]
    shared = {key: value for key, value in metadata[0].items() if all(other.get(key) == value for other in metadata)}
    kept = ("task_type", "base_model_name_or_path")
    is_known = all(adapter.targets for adapter in adapters)
    return Adapter(
        name=name,
        format="combined",
        pairs={module: term.pair for module, term in combined.items()},
        layouts=_layouts(adapters),
        # The endings of all; none where those of one are not fully known.
        targets=tuple(sorted({target for adapter in adapters for target in adapter.targets})) if is_known else (),
        spelling={module: adapter.spelled(module) for adapter in adapters[::-1] for module in adapter.pairs},
        metadata={key: shared[key] for key in kept if key in shared},
    )


def combined_unless_exact(
    adapters: Sequence[Adapter], strengths: Sequence[float], combination: Combination
) -> tuple[list[Adapter], Sequence[float]]:
    """Adapters that have the same names for the same layers, combined into one, with its strengths.

    The exact sum needs no such adapter: they are returned as they are. Raises InputRefused as `combine_adapters`.
    """
    if combination.is_exact:
        return list(adapters), strengths
    name = "+".join(adapter.name for adapter in adapters)
    return [combine_adapters(adapters, strengths, combination, name)], ()


def _combined(
    terms: Mapping[str, Sequence[Term]], combination: Combination, adapters: Sequence[Adapter], names: Sequence[str]
) -> dict[str, Term]:
    numbers = {name: number for number, name in enumerate(names)}
    by_name = {adapter.name: adapter for adapter in adapters}
    largest = max(term.pair.rank for own in terms.values() for term in own)
    combined: dict[str, Term] = {}
    problems = []
    for name, own in terms.items():
        # Random entries depend on the names in the files, not on those of the base.
        in_files = [dataclasses.replace(one, module=by_name[one.adapter].spelled(one.module)) for one in own]
        try:
            pair = combined_pair(combination, in_files, numbers, largest)
            text = f"B A (rank {pair.rank}), {combination.method} of {' and '.join(map(str, own))}"
            combined[name] = CombinedTerm(own[0].adapter, own[0].module, pair, text=text)
        except InputRefused as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise InputRefused(
            f"{len(problems)} of {len(terms)} weights cannot be combined by {combination.method}. Nothing was written.",
            listed(problems),
        )
    return combined


def _layouts(adapters: Sequence[Adapter]) -> dict[str, str]:
    """How the weights are stored, where an adapter records it. Raises InputRefused where two contradict each other."""
    layouts: dict[str, str] = {}
    for adapter in adapters:
        for module, layout in adapter.layouts.items():
            if layouts.setdefault(module, layout) != layout:
                raise InputRefused(
                    f"{module}: {adapter.name} was trained on a weight that is stored as {layout}, another adapter on "
                    f"one that is stored as {layouts[module]}"
                )
    return layouts
