"""The pairs of experts, as the base has these: turned, by name of each expert, of whole experts, with all of a stack.

A stacked parameter is (experts, out, in) in most models, and (experts, in, out) in some. PEFT lets A read its last
axis since 0.19, and its second one before, or where the class of the experts sets `is_transposed`. The shapes show
which is meant, unless an expert is square.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from lora_export.errors import InputRefused, Misfit
from lora_export.lora import Adapter, ExpertAxes, LoraPair, expert_name, split_part
from lora_export.names.families import PROJECTION_OF, PROJECTIONS, is_turned
from lora_export.plan.types import TensorSpec

StackShape = tuple[int, ...]


def turned(
    adapter: Adapter, shape_of: Callable[[str], StackShape | None], model_types: Collection[str]
) -> tuple[Adapter, list[Misfit]]:
    """The adapter with the pairs of experts as these are stored, and why some fit no stacked parameter.

    `shape_of` has the shape of a tensor of the adapter in the base, or None. The pair of a bare parameter that stacks
    one expert becomes the pair of that expert. Raises InputRefused where the experts are square and nothing records
    how the adapter was trained on them.
    """
    adapter = _with_single_experts(adapter, shape_of)
    if not adapter.experts:
        return adapter, []
    by_parameter: dict[str, list[str]] = {parameter: [] for parameter in adapter.experts}
    for module in adapter.pairs:
        parameter, indices = split_part(module)
        if indices and parameter in by_parameter:
            by_parameter[parameter].append(module)
    shapes = {parameter: shape_of(parameter) for parameter in by_parameter}
    shown = dict(_shown_by_shape(adapter, by_parameter, shapes))
    pairs, misfits = dict(adapter.pairs), []
    for parameter, modules in by_parameter.items():
        shape = shapes[parameter]
        if shape is None:
            continue  # the base has no such parameter, which is reported for each pair
        if len(shape) != 3 or shape[0] != len(modules):
            why = f"the adapter was trained on {len(modules)} experts, and {parameter} is {shape} in the base"
            misfits.append(Misfit(adapter.name, adapter.spelled(parameter), why))
            for module in modules:
                del pairs[module]
            continue
        if _is_transposed(adapter, parameter, shown, model_types):
            pairs |= {module: pairs[module].turned for module in modules}
    return replace(adapter, pairs=pairs, experts={}), misfits


def _with_single_experts(adapter: Adapter, shape_of: Callable[[str], StackShape | None]) -> Adapter:
    names = {}
    for module, pair in adapter.pairs.items():
        if pair.as_stored and not split_part(module)[1]:
            shape = shape_of(module)
            if shape is not None and len(shape) == 3 and shape[0] == 1 and pair.a.ndim == 2:
                names[module] = expert_name(module, 0)
    if not names:
        return adapter
    return replace(
        adapter,
        pairs={names.get(module, module): pair for module, pair in adapter.pairs.items()},
        layouts={module: layout for module, layout in adapter.layouts.items() if module not in names},
    )


def _shown_by_shape(
    adapter: Adapter, by_parameter: Mapping[str, list[str]], shapes: Mapping[str, StackShape | None]
) -> Iterator[tuple[str, bool]]:
    """Parameter -> whether its pairs are transposed, where the shape shows it."""
    for parameter, modules in by_parameter.items():
        shape = shapes[parameter]
        own = adapter.pairs[modules[0]].shape
        if shape is not None and len(shape) == 3 and own[0] != own[1] and own in (shape[1:], shape[:0:-1]):
            yield parameter, own != shape[1:]


def _is_transposed(adapter: Adapter, parameter: str, shown: Mapping[str, bool], model_types: Collection[str]) -> bool:
    if parameter in shown:
        return shown[parameter]
    # All parameters of a module were trained alike.
    beside = {value for other, value in shown.items() if _owner(other) == _owner(parameter)}
    if len(beside) == 1:
        return beside.pop()
    axes = adapter.experts[parameter]
    is_known = is_turned(axes, ExpertAxes.STORED, model_types)
    if is_known is None:
        unrecorded = axes is ExpertAxes.UNKNOWN
        missing = "the adapter records no peft_version" if unrecorded else "the base has no config with a model_type"
        raise InputRefused(
            f"{parameter} of {adapter.name}: each expert is a square matrix, and {missing}: whether the experts' "
            "inputs are their rows or their columns is unknown. Add it"
        )
    return is_known


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]


# --- Stacked pairs of one projection: `experts.w1`, and not `experts.gate_up_proj` ---
#
# A base names the projection of one expert: `experts.3.w1`, or `experts.3.gate_proj`. Which of them it uses is tried.


def per_expert(adapter: Adapter) -> Iterator[Adapter]:
    """The adapter with its stacked projections as modules of single experts, once for each family of names.

    Nothing where it has no such projections. They are (out, in), as the weights of linear layers are.
    """
    stacked = {parameter for parameter, axes in adapter.experts.items() if axes is ExpertAxes.OUT_IN}
    projections = {parameter: names for parameter in stacked if (names := _projection(parameter))}
    for family in (0, 1) if projections else ():
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
    projection = PROJECTION_OF.get(parameter.rpartition(".")[2])
    return None if projection is None else PROJECTIONS[projection]


# --- Pairs of some rows of an expert, such as its gate, where a graph has each expert as one weight of its own ---
#
# The pair of the whole expert has zeros in the other rows of B. Several parts of one expert are one pair: their A along
# the rank, and each B in its own rows and ranks.

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
        if found is None or owner in base or pair.depends_on_weight:
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
