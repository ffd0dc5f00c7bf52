"""Which rules rename the weights of a model, from its config alone; and what one rule does.

A rule is a regular expression that renames a tensor, and for a converter the operations on it. The semantics are those
of transformers' `core_model_loading`: a pattern that ends in a letter or digit ends at a word boundary, `*.` stands for
any characters before a dot, and of several patterns the longest is tried first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lora_export.names.table import LEGACY, ConversionTable, ModelPart, read_table

LAYER_PAIR = re.compile(r"layers\.(\d+)\.(mixer|attn_alpha|mlp_alpha)(?=\.|$)")
SCALES_OF_PAIRS = {"attn_alpha": "lambda_1", "mlp_alpha": "lambda_2"}
GROUP_REFERENCE = re.compile(r"\\(\d+)")


class Renamed(NamedTuple):
    """A name after a rule, and the pattern of the rule that matched."""

    name: str
    source: int  # its position in `RenameRule.sources`


@dataclass(eq=False)
class RenameRule:
    """A rule, and where in a model it applies."""

    sources: Sequence[str]
    targets: Sequence[str]
    operations: Sequence[Mapping[str, Any]] = ()  # empty where the rule only renames
    kind: str = ""  # "group", "offset" or "layer pairs": renames that are more than a substitution
    offset: int = 0
    scope: str | None = None  # the path of a part, relative to the inner model; None for the whole model
    model_prefix: str = ""  # the name of the inner model
    _is_active: bool = field(default=False, init=False)  # of a group: whether its first pattern was seen

    def __post_init__(self) -> None:
        branches = sorted(enumerate(self.sources), key=lambda item: -len(item[1]))
        self._pattern = re.compile("|".join(f"(?P<g{number}>{_bounded(text)})" for number, text in branches))

    @classmethod
    def of(cls, rule: Mapping[str, Any], scope: str | None, model_prefix: str) -> RenameRule:
        """A rule of the table."""
        return cls(
            sources=rule["from"],
            targets=rule["to"],
            operations=rule.get("operations", ()),
            kind=rule.get("kind", ""),
            offset=rule.get("offset", 0),
            scope=scope,
            model_prefix=model_prefix,
        )

    @property
    def is_converter(self) -> bool:
        return bool(self.operations)

    def reset(self) -> None:
        """Forget the names that were seen: see `kind` "group"."""
        self._is_active = False

    def rename(self, name: str) -> Renamed | None:
        """The new name; None where the rule does not match. Names come in the order of transformers' sorting."""
        if self.kind == "layer pairs":
            return _collapse_layer_pair(name)
        start = self._start(name)
        found = None if start is None else self._pattern.search(name[start:])
        if found is None:
            return None
        source = next(int(group[1:]) for group, text in found.groupdict().items() if text is not None)
        if self.kind == "group":
            self._is_active = self._is_active or source == 0
            if not self._is_active:
                return None
        replacement = self._replacement(found, source, self._pattern.groupindex[f"g{source}"])
        return Renamed(name[:start] + name[start:].replace(found.group(0), replacement, 1), source)

    def _start(self, name: str) -> int | None:
        """Where the name within the part begins; None outside of it. The name of the inner model may be absent."""
        if self.scope is None:
            return 0
        scope = f"{self.scope}." if self.scope else ""
        inner = f"{self.model_prefix}." if self.model_prefix else ""
        return next((len(prefix) for prefix in (inner + scope, scope) if name.startswith(prefix)), None)

    def _replacement(self, found: re.Match[str], source: int, own_group: int) -> str:
        if self.kind == "group":
            target = self.targets[source]
            return GROUP_REFERENCE.sub(lambda ref: found.group(own_group + int(ref[1])), target)
        target = self.targets[0]
        if r"\1" not in target:
            return target
        captured = found.group(own_group + 1)
        return target.replace(r"\1", str(int(captured) + self.offset) if self.kind == "offset" else captured)


def _bounded(pattern: str) -> str:
    pattern = pattern.replace("*.", r".*\.")
    return pattern + r"(?!\w)" if re.search(r"[a-zA-Z0-9]$", pattern) else pattern


def _collapse_layer_pair(name: str) -> Renamed | None:
    """Attention and MLP that are stored as two layers, as the two halves of one layer."""
    found = LAYER_PAIR.search(name)
    if found is None:
        return None
    layer, half = divmod(int(found[1]), 2)
    part = SCALES_OF_PAIRS.get(found[2], ("self_attn", "mlp")[half])
    return Renamed(f"{name[: found.start()]}layers.{layer}.{part}{name[found.end() :]}", 0)


def loading_order(name: str) -> list[tuple[Any, ...]]:
    """The key by which transformers sorts names before it loads them: numbers by their value."""
    parts: list[tuple[Any, ...]] = []
    for part in name.split("."):
        text = part.rstrip("0123456789")
        if part.isdigit():
            parts.append((0, int(part)))
        else:
            parts.append((1, text, int(part[len(text) :])) if text != part else (1, text))
    return parts


# --- The rules of an architecture ---


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

    @property
    def are_undone(self) -> bool:
        """Whether transformers undoes any of the architecture's rules when it stores the model.

        It cannot for one that only removes the beginning of a name, as those of CLIPVisionModel.
        """
        return any(target != r"\1" for rule in [*self.converters, *self.renames][: self.own] for target in rule.targets)


def rules_of(config: Mapping[str, Any]) -> ArchitectureRules | None:
    """The rules for the model that a config describes; None where it names no model of transformers.

    The class is the first of `architectures`, or that of `model_type`. A part of a composite model has the class that
    its own `model_type` gives it.
    """
    model_type, named = config.get("model_type"), config.get("architectures")
    if not isinstance(model_type, str) or not model_type:
        return None
    table = read_table()
    architecture = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    architecture = architecture or table.auto["model"].get(model_type, "")
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
