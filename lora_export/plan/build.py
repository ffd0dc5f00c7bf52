"""Adapters and the names and shapes of a base in, a plan out; or one error that lists every misfit."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lora_export.errors import InputRefused, MatchError, Misfit, WrongUsage, count, first_of
from lora_export.lora import Adapter, LoraPair, TokenRows
from lora_export.options.spelling import named
from lora_export.pairs.open_shape import OpenPair
from lora_export.plan.attempts import SpelledAdapter, Spelling
from lora_export.plan.diffusion import (
    components_of,
    joined_components,
    of_component,
    only_component,
    prefixes_of_models,
    tensors_of_model,
)
from lora_export.plan.layouts import check_stated, layout_notes, refuse_unknown, settle_layouts
from lora_export.plan.match_names import BaseTensors, Prefix, fitting_prefixes, prefix_remedy, weight_of
from lora_export.plan.match_tensors import (
    Match,
    broken_ties,
    conflicts,
    match_adapter,
    overlapping_parts,
    resizing_remedy,
    resolved,
)
from lora_export.plan.spelling import layouts_within, spell, unknown_names
from lora_export.plan.ties import (
    Tied,
    Ties,
    rows_of_copies,
    shared,
    tied_remedy,
    untied,
    untied_by_added,
    with_copies,
    with_rows_of_all_names,
    with_saved_tables,
)
from lora_export.plan.types import Layout, Plan, Step, TensorSpec

if TYPE_CHECKING:
    from lora_export.names.architecture import ArchitectureRules

SHOWN_MODULES = 3  # names that a note lists
SMALLEST_NONZERO, LARGEST_STRENGTH = float(np.finfo(np.float32).smallest_subnormal), float(np.finfo(np.float32).max)


def make(
    adapters: Sequence[Adapter],
    specs: Iterable[TensorSpec],
    *,
    strengths: Sequence[float] | None = None,
    may_add: bool = False,
    identity_ok: bool = False,
    one_at_a_time: bool = False,
    layout: Mapping[str, str] | None = None,
    unknown_layout_ok: bool = False,
    rules: ArchitectureRules | None = None,
    ties: Ties | None = None,
    around: Iterable[str] = (),
) -> Plan:
    """Match adapters with the names and shapes of a base.

    `strengths` multiply the scales of each adapter, in the order of the adapters (default 1.0). With `may_add`, a
    whole tensor that the base lacks (a new head) is added; a module or graph cannot take one. With `one_at_a_time`,
    the adapters never run together, so that they cannot conflict: see `Step.for_adapter`.

    `layout` states how matrices are stored where the base does not: the name of a tensor or module, or a glob, ->
    "out_in" or "in_out". The last entry that matches a name counts. A layout that is neither stated, nor recorded by
    an adapter, nor shown by the shape is refused, unless `unknown_layout_ok`: such a step has `Layout.UNKNOWN`.

    `rules` are those by which transformers renames and converts the weights of this base while it loads them: an
    adapter may have either generation of names (see `spelling.py`). The plan has the adapters under the base's names.

    `ties` are tensors that the base stores under one of their names, to be untied or changed together: see `ties.py`.

    `around` are names of further tensors of the base, which take no change. With them its layout is recognised.

    Every adapter tensor is used exactly once, or MatchError lists all misfits. Raises InputRefused for an adapter that
    would change nothing, unless `identity_ok` (training starts from one), for the same adapter given twice, and for
    layouts that are unknown or contradict the base.
    """
    strengths = checked_strengths(adapters, strengths, identity_ok=identity_ok)
    has_ties, ties, specs, around = ties is not None, ties or Ties(), tuple(specs), tuple(around)
    base = BaseTensors(specs)
    stored = frozenset(base)
    if ties.handling is not Tied.ERROR and ties.tensors:
        base = BaseTensors(with_copies(base.values(), ties))
    unstored = base.keys() - stored
    base.layouts = layouts_within(base, around)
    check_stated(layout or {}, base)
    parts = [part for number, adapter in enumerate(adapters) for part in _parts(adapter, number, base)]
    spelled = [part.spelled(rules) for part in parts]
    ties = ties.classified([(one.adapter, one.prefix) for one in spelled])
    one_table, of_rows = ties.of_one_table(), ties.of_stored_again() if ties.handling is Tied.ERROR else ties
    spelled = [replace(one, adapter=with_rows_of_all_names(one.adapter, of_rows, one.prefix)) for one in spelled]
    if ties.handling is Tied.UNTIE:
        spelled = [replace(one, adapter=with_saved_tables(one.adapter, one_table, one.prefix)) for one in spelled]
    if ties.handling is Tied.BOTH:
        spelled = [replace(one, adapter=shared(one.adapter, one_table, one.prefix)) for one in spelled]
    own, prefixes = [one.adapter for one in spelled], [one.prefix for one in spelled]
    base = BaseTensors([*base.values(), *{name: view for one in spelled for name, view in one.views.items()}.values()])
    base = settle_layouts(own, prefixes, base, layout or {})
    base.can_untie = not ties.bound
    spelled = [replace(one, adapter=with_shapes(base, one.adapter, one.prefix)) for one in spelled]
    of_parts = [strengths[part.number] for part in parts]
    try:
        by_weight = _match_all(spelled, of_parts, base, may_add=may_add, one_at_a_time=one_at_a_time)
    except MatchError as error:
        remedy = _prefix_remedy(spelled, base, rules) or resizing_remedy(own, prefixes, base)
        if not remedy and has_ties:
            remedy = tied_remedy(error.misfits, zip(own, prefixes, strict=True), ties, base.aliases)
        raise error.with_remedy(remedy or unknown_names(rules)) from None
    name_prefix = _name_prefix(by_weight.values(), base)
    steps = [_step(matches, base) for matches in by_weight.values()]
    settle = untied_by_added if ties.handling is Tied.ERROR else untied
    by_name = {step.weight: step for step in steps}
    own_tensors = settle(by_name, ties, stored)
    if ties.handling is Tied.ERROR:
        steps += rows_of_copies(by_name, own_tensors)
    steps = [step for step in steps if step.spec.stored_name in own_tensors or step.spec.stored_name not in unstored]
    if not unknown_layout_ok:
        refuse_unknown(steps)
    order = {name: position for position, name in enumerate(base)}
    steps.sort(key=lambda step: (order.get(step.spec.stored_name, len(order)), order.get(step.weight, 0)))
    changed = {step.spec.stored_name for step in steps}
    by_number: list[list[SpelledAdapter]] = [[] for _ in adapters]
    for one, part in zip(spelled, parts, strict=True):
        by_number[part.number].append(one)
    kept = tuple(
        name for name, spec in base.items() if spec.region is None and name not in changed and name not in unstored
    )
    return Plan(
        adapters=tuple(
            joined_components(adapter, [one.adapter for one in found]) if len(found) > 1 else found[0].adapter
            for adapter, found in zip(adapters, by_number, strict=True)
        ),
        strengths=strengths,
        steps=tuple(steps),
        kept=kept,
        notes=tuple(_notes(spelled, steps, name_prefix, base.aliases, own_tensors, kept)),
        name_prefix=name_prefix,
        spellings=tuple(
            next((one.spelling for one in found if one.spelling is not Spelling.SAME), Spelling.SAME).value
            for found in by_number
        ),
        untied=own_tensors,
        tied=ties.handling,
        apart=ties.apart,
    )


class _Part(NamedTuple):
    """What an adapter changes in one model of the base: all of it, where the base is one model."""

    adapter: Adapter
    number: int  # of the whole adapter
    base: BaseTensors
    is_whole: bool

    def spelled(self, rules: ArchitectureRules | None) -> SpelledAdapter:
        """It under the names of the base; a part of an adapter under their full names."""
        one = spell(self.adapter, self.base, rules)
        if self.is_whole:
            return one
        named = one.adapter.renamed(lambda name: one.prefix.to_base(name) or name)
        return replace(one, adapter=named, prefix=Prefix())


def _parts(adapter: Adapter, number: int, base: BaseTensors) -> Iterator[_Part]:
    components = components_of(adapter)
    if components == [""] or not prefixes_of_models(base):  # of several models that are not in the base: refused
        yield _Part(only_component(adapter), number, base, is_whole=True)
        return
    for component in components:
        own = BaseTensors(tensors_of_model(base, component, adapter.name))
        yield _Part(of_component(adapter, component), number, own, is_whole=False)


def _notes(
    spelled: Sequence[SpelledAdapter],
    steps: Sequence[Step],
    name_prefix: str,
    aliases: Mapping[str, str],
    untied: Mapping[str, str],
    kept: Iterable[str],
) -> Iterator[str]:
    for one in spelled:
        yield from one.notes
        if unsaved := _unsaved(one.adapter, steps, kept):
            yield (
                f"modules_to_save of {one.adapter.name} names {first_of(unsaved, SHOWN_MODULES)}, and its file has "
                "nothing of that: the base's own stay."
            )
        if unsaved := _unsaved_biases(one.adapter, steps, kept):
            yield (
                f"the config of {one.adapter.name} states bias={one.adapter.metadata['bias']}, and its file lacks "
                f"{first_of(unsaved, SHOWN_MODULES)}: the base's own stay. PEFT 0.18 and 0.19 save none with lora_only."
            )
    for step in steps:
        if step.added:
            tie = f", and no longer tied to {aliases[step.weight]}" if step.weight in aliases else ""
            yield f"the base has no {step.weight}: it is added{tie}."
    yield from layout_notes(steps)
    for name, source in untied.items():
        yield f"{name} is no longer tied to {source}: it gets a tensor of its own."
    if name_prefix:
        yield f"the base's tensors gain the prefix `{name_prefix}`, so that the added head finds its model."


def _unsaved_biases(adapter: Adapter, steps: Iterable[Step], kept: Iterable[str]) -> list[str]:
    """The biases of layers with a pair of an adapter whose config states that it trained them, that do not change."""
    if adapter.metadata.get("bias", "none") == "none":
        return []
    layers = {
        step.weight.removesuffix(".weight") for step in steps for term in step.terms if term.adapter == adapter.name
    }
    return [name for name in kept if name.endswith(".bias") and name.removesuffix(".bias") in layers]


def _unsaved(adapter: Adapter, steps: Iterable[Step], kept: Iterable[str]) -> list[str]:
    """The modules that the adapter's config saves whole, of which no tensor changes.

    Of other modules a base may have tensors that the model does not load, such as buffers of an older release.
    """
    if not adapter.saved_whole:
        return []
    changed = {adapter.saved_whole.module_around(step.spec.stored_name) for step in steps}
    modules = dict.fromkeys(map(adapter.saved_whole.module_around, kept))
    return [module for module in modules if module and module not in changed]


# --- Before anything is matched ---


def checked_strengths(
    adapters: Sequence[Adapter], strengths: Sequence[float] | None, *, identity_ok: bool = False
) -> tuple[float, ...]:
    """One strength per adapter. Raises WrongUsage for another number, InputRefused for what no base could use."""
    if not adapters:
        raise InputRefused("there is no adapter to apply")
    strengths = tuple(strengths) if strengths else (1.0,) * len(adapters)
    if len(strengths) != len(adapters):
        given = f"{count(len(adapters), 'adapter')} but {count(len(strengths), 'weight')}"
        raise WrongUsage(f"{given}; give one {named('weights')} per adapter")
    _refuse_duplicates(adapters)
    for adapter, strength in zip(adapters, strengths, strict=True):
        if not abs(strength) <= LARGEST_STRENGTH:
            raise InputRefused(f"the weight of {adapter.name} is {strength}; it must be a finite number in float32")
        if not identity_ok and (why := _why_no_effect(adapter, strength)):
            raise InputRefused(f"the adapter {adapter.name} has no effect: {why}")
    return strengths


def _why_no_effect(adapter: Adapter, strength: float) -> str:
    """Why an adapter changes nothing at this strength; empty where it changes something."""
    if strength == 0:
        return "its weight is 0"
    if adapter.is_identity:
        return "every B (or A, or scale) is zero, as before training"
    others = (adapter.replaced, adapter.token_rows, adapter.biases, adapter.added)
    scales = [abs(strength * pair.scale) for pair in adapter.pairs.values()]
    if not any(others) and max(scales, default=0) < SMALLEST_NONZERO:
        return f"its weight {strength:g} makes every scale zero in float32"
    return ""


def _refuse_duplicates(adapters: Sequence[Adapter]) -> None:
    seen: dict[str, str] = {}
    for adapter in adapters:
        if adapter.sha256 and seen.setdefault(adapter.sha256, adapter.name) != adapter.name:
            raise InputRefused(
                f"{adapter.name} is the same adapter as {seen[adapter.sha256]} (sha256 {adapter.sha256[:12]}). "
                "Give each adapter once"
            )
    names = Counter(adapter.name for adapter in adapters)
    for name, number in names.items():
        if number > 1:
            raise InputRefused(f"{number} adapters are called {name}; give them different names")


# --- Matching ---


def _match_all(
    spelled: Sequence[SpelledAdapter],
    strengths: Sequence[float],
    base: BaseTensors,
    *,
    may_add: bool,
    one_at_a_time: bool,
) -> dict[str, list[Match]]:
    """The matches of all adapters by the base tensor that they change. Raises MatchError."""
    by_weight: dict[str, list[Match]] = {}
    misfits: list[Misfit] = []
    matched = 0
    for one, strength in zip(spelled, strengths, strict=True):
        matches, without_match = match_adapter(one.adapter, strength, one.prefix, base, may_add=may_add)
        misfits += [*without_match, *one.misfits]
        matched += len(matches)
        for match in matches:
            by_weight.setdefault(match.weight, []).append(match)
    targets = matched + len(misfits)
    for matches in by_weight.values():
        for together in _by_adapter(matches) if one_at_a_time else [matches]:
            misfits += conflicts(together)
    misfits += [*broken_ties(by_weight, base), *overlapping_parts(by_weight, base)]
    if misfits:
        named = {one.adapter.name: one.adapter.metadata.get("base_model_name_or_path") for one in spelled}
        made_for = {name: base for name, base in named.items() if isinstance(base, str)}
        raise MatchError(misfits, targets=targets, made_for=made_for)
    return by_weight


def _prefix_remedy(spelled: Sequence[SpelledAdapter], base: BaseTensors, rules: ArchitectureRules | None) -> str:
    """The option by which an adapter would fit; empty where there is none."""
    proposals: list[tuple[str, str]] = []
    for one in spelled:
        modules = [module for module in one.adapter.pairs if module not in one.adapter.tied]
        if any(weight_of(one.prefix.to_base(module), base) for module in modules):
            continue  # some names fit: the others have another reason
        proposals += fitting_prefixes(one.adapter, base, lambda adapter: _fits(adapter, base, rules))
    return prefix_remedy(list(dict.fromkeys(proposals)))


def _fits(adapter: Adapter, base: BaseTensors, rules: ArchitectureRules | None) -> bool:
    try:
        make([adapter], base.values(), may_add=True, identity_ok=True, unknown_layout_ok=True, rules=rules)
    except InputRefused:
        return False
    return True


def _by_adapter(matches: Sequence[Match]) -> Iterator[list[Match]]:
    for adapter in dict.fromkeys(match.adapter for match in matches):
        yield [match for match in matches if match.adapter == adapter]


def _step(matches: Sequence[Match], base: Mapping[str, TensorSpec]) -> Step:
    """All matches of one base tensor, as one step."""
    weight = matches[0].weight
    whole = next((match.whole for match in matches if match.whole is not None), None)
    terms = tuple(match.term for match in matches if match.term is not None)
    own = tuple(dict.fromkeys(match.adapter for match in matches if match.whole is not None or match.rows is not None))
    if terms:
        return Step(resolved(base[weight], terms[0].pair), terms, replace=whole, values_of=own)
    rows = [match.rows for match in matches if match.rows is not None]
    if rows:
        indices, values = [one.indices for one in rows], [one.values for one in rows]
        joined = TokenRows(np.concatenate(indices), np.concatenate(values))
        return Step(base[weight], replace=whole, token_rows=joined, values_of=own)
    shifts = [match.shift for match in matches if match.shift is not None]
    shift = functools.reduce(np.add, shifts) if shifts else None
    shift_of = tuple(dict.fromkeys(match.adapter for match in matches if match.shift is not None))
    if whole is not None:
        spec = base.get(weight) or TensorSpec(weight, whole.shape, str(whole.dtype), nbytes=whole.nbytes)
        return Step(spec, shift=shift, replace=whole, added=weight not in base, values_of=own, shift_of=shift_of)
    return Step(base[weight], shift=shift, shift_of=shift_of)


def _name_prefix(by_weight: Iterable[Sequence[Match]], base: Mapping[str, TensorSpec]) -> str:
    """The prefix that the names of the base need for the tensors that are added."""
    added = [match for matches in by_weight for match in matches if match.weight not in base]
    prefixes = {match.prefix.adapter: match.adapter for match in added}
    if len(prefixes) > 1:
        raise InputRefused(
            "the adapters add tensors to the base, and each expects another prefix before the base's names: "
            + ", ".join(f"`{prefix}` ({adapter})" for prefix, adapter in sorted(prefixes.items()))
            + ". Merge only one of these adapters"
        )
    return next(iter(prefixes), "")


# --- Pairs without a shape, as pairs of the weights that a plan lays them on ---


def with_shapes(base: BaseTensors, adapter: Adapter, prefix: Prefix) -> Adapter:
    """The adapter without open pairs; those of weights that the base lacks, or in an unknown layout, stay open.

    Raises MatchError with every pair that has no form of its weight's shape.
    """
    names = {
        name: weight_of(prefix.to_base(name), base)
        for name, pair in adapter.pairs.items()
        if isinstance(pair, OpenPair)
    }
    specs = {name: base[weight] for name, weight in names.items() if weight is not None}
    shapes = {name: spec.matrix for name, spec in specs.items() if spec.layout is not Layout.UNKNOWN}
    pairs: dict[str, LoraPair] = {}
    misfits = []
    for name, shape in shapes.items():
        pair = adapter.pairs[name]
        try:
            pairs[name] = pair.for_shape(shape, list(shapes.values())) if isinstance(pair, OpenPair) else pair
        except InputRefused as error:
            misfits.append(Misfit(adapter.name, adapter.spelled(name), f"{names[name]}: {error}"))
    if misfits:
        raise MatchError(misfits, targets=len(adapter.pairs))
    return replace(adapter, pairs={**adapter.pairs, **pairs}) if pairs else adapter
