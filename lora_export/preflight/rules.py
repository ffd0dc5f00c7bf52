"""The rules of the runtimes, read from their files, and what they find in an adapter.

    [[rules]]
    when = { part = "pair", kind = "DoRA" }          # all of these; a list is any of it, a table has operators
    effect = "refused"                               # or "dropped", "changed"
    does = "It has no DoRA."                         # {fact} is replaced by the values found, {setting} by its value
    source = "vllm/lora/peft_helper.py, PEFTHelper._validate_features"
    repair = "merge"                                 # of `repairs.toml`, or `setting NAME`: another value of it

A condition whose fact is not known decides nothing.
"""

from __future__ import annotations

import functools
import importlib.resources
import operator
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lora_export.errors import count
from lora_export.options.adapters import RUNTIMES
from lora_export.options.spelling import command, named
from lora_export.preflight.facts import NEED_BASE, OF_BASE, OF_CHANGE, Base, Fact, KnownFacts

Effect = Literal["refused", "dropped", "changed"]
EFFECTS: tuple[Effect, ...] = ("refused", "dropped", "changed")
SETTING = "setting "  # begins the name of a repair
CHECKPOINT = "CHECKPOINT"  # in a repair that the given base does not take
LAST_REPAIRS = ("merge-untied", "merge", "export")  # after one of these no adapter is left to repair

COMPARISONS: Mapping[str, Callable[[Any, Any], bool]] = {
    "is": operator.eq,
    "is_not": operator.ne,
    "in": lambda value, wanted: value in wanted,
    "not_in": lambda value, wanted: value not in wanted,
    "above": operator.gt,
    "up_to": operator.le,
    "lacks": lambda value, wanted: wanted not in value,
    "matches": lambda value, wanted: re.search(wanted, value) is not None,
    "matches_not": lambda value, wanted: re.search(wanted, value) is None,
}


@dataclass(frozen=True)
class Setting:
    """Something that a runtime is started with, and on which its rules depend."""

    default: float | None  # None: there is none, and its rules decide nothing until it is stated
    spelling: str  # how it is given, with {value}
    values: tuple[float, ...] = ()  # the only ones that it may have, in their order; empty: any

    def least(self, needed: float) -> float:
        """The least value that is enough."""
        return next((value for value in self.values if value >= needed), needed)


@dataclass(frozen=True)
class RuntimeRule:
    """What a runtime does with adapters of a kind."""

    when: Mapping[str, Mapping[str, Any]]  # fact -> operator -> wanted value, or the name of a setting
    effect: Effect
    does: str
    source: str
    repair: str

    def holds(self, facts: KnownFacts, settings: Mapping[str, float | None]) -> bool | None:
        """Whether all conditions hold; None where that depends on a fact or a setting that is not known."""
        answers = [
            _holds(operation, facts[fact], settings.get(wanted, wanted) if isinstance(wanted, str) else wanted)
            for fact, operations in self.when.items()
            for operation, wanted in operations.items()
        ]
        return False if False in answers else None if None in answers else True


def _holds(operation: str, value: Fact, wanted: Any) -> bool | None:
    return None if value is None or wanted is None else COMPARISONS[operation](value, wanted)


@dataclass(frozen=True)
class Runtime:
    """What is known of a runtime: which version was read, and its rules."""

    name: str
    title: str
    repository: str
    version: str  # release or commit that the rules were read in
    proof: str  # how they were checked
    rules: tuple[RuntimeRule, ...]
    settings: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True)
class Repair:
    """What to do: a command of this package, or another setting of the runtime."""

    name: str
    text: str
    command: str = ""  # empty for a setting
    arguments: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """How a runtime differs from what was trained."""

    effect: Effect
    does: str
    changes: tuple[str, ...]  # modules and tensors of the adapter; empty where it is about all of it
    source: str  # repository, version, file and function
    repair: Repair


@dataclass(frozen=True)
class RuntimeOutcome:
    """The findings for one runtime."""

    runtime: str
    title: str
    version: str
    proof: str
    findings: tuple[Finding, ...]
    unknown: tuple[str, ...]  # facts that only a base has, and on which a rule depends

    @property
    def repairs(self) -> tuple[Repair, ...]:
        """What repairs all of it, in order: a merge alone where one is needed."""
        needed = {finding.repair.text: finding.repair for finding in self.findings}.values()
        last = [repair for name in LAST_REPAIRS for repair in needed if repair.name == name]
        return tuple(last[:1] or needed)


@functools.cache
def runtime_named(name: str) -> Runtime:
    """The runtime of one of `RUNTIMES`, from its file."""
    row = _read(f"runtimes/{name}.toml")
    settings = {
        key: Setting(each.get("default"), each["spelling"], tuple(each.get("values", ())))
        for key, each in row.get("settings", {}).items()
    }
    rules = tuple(
        RuntimeRule(
            {fact: _operations(wanted) for fact, wanted in each["when"].items()},
            each["effect"],
            each["does"],
            each["source"],
            each["repair"],
        )
        for each in row["rules"]
    )
    return Runtime(name, row["title"], row["repository"], row["version"], row["proof"], rules, settings)


def _operations(wanted: Any) -> Mapping[str, Any]:
    if isinstance(wanted, Mapping):
        return wanted
    return {"in": wanted} if isinstance(wanted, list) else {"is": wanted}


@functools.cache
def repairs() -> Mapping[str, Any]:
    """The commands that repair, by their names in the rules."""
    return _read("repairs.toml")


def _read(name: str) -> dict[str, Any]:
    path = importlib.resources.files(__package__).joinpath(*name.split("/"))
    return tomllib.loads(path.read_text(encoding="utf-8"))


def findings_of(
    runtime: Runtime,
    facts: KnownFacts,
    changes: Mapping[str, KnownFacts],
    settings: Mapping[str, float],
    paths: Mapping[str, str],
    *,
    base: Base | None = None,
) -> RuntimeOutcome:
    """What the rules of a runtime find. `facts` hold for all `changes`; `paths` are ADAPTER, and BASE if there is one.

    `settings` replace the defaults of those that the runtime has. `base` is what the repairs depend on.
    """
    values = {name: settings.get(name, setting.default) for name, setting in runtime.settings.items()}
    found, unknown = [], set()
    for rule in runtime.rules:
        of_changes = bool(rule.when.keys() & OF_CHANGE.keys())
        all_facts = {name: {**facts, **own} for name, own in changes.items()} if of_changes else {"": facts}
        answers = {name: rule.holds(each, values) for name, each in all_facts.items()}
        matching = [name for name, answer in answers.items() if answer]
        for name in (name for name, answer in answers.items() if answer is None):
            unknown |= {fact for fact in rule.when.keys() & NEED_BASE if all_facts[name][fact] is None}
        if matching:
            own = [all_facts[name] for name in matching]
            does = rule.does.format_map(_shown(own) | values)
            source = f"{runtime.repository} {runtime.version}, {rule.source}"
            named = tuple(matching) if of_changes else ()
            found.append(Finding(rule.effect, does, named, source, _repair(rule, runtime, own, paths, base or Base())))
    found.sort(key=lambda finding: EFFECTS.index(finding.effect))
    return RuntimeOutcome(
        runtime.name, runtime.title, runtime.version, runtime.proof, tuple(found), tuple(sorted(unknown))
    )


def _shown(matching: Iterable[KnownFacts]) -> dict[str, Any]:
    """The values of each fact, for a message."""
    values: dict[str, dict[Any, None]] = {}
    for facts in matching:
        for fact, value in facts.items():
            values.setdefault(fact, {})[f"{value:g}" if isinstance(value, float) else value] = None
    return {fact: ", ".join(map(str, each)) for fact, each in values.items()}


def _repair(
    rule: RuntimeRule,
    runtime: Runtime,
    matching: Iterable[KnownFacts],
    paths: Mapping[str, str],
    base: Base,
) -> Repair:
    if rule.repair.startswith(SETTING):
        name = rule.repair.removeprefix(SETTING)
        setting = runtime.settings[name]
        (fact,) = (fact for fact, operations in rule.when.items() if name in operations.values())
        value = setting.least(max(number for facts in matching if isinstance(number := facts[fact], int | float)))
        return Repair(rule.repair, setting.spelling.format(value=f"{value:g}"), settings={name: value})
    name = base.instead.get(rule.repair, rule.repair)
    row = dict(repairs()[name])
    called, remark = row.pop("command"), ""
    if called == "merge":
        row |= base.merging
        if base.file and row.get("tied") == "untie":
            paths, remark = {**paths, "BASE": CHECKPOINT}, f"  # {CHECKPOINT}: the model of which {base.file} was made"
    arguments = tuple(paths.get(each, each) for each in row.pop("arguments"))
    options = {key: paths.get(value, value) if isinstance(value, str) else value for key, value in row.items()}
    return Repair(name, command(called, *arguments, **options) + remark, called, arguments, options)


def runtimes() -> dict[str, Runtime]:
    """All runtimes, by name."""
    return {name: runtime_named(name) for name in RUNTIMES}


# --- as lines ---

SHOWN_CHANGES = 2


def check_lines(outcomes: Iterable[RuntimeOutcome], *, every: bool) -> Iterator[str]:
    """A line for each runtime; with `every`, its findings and what repairs them."""
    for outcome in outcomes:
        verdict = count(len(outcome.findings), "finding") if outcome.findings else "fits"
        yield f"{outcome.title} {outcome.version}: {verdict} ({outcome.proof})"
        if not every:
            continue
        for finding in outcome.findings:
            first, more = finding.changes[:SHOWN_CHANGES], len(finding.changes) - SHOWN_CHANGES
            names = f" [{', '.join(first)}{f' and {more} more' if more > 0 else ''}]" if first else ""
            yield f"  {finding.effect}: {finding.does}{names}"
            yield f"    {finding.source}"
        for repair in outcome.repairs:
            yield f"  -> {repair.text}"
        if outcome.unknown:
            facts = "; ".join((OF_BASE | OF_CHANGE)[fact] for fact in outcome.unknown)
            yield f"  not checked: {facts} ({named('base', 'CHECKPOINT')} may show it)"
