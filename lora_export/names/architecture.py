"""Which rules rename the weights of a model, from its config alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_export.names.rename_rules import RenameRule
from lora_export.names.table import LEGACY, ConversionTable, ModelPart, read_table


@dataclass(frozen=True, eq=False)
class ArchitectureRules:
    """The rules for the names of one architecture, in the order in which they apply."""

    architecture: str
    version: str  # of the transformers that the rules were read from
    renames: Sequence[RenameRule]
    converters: Sequence[RenameRule]
    config: Mapping[str, Any]
    own: int  # how many of them are of this architecture; the others apply to every model
    is_known: bool  # whether the parts of this architecture are known


def rules_of(config: Mapping[str, Any]) -> ArchitectureRules | None:
    """The rules for the model that a config describes; None where it names no model of transformers.

    The class is the first of `architectures`, or that of `model_type`. A part of a composite model has the class that
    its own `model_type` gives it.
    """
    table, model_type = read_table(), config.get("model_type")
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    architecture = architecture or table.auto["model"].get(str(model_type), "")
    if not isinstance(model_type, str) or not model_type:
        return None
    parts = list(_parts(table, architecture, model_type, config))
    prefix = table.prefixes.get(architecture, "")
    rules = []
    for part in _claimed(table, parts):
        scope = None if part.path == "" else part.path.removeprefix(prefix).removeprefix(".")
        of_part = table.rules.get(part.architecture) or table.rules[part.model_type]
        rules += [RenameRule.of(rule, scope, "" if scope is None else prefix) for rule in of_part]
    own = len(rules)
    rules += [RenameRule.of(rule, None, "") for rule in table.rules.get(LEGACY, ())]
    return ArchitectureRules(
        architecture=architecture,
        version=table.version,
        renames=[rule for rule in rules if not rule.is_converter],
        converters=[rule for rule in rules if rule.is_converter],
        config=config,
        own=own,
        is_known=architecture not in table.unbuilt,
    )


def _parts(
    table: ConversionTable, architecture: str, model_type: str, config: Mapping[str, Any]
) -> Iterator[ModelPart]:
    """The parts of an architecture with this config, the whole model first."""
    recorded = table.parts.get(architecture)
    if recorded is None:
        yield ModelPart("", architecture, model_type, "")
        return
    replaced: list[str] = []
    for part in recorded:
        if part.path == "":
            yield ModelPart("", architecture, model_type, "")
        elif not any(part.path.startswith(f"{path}.") for path in replaced):
            own: Any = config if part.config else None
            for key in part.config.split("."):
                own = own.get(key) if isinstance(own, Mapping) else None
            own_type = own.get("model_type") if isinstance(own, Mapping) else None
            if isinstance(own, Mapping) and isinstance(own_type, str) and own_type and own_type != part.model_type:
                replaced.append(part.path)
                # The class that a part of this type is built as.
                head = next((name for name, one in table.auto.items() if part.architecture in one.values()), "model")
                for inner in _parts(table, table.auto[head].get(own_type, ""), own_type, own):
                    path, keys = f"{part.path}.{inner.path}", f"{part.config}.{inner.config}"
                    yield ModelPart(path.rstrip("."), inner.architecture, inner.model_type, keys.rstrip("."))
            else:
                yield part


def _claimed(table: ConversionTable, parts: Sequence[ModelPart]) -> Iterator[ModelPart]:
    """The parts whose rules apply. A part of the same class or type as one that it is inside of has its rules."""
    seen: dict[str, list[str]] = {}

    def is_inside(part: ModelPart, name: str) -> bool:
        return any(path == "" or part.path.startswith(f"{path}.") for path in seen.get(name, ()))

    for part in parts:
        if is_inside(part, part.architecture):
            continue
        if part.architecture not in table.rules:
            if part.model_type not in table.rules or is_inside(part, part.model_type):
                continue
            seen.setdefault(part.model_type, []).append(part.path)
        yield part
        seen.setdefault(part.architecture, []).append(part.path)
