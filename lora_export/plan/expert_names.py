"""Stacked pairs that have the name of one projection of every expert: `experts.w1`, and not `experts.gate_up_proj`.

A base names the projection of one expert: `experts.3.w1`, or `experts.3.gate_proj`. Which of the two it uses is tried.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lora_export.lora import Adapter, ExpertAxes, split_part

# The names of one projection: Mixtral's, and those of most others.
PROJECTIONS = (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj"))
FAMILIES = (0, 1)


def per_expert(adapter: Adapter) -> Iterator[Adapter]:
    """The adapter with its stacked projections as modules of single experts, once for each family of names.

    Nothing where it has no such projections. They are (out, in), as the weights of linear layers are.
    """
    stacked = {parameter for parameter, axes in adapter.experts.items() if axes is ExpertAxes.OUT_IN}
    projections = {parameter: names for parameter in stacked if (names := _projection(parameter))}
    for family in FAMILIES if projections else ():
        pairs, spelling = {}, dict(adapter.spelling)
        for module, pair in adapter.pairs.items():
            parameter, expert = split_part(module)
            if parameter in projections:
                name = f"{parameter.rpartition('.')[0]}.{expert}.{projections[parameter][family]}"
                pairs[name], spelling[name] = replace(pair, as_stored=False), adapter.spelled(module)
            else:
                pairs[module] = pair
        left = {parameter: axes for parameter, axes in adapter.experts.items() if parameter not in projections}
        yield replace(adapter, pairs=pairs, spelling=spelling, experts=left)


def _projection(parameter: str) -> tuple[str, str] | None:
    last = parameter.rpartition(".")[2]
    return next((names for names in PROJECTIONS if last in names), None)
