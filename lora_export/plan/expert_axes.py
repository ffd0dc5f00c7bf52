"""The pairs of experts, turned so that their products have the shape in which the experts are stored.

A stacked parameter is (experts, out, in) in most models, and (experts, in, out) in some. PEFT lets A read its last
axis since 0.19, and its second one before, or where the class of the experts sets `is_transposed`. The shapes show
which is meant, unless an expert is square.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from lora_export.errors import InputRefused, Misfit
from lora_export.lora import Adapter, ExpertAxes, LoraPair, expert_name, split_part

# Model types of transformers whose class of experts sets `is_transposed`, and further ones that store (in, out) too.
# `tests/plan/test_expert_axes.py` derives both again from the installed transformers.
TRANSPOSED_CLASSES = frozenset({"aria", "aria_text", "gpt_oss", "openai_privacy_filter"})
ALTERNATING = frozenset({"gpt_oss", "openai_privacy_filter"})  # rows of gate and up alternate in gate_up_proj
STORED_IN_OUT = TRANSPOSED_CLASSES | {"llama4", "llama4_text"}

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
            pairs |= {module: _transposed(pairs[module]) for module in modules}
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
    if axes in (ExpertAxes.STORED, ExpertAxes.TRANSPOSED):
        return axes is ExpertAxes.TRANSPOSED
    known = {ExpertAxes.BY_CLASS: TRANSPOSED_CLASSES, ExpertAxes.OUT_IN: STORED_IN_OUT}.get(axes)
    if known is None or not model_types:
        missing = "the adapter records no peft_version" if known is None else "the base has no config with a model_type"
        raise InputRefused(
            f"{parameter} of {adapter.name}: each expert is a square matrix, and {missing}: whether the experts' "
            "inputs are their rows or their columns is unknown. Add it. Nothing was written."
        )
    return not known.isdisjoint(model_types)


def _transposed(pair: LoraPair) -> LoraPair:
    return replace(pair, a=pair.b.T, b=pair.a.T)


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def model_types(config: Mapping[str, Any]) -> set[str]:
    """The model types of a config and of its parts."""
    found, parts = set(), [config]
    while parts:
        part = parts.pop()
        if isinstance(part.get("model_type"), str):
            found.add(part["model_type"])
        parts += [value for value in part.values() if isinstance(value, Mapping)]
    return found
