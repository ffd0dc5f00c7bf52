"""The names that stored tensors have in the loaded model, by the rules of an architecture."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from lora_export.names.architecture import ArchitectureRules, RenameRule, loading_order
from lora_export.names.tensor_parts import AssembledTensor, converted

ShapeOf = Callable[[str], tuple[int, ...]]
LoadedShapeOf = Callable[[str], tuple[int, ...] | None]


class TensorConversion(Protocol):
    """How tensors of the other generation or layout are made of stored ones."""

    @property
    def sources(self) -> Sequence[str]: ...
    @property
    def stacks(self) -> bool: ...
    def __hash__(self) -> int: ...
    def assembled(
        self, shape_of: ShapeOf, loaded_shape_of: LoadedShapeOf | None = None
    ) -> dict[str, AssembledTensor]: ...


@dataclass(frozen=True, eq=False)
class Conversion:
    """Stored tensors that one converter turns into tensors of the loaded model."""

    rule: RenameRule
    collected: Mapping[str, list[str]]  # pattern of the rule -> the stored tensors that it matched, in order
    before: str  # what precedes a target in the names of the loaded model
    after: str
    rules: ArchitectureRules

    @property
    def sources(self) -> list[str]:
        """The stored tensors that the converter collects."""
        return [name for names in self.collected.values() for name in names]

    @property
    def stacks(self) -> bool:
        """Whether it stacks tensors, which adds a dimension."""
        return any(operation["name"] == "MergeModulelist" for operation in self.rule.operations)

    @property
    def names(self) -> list[str]:
        """The names of the results in the loaded model."""
        return [self.name_of(target) for target in self.rule.targets]

    def name_of(self, target: str) -> str:
        return self.before + target + self.after

    def assembled(self, shape_of: ShapeOf, loaded_shape_of: LoadedShapeOf | None = None) -> dict[str, AssembledTensor]:
        """The results by their names in the loaded model. `loaded_shape_of` has known shapes. Raises NotExpressible."""

        def size_of(target: str, axis: int) -> int | None:
            shape = None if loaded_shape_of is None else loaded_shape_of(self.name_of(target))
            return shape[axis] if shape else None

        collected = {
            pattern: [AssembledTensor.stored(name, shape_of(name)) for name in names]
            for pattern, names in self.collected.items()
        }
        results = converted(self.rule, collected, self.rules.config, size_of)
        return {self.name_of(target): tensor for target, tensor in results.items()}

    def __str__(self) -> str:
        operations = " and ".join(operation["name"] for operation in self.rule.operations)
        return f"{operations}: {', '.join(self.rule.sources)} -> {', '.join(self.rule.targets)}"


@dataclass(frozen=True, eq=False)
class LoadedTensor:
    """A tensor of the loaded model: a stored one under a new name, or a result of a converter."""

    name: str
    stored: str = ""  # empty for a result of a converter
    conversion: TensorConversion | None = None

    @property
    def sources(self) -> Sequence[str]:
        """The stored tensors that it is made of, or more than these: those of its converter."""
        return [self.stored] if self.conversion is None else self.conversion.sources


class LoadedNames(dict[str, LoadedTensor]):
    """The tensors of the loaded model by name. A name that two stored tensors would get is left out."""

    def __init__(self, rules: ArchitectureRules, stored: Iterable[str]):
        super().__init__()
        self.rules = rules
        self.ambiguous: set[str] = set()
        for tensor in _loaded(rules, stored):
            if tensor.name in self:
                self.ambiguous.add(tensor.name)
            self[tensor.name] = tensor
        for name in self.ambiguous:
            del self[name]

    @functools.cached_property
    def by_stored(self) -> dict[str, list[LoadedTensor]]:
        """Name of a stored tensor -> the tensors of the loaded model that are made of it."""
        found: dict[str, list[LoadedTensor]] = {}
        for tensor in self.values():
            for name in tensor.sources:
                found.setdefault(name, []).append(tensor)
        return found


def _loaded(rules: ArchitectureRules, stored: Iterable[str]) -> Iterator[LoadedTensor]:
    for rule in (*rules.renames, *rules.converters):
        rule.reset()
    groups: dict[str, tuple[RenameRule, dict[str, list[str]]]] = {}
    for name in sorted(stored, key=loading_order):
        renamed = name
        for rule in rules.renames:
            found = rule.rename(renamed)
            renamed = renamed if found is None else found.name
        matching = ((rule, rule.rename(renamed)) for rule in rules.converters)
        converter, found = next(((rule, found) for rule, found in matching if found is not None), (None, None))
        if converter is None or found is None:
            yield LoadedTensor(renamed, stored=name)
        else:
            _, collected = groups.setdefault(found.name, (converter, {}))
            collected.setdefault(converter.sources[found.source], []).append(name)
    for full_name, (converter, collected) in groups.items():
        plain = full_name.replace("*.", "0.")
        target = next((each for each in converter.targets if each in plain), None)
        before, _, after = (plain, "", "") if target is None else plain.partition(target)
        conversion = Conversion(converter, collected, before, after, rules)
        for name in conversion.names:
            yield LoadedTensor(name, conversion=conversion)
