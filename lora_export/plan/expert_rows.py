"""Pairs of some rows of an expert, such as its gate, where a graph has each expert as one weight of its own.

The pair of the whole expert has zeros in the other rows of B. Several parts of one expert are one pair: their A along
the rank, and each B in its own rows and ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from lora_export.lora import Adapter, LoraPair, expert_name, split_part
from lora_export.plan.types import TensorSpec

ROWS_OF_EXPERT = re.compile(r"(\d+), (\d+):(\d+)")


def with_stacks(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """The specs of a graph, and the stacked parameter of each group of experts that it has as weights of their own."""
    specs = list(specs)
    experts: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        owner, index = split_part(spec.name)
        if index == str(len(experts.get(owner, ()))):
            experts.setdefault(owner, []).append(spec)
    names = {spec.name for spec in specs}
    stacks = [replace(own[0], name=name, shape=(len(own), *own[0].shape)) for name, own in experts.items()]
    return [*specs, *(stack for stack in stacks if stack.name not in names)]


class _RowPair(NamedTuple):
    """A pair, the rows of its expert that it changes, and its name."""

    name: str
    first: int
    last: int
    pair: LoraPair


def with_whole_experts(adapter: Adapter, base: Mapping[str, TensorSpec]) -> Adapter:
    """The adapter with pairs of whole experts in place of pairs of their rows, where the base has only the former.

    Pairs with a magnitude (DoRA) stay: the other rows have none.
    """
    parts: dict[str, list[_RowPair]] = {}
    for name, pair in adapter.pairs.items():
        owner, indices = split_part(name)
        found = ROWS_OF_EXPERT.fullmatch(indices)
        if found is None or owner in base or pair.magnitude is not None:
            continue
        expert, part = expert_name(owner, int(found[1])), _RowPair(name, int(found[2]), int(found[3]), pair)
        if expert in base and _fits(part, base[expert]):
            parts.setdefault(expert, []).append(part)
    if not parts:
        return adapter
    replaced = {part.name for own in parts.values() for part in own}
    pairs = {name: pair for name, pair in adapter.pairs.items() if name not in replaced}
    spelling = dict(adapter.spelling)
    for expert, own in parts.items():
        pairs[expert] = _whole(own, base[expert].shape[0])
        spelling[expert] = adapter.spelled(own[0].name)
    return replace(adapter, pairs=pairs, spelling=spelling)


def _fits(part: _RowPair, expert: TensorSpec) -> bool:
    return len(expert.shape) == 2 and expert.shape[1] == part.pair.shape[1] and part.last <= expert.shape[0]


def _whole(parts: Sequence[_RowPair], rows: int) -> LoraPair:
    b = np.zeros((rows, sum(part.pair.rank for part in parts)), np.float32)
    start = 0
    for part in parts:
        stop = start + part.pair.rank
        b[part.first : part.last, start:stop] = part.pair.b * np.float32(part.pair.scale)
        start = stop
    return LoraPair(a=np.concatenate([part.pair.a for part in parts]), b=b, scale=1.0, as_stored=True)
