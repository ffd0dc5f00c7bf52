"""Tensors that a model has under several names, such as input and output embeddings that are tied.

A change under one name would silently change the others. Without a decision it is refused. `UNTIE` gives each name a
tensor of its own: that is what PEFT's layers compute, as each adds its pair beside the shared weight. `BOTH` changes
the shared tensor: that is what PEFT's `merge_and_unload` does to it with A and B. Of a module that the adapter saves
whole, PEFT's merge is that of `UNTIE`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np

from lora_export.errors import InputRefused, Misfit, WrongUsage
from lora_export.lora import Adapter, LoraPair, TokenRows, is_weight_of
from lora_export.options.spelling import named
from lora_export.plan.match_names import IN_CHECKPOINT, Prefix, apart_or_both
from lora_export.plan.types import Step, TensorSpec, are_same_change


class Tied(StrEnum):
    """What happens to tied tensors of which an adapter changes one."""

    ERROR = "error"  # the adapter is refused
    UNTIE = "untie"  # each name gets a tensor of its own
    BOTH = "both"  # all names change

    @classmethod
    def _missing_(cls, value: object) -> Tied:
        raise WrongUsage(f"{named('tied')} must be error, untie or both, not {value!r}")


@dataclass(frozen=True)
class Ties:
    """The tied tensors of a base, what it stores of them, and what happens to those of which an adapter changes one.

    The base stores nothing of a tied tensor, or stores it again (the same bits), or apart (other values: transformers
    does not tie these). `classified` tells the last two from each other.
    """

    handling: Tied = Tied.ERROR
    tensors: Mapping[str, str] = field(default_factory=dict)  # tied tensor -> the one whose values it has
    by_config: bool = False  # whether one value of the model's config ties all of them
    loaded: Mapping[str, str] = field(default_factory=dict)  # tensor -> its name in the loaded model
    bound: str = ""  # why the config cannot untie them; empty where it can
    takes_more: bool = True  # whether the base can get a tensor of its own for each name
    remedy: str = ""  # what to do where no option of a merge helps
    stored: frozenset[str] = frozenset()  # tied tensors that the base stores under their own names, too
    has_other_values: Callable[[str], bool] = lambda _: False  # whether it stores such a tensor apart; reads both
    stored_again: frozenset[str] = frozenset()
    apart: frozenset[str] = frozenset()

    def ways_out(self, *, can_be_both: bool) -> str:
        """The options by which a merge can take a change of one name."""
        return apart_or_both(can_untie=not self.bound, can_be_both=can_be_both, takes_more=self.takes_more)

    def groups(self) -> Iterator[tuple[str, ...]]:
        """The names of each tensor, the stored one first."""
        for stored in dict.fromkeys(self.tensors.values()):
            yield (stored, *(name for name, source in self.tensors.items() if source == stored))

    def classified(self, adapters: Iterable[tuple[Adapter, Prefix]]) -> Ties:
        """The ties with what the base stores of tensors where that matters to adapters, which have the base's names.

        Reads these tensors. Raises InputRefused for rows of one of two tensors that differ, where PEFT has other rows.
        """
        groups = [group for adapter, prefix in adapters for group in _named_groups(adapter, self, prefix)]
        matter = {tensor for group in groups if group.depends_on_values(self.handling) for tensor in group.names}
        stored = self.stored & matter
        apart = self.apart.union(filter(self.has_other_values, stored))
        found = replace(self, stored_again=stored - apart, apart=apart)
        _refuse_rows_of_one(found, groups)
        return found

    def of_one_table(self) -> Ties:
        """The ties of tensors that are one in the loaded model."""
        return replace(self, tensors={name: of for name, of in self.tensors.items() if name not in self.apart})

    def of_stored_again(self) -> Ties:
        """The ties of tensors that are stored under both names."""
        return replace(self, tensors={name: self.tensors[name] for name in self.tensors if name in self.stored_again})


@dataclass(frozen=True)
class _NamedGroup:
    """The tensors of one table, under the names of an adapter."""

    adapter: Adapter
    names: Mapping[str, str]  # tensor of the base -> its name in the adapter; the stored one first

    def rows(self, *tensors: str) -> list[TokenRows]:
        """The rows of these tensors."""
        found = (self.adapter.token_rows.get(self.names.get(tensor, "")) for tensor in tensors)
        return [rows for rows in found if rows is not None]

    def has_pair(self, tensor: str) -> bool:
        return self.names[tensor].removesuffix(".weight") in self.adapter.pairs

    def is_saved(self, tensor: str) -> bool:
        return self.names[tensor] in self.adapter.replaced

    def depends_on_values(self, handling: Tied) -> bool:
        """Whether it makes a difference to the plan that tensors are stored with other values."""
        source, *_ = self.names
        if handling is Tied.ERROR:
            return bool(self.rows(source))
        if handling is Tied.UNTIE:
            return any(self.has_pair(tensor) and self.is_saved(tensor) for tensor in self.names)
        return any(self.has_pair(each) or self.is_saved(each) or self.rows(each) for each in self.names)

    @property
    def has_equal_rows(self) -> bool:
        """Whether all its tensors that have rows have the same ones."""
        rows = self.rows(*self.names)
        return all(rows[0].equals(other) for other in rows)


def _named_groups(adapter: Adapter, ties: Ties, prefix: Prefix) -> Iterator[_NamedGroup]:
    for group in ties.groups():
        names = {tensor: name for tensor in group if (name := _of_adapter(tensor, prefix)) is not None}
        if names:
            yield _NamedGroup(adapter, names)


def _refuse_rows_of_one(ties: Ties, groups: Sequence[_NamedGroup]) -> None:
    for group, tensor in ((each, name) for each in groups for name in each.names if name in ties.apart):
        source, owner = ties.tensors[tensor], group.adapter.name
        if ties.handling is Tied.BOTH and group.rows(tensor) and not group.rows(source):
            raise InputRefused(
                f"{named('tied', 'both')}: the base stores other values of {tensor} than of {source}, so that its "
                f"model does not tie them, and {owner} replaces rows of {tensor} alone. Leave {named('tied')} out"
            )
        if ties.handling is Tied.ERROR and group.rows(source) and not group.rows(tensor) and not group.is_saved(tensor):
            can_be_both = all(one.has_equal_rows for one in groups)
            ways_out = ties.remedy or ties.ways_out(can_be_both=can_be_both)
            if (
                not ties.remedy and not ties.bound and ties.stored == ties.tensors.keys()
            ):  # else a tensor would have no values
                ways_out += f"; tie_word_embeddings = false in the base's config.json leaves {tensor} as it is"
            raise InputRefused(
                f"{owner} replaces rows of {source}, to which the model ties {tensor}, but the base stores other "
                f"values of {tensor}. {ways_out}"
            )


def tied_remedy(
    misfits: Iterable[Misfit], adapters: Iterable[tuple[Adapter, Prefix]], ties: Ties, aliases: Mapping[str, str]
) -> str:
    """Which option handles tied tensors that misfits are about, or that none does; empty where they are about none.

    `aliases` are further tied tensors.
    """
    ties = replace(ties, tensors={**ties.tensors, **aliases})
    about = (name for name in ties.tensors for misfit in misfits if _is_about(misfit, _names(name, ties)))
    found = next(about, None)
    if found is None or ties.handling is not Tied.ERROR:
        return ""
    source = ties.tensors[found]
    groups = [one for adapter, prefix in adapters for one in _named_groups(adapter, ties, prefix) if found in one.names]
    for group in groups:
        modules = [name.removesuffix(".weight") for name in (group.names[found], *_names(found, ties))]
        if group.rows(source) and not group.adapter.pairs.keys().isdisjoint(modules):
            return (
                f"{found} is tied to {source}. {group.adapter.name} replaces rows of one, and adds to the other: no "
                "merge does both"
            )
    can_be_both = all(group.has_equal_rows for group in groups)
    return f"{found} is tied to {source}. {ties.ways_out(can_be_both=can_be_both)}"


def _is_about(misfit: Misfit, tensors: Sequence[str]) -> bool:
    modules = [tensor.removesuffix(".weight") for tensor in tensors]
    return not misfit.is_conflict and any(
        module in misfit.key or misfit.problem.startswith(module) for module in modules
    )


def with_copies(base: Iterable[TensorSpec], ties: Ties) -> list[TensorSpec]:
    """The specs of a base, with one for each tied name that it lacks. To be untied."""
    specs = {spec.name: spec for spec in base}
    for stored in dict.fromkeys(ties.tensors.values()):
        specs[stored] = replace(specs[stored], aliases=())
    copies = (replace(specs[stored], name=name) for name, stored in ties.tensors.items() if name not in specs)
    return [*specs.values(), *copies]


def untied(steps: Mapping[str, Step], ties: Ties, stored: Collection[str]) -> dict[str, str]:
    """The names that get a tensor of their own, with the stored tensor whose values they start from.

    These are the names of tensors that do not all change alike; where the config ties them, all names then. `stored`
    are the names that have a tensor of their own already.
    """
    groups = list((ties.of_one_table() if ties.bound else ties).groups())  # tensors that stay as they are stored
    apart = [group for group in groups if not _change_alike([steps.get(name) for name in group])]
    if ties.by_config and apart:
        apart = groups
    return {name: group[0] for group in apart for name in group if name not in stored}


def untied_by_added(steps: Mapping[str, Step], ties: Ties, stored: Collection[str]) -> dict[str, str]:
    """As `untied`, where a tensor is added under a tied name without an option: it unties all names of the config.

    A name that is not stored has the values of the stored one. Raises InputRefused where the config cannot untie, and
    for what `refuse_lost_rows` describes.
    """
    added = {name for name in ties.tensors if any(each in steps and steps[each].added for each in _names(name, ties))}
    if not added:
        return {}
    for name in added:
        for each in _names(name, ties):
            if each in steps and ties.tensors[name] in steps:
                refuse_lost_rows(steps[ties.tensors[name]], steps[each])
    own = {*stored, *added}

    def change_of(name: str) -> Step | None:
        return next((steps[each] for each in _names(name, ties) if each in steps), None)

    groups = list(ties.groups())
    if not ties.by_config and not any(group[0] in steps for group in groups):
        return {}
    if all(_change_alike([change_of(name) for name in group if name in own]) for group in groups):
        return {}
    if ties.bound:
        raise InputRefused(f"the adapter adds {', '.join(sorted(added))}, which the model ties. {ties.bound}")
    return {name: group[0] for group in groups for name in group if name not in own}


def rows_of_copies(steps: Mapping[str, Step], copies: Mapping[str, str]) -> Iterator[Step]:
    """The steps on tensors that start from another one with trained rows: PEFT trains these for all names of a table.

    `copies` are such as `untied_by_added` returns.
    """
    for name, source in copies.items():
        if source in steps and steps[source].token_rows is not None:
            yield replace(steps[source], spec=replace(steps[source].spec, name=name, aliases=()))


def refuse_lost_rows(table: Step, other: Step) -> None:
    """Raise InputRefused where one adapter replaces rows of a table, and another one has values of a tensor tied to it.

    PEFT trains the rows for both tensors, unless the adapter has values of the other one, too.
    """
    lost = [name for name in table.values_of if name not in other.values_of]
    if table.token_rows is not None and other.has_own_values and lost:
        raise InputRefused(
            f"{lost[0]} replaces rows of {table.weight}, and so of {other.weight}, which is tied to it; "
            f"{other.values_of[0]} replaces {'rows of' if other.replaces_only_rows else 'the whole'} {other.weight}. "
            f"Merge only one of these adapters{_or_both(table, other)}"
        )


def _or_both(table: Step, other: Step) -> str:
    """That a checkpoint takes both, where each of them replaces other rows and nothing else."""
    rows = table.token_rows, other.token_rows
    if not (table.replaces_only_rows and other.replaces_only_rows) or rows[0] is None or rows[1] is None:
        return ""
    if np.intersect1d(rows[0].indices, rows[1].indices).size:
        return ""
    return f", or both into the checkpoint with {named('tied', 'untie')}, where its config can untie the two"


def _names(name: str, ties: Ties) -> tuple[str, str]:
    """A tied tensor as files of the base spell it, and as the loaded model does."""
    return name, ties.loaded.get(name, name)


def _change_alike(changes: Sequence[Step | None]) -> bool:
    """Whether tied tensors stay tied. With rows of the stored one they do: PEFT trains these for all names."""
    first, *others = changes
    if not any(others) and (first is None or first.replaces_only_rows):
        return True
    return first is not None and all(step is not None and are_same_change(first, step) for step in others)


def with_rows_of_all_names(adapter: Adapter, ties: Ties, prefix: Prefix) -> Adapter:
    """The adapter, whose rows of a stored table are rows of all its names that have none of their own.

    PEFT trains rows of the input embeddings for all names that are tied to them, unless two names have different
    indices. Rows of another name are its own. `BOTH` makes rows of one name rows of all. Raises InputRefused where
    these differ.
    """
    token_rows, replaced = dict(adapter.token_rows), dict(adapter.replaced)
    for group in _named_groups(adapter, ties, prefix):
        names = list(group.names.values())
        with_rows = [name for name in names if name in token_rows]
        if not with_rows or (ties.handling is not Tied.BOTH and names[0] not in with_rows):
            continue
        first = token_rows[with_rows[0]]
        if ties.handling is not Tied.BOTH and any(
            not np.array_equal(first.indices, token_rows[name].indices) for name in with_rows
        ):
            continue
        if ties.handling is Tied.BOTH and not all(first.equals(token_rows[name]) for name in with_rows):
            raise InputRefused(
                f"{adapter.name}, {', '.join(with_rows)}: tied tensors cannot change as one, because it replaces other "
                f"rows of each. {_untying(ties)}"
            )
        matched = [name for name in names for module in first.tied if is_weight_of(name, module)]
        token_rows = {**{name: replace(first, tied=()) for name in names if name not in matched}, **token_rows}
        if with_rows[0].removesuffix(".weight") in adapter.tied.values():  # and so is the table that is saved beside
            replaced |= dict.fromkeys(names, replaced[with_rows[0]])
    is_changed = token_rows.keys() != adapter.token_rows.keys() or replaced.keys() != adapter.replaced.keys()
    return replace(adapter, token_rows=token_rows, replaced=replaced) if is_changed else adapter


def with_saved_tables(adapter: Adapter, ties: Ties, prefix: Prefix) -> Adapter:
    """The adapter, whose table that is saved beside a pair is that of all its names.

    PEFT loads it into the tied tensor (`base_layer`), and adds the pair to its output. A saved module without a pair is
    a copy, which it trains apart.
    """
    replaced = dict(adapter.replaced)
    for group in _named_groups(adapter, ties, prefix):
        names = list(group.names.values())
        saved = [name for name in names if name in replaced and name.removesuffix(".weight") in adapter.pairs]
        if saved:
            replaced = {**dict.fromkeys(names, replaced[saved[0]]), **replaced}
    return adapter if replaced.keys() == adapter.replaced.keys() else replace(adapter, replaced=replaced)


def shared(adapter: Adapter, ties: Ties, prefix: Prefix, embeddings: Collection[str] = ()) -> Adapter:
    """The adapter, whose changes of one tied tensor are changes of all its names, as with PEFT's `ensure_weight_tying`.

    Changes that it has under several names are summed. `embeddings` are the tensors that are tables of embeddings,
    where that is known; otherwise all names get pairs of the kind that the adapter has.

    Raises InputRefused for what no sum expresses: DoRA, and whole tensors beside pairs or other whole tensors.
    """
    for group in _named_groups(adapter, ties, prefix):
        tables = {name: tensor in embeddings for tensor, name in group.names.items()}
        names = list(tables)
        modules = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
        pairs = [(name, adapter.pairs[name]) for name in modules if name in adapter.pairs and name not in adapter.tied]
        wholes = [name for name in names if name in adapter.replaced]
        if not pairs and not wholes:
            continue
        _refuse_beyond_sums(adapter, pairs, wholes, ties)
        total = _sum([pair for _, pair in pairs]) if pairs else None
        kinds = {name: tables[f"{name}.weight"] if embeddings else None for name in modules}
        changed = {} if total is None else {name: _of_kind(total, kinds[name]) for name in modules}
        value = adapter.replaced[wholes[0]] if wholes else None
        adapter = replace(
            adapter,
            pairs={**adapter.pairs, **changed},
            replaced={**adapter.replaced, **({} if value is None else dict.fromkeys(names, value))},
            tied={**adapter.tied, **(dict.fromkeys(modules[1:], modules[0]) if modules else {})},
        )
    return adapter


def _of_adapter(tensor: str, prefix: Prefix) -> str | None:
    """The adapter's name for a tensor of the base; None where its prefix leaves none."""
    return prefix.adapter + tensor.removeprefix(prefix.base) if tensor.startswith(prefix.base) else None


def _untying(ties: Ties) -> str:
    """What to do about changes that one tensor cannot have; or why there is no way."""
    if ties.bound:
        return f"Nor can they be untied: {ties.bound}"
    return f"Use {named('tied', 'untie')}{'' if ties.takes_more else f', {IN_CHECKPOINT}'}"


def _refuse_beyond_sums(
    adapter: Adapter, pairs: Sequence[tuple[str, LoraPair]], wholes: Sequence[str], ties: Ties
) -> None:
    names = ", ".join([*(name for name, _ in pairs), *wholes])
    if any(pair.magnitude is not None for _, pair in pairs):
        why = "DoRA rescales a weight by the outputs of one layer"
    elif kinds := [pair.kind for _, pair in pairs if pair.needs_weight]:
        why = f"the change by {kinds[0]} follows from the weight of one layer"
    elif any(not np.array_equal(adapter.replaced[name], adapter.replaced[wholes[0]]) for name in wholes):
        why = "it replaces them by different values"
    elif wholes and any(f"{name}.weight" not in wholes for name, _ in pairs):
        why = "it replaces one of them, and adds to another"
    else:
        return
    raise InputRefused(f"{adapter.name}, {names}: tied tensors cannot change as one, because {why}. {_untying(ties)}")


def _sum(pairs: Sequence[LoraPair]) -> LoraPair:
    """One pair of several on the same tensor, in the kind of the first: A and B concatenated along the rank."""
    first, *others = pairs
    if not others:
        return first
    alike = [_of_kind(pair, first.embedding) for pair in pairs]
    a = np.concatenate([pair.a * np.float32(pair.scale) for pair in alike])
    return LoraPair(a=a, b=np.concatenate([pair.b for pair in alike], axis=1), scale=1.0, embedding=first.embedding)


def _of_kind(pair: LoraPair, embedding: bool | None) -> LoraPair:
    """The pair as that of a table of embeddings or of a linear layer with the same stored weight."""
    return pair if embedding in (None, pair.embedding) else replace(pair.transposed, embedding=bool(embedding))
