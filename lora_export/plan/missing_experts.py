"""The tensors of experts that an adapter lacks beside those that it has, of one stack of the base."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from lora_export.names.architecture import ArchitectureRules
from lora_export.names.loaded_names import Conversion, LoadedNames

WITHOUT_OPERATORS = re.compile(r"[\w.*]+")  # a pattern whose only wildcards are `*`, an expert, and the dots


def with_missing_experts(
    shapes: Mapping[str, tuple[int, ...]], rules: ArchitectureRules, base_shape: Callable[[str], tuple[int, ...] | None]
) -> dict[str, tuple[int, ...]]:
    """The tensors of an adapter, and those of the same stacks that it lacks, with their shapes.

    `base_shape` has the shape of a stack of the base by its loaded name. A projection that the adapter has for no
    expert gets the shape of another one; whether it is right, the shape of the whole stack shows.
    """
    found = dict(shapes)
    for tensor in LoadedNames(rules, shapes).values():
        shape = base_shape(tensor.name)
        conversion = tensor.conversion
        if isinstance(conversion, Conversion) and shape is not None and conversion.stacks:
            for name, own in _expected(conversion, shapes, shape[0]):
                found.setdefault(name, own)
    return found


@dataclass(frozen=True)
class _Around:
    """What stands before and after a pattern in the names that it matches."""

    before: str
    after: str


def _expected(
    conversion: Conversion, shapes: Mapping[str, tuple[int, ...]], experts: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of a stack, by the names of those that the adapter has."""
    sources = conversion.rule.sources
    if not all(WITHOUT_OPERATORS.fullmatch(pattern) for pattern in sources):
        return
    for pattern, names in conversion.collected.items():
        around = _around(pattern, names[0])
        if around is None:
            return
        for other in sources:
            own = shapes[conversion.collected.get(other, names)[0]]
            for expert in range(experts):
                yield f"{around.before}{other.replace('*', str(expert))}{around.after}", own


def _around(pattern: str, name: str) -> _Around | None:
    match = re.search(pattern.replace(".", r"\.").replace("*", r"\d+"), name)
    return None if match is None else _Around(name[: match.start()], name[match.end() :])
