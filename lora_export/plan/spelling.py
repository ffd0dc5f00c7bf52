"""In which generation of names an adapter is spelled, and its tensors under the names of the base.

transformers renames weights while it loads them, and joins or splits some. An adapter has the names of the model that
it was trained on, as that version of transformers loaded it. A checkpoint has the original names, or those of the
loaded model. All combinations are tried. If two of them lead to different tensors, the adapter is refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from numpy.typing import NDArray

from lora_export.errors import InputRefused, MatchError, Misfit
from lora_export.lora import Adapter, LoraPair, split_part
from lora_export.names.families import model_types
from lora_export.names.tensor_parts import NotExpressible
from lora_export.options.spelling import named
from lora_export.plan.attempts import (
    AsSpelled,
    Attempt,
    ConvertedNames,
    SpelledAdapter,
    Spelling,
    module_of_tensor,
    prefix_notes,
    shape_in_model,
)
from lora_export.plan.experts import per_expert, turned, with_stacks, with_whole_experts
from lora_export.plan.match_names import BaseTensors
from lora_export.plan.placing import Place
from lora_export.plan.types import TensorSpec

if TYPE_CHECKING:
    from lora_export.names.architecture import ArchitectureRules
    from lora_export.names.diffusion_layouts import OtherLayout

_Change = TypeVar("_Change")


def spell(adapter: Adapter, base: BaseTensors, rules: ArchitectureRules | None) -> SpelledAdapter:
    """The adapter under the names of the base. Raises InputRefused where two generations of names fit differently."""
    if adapter.flattened:
        from lora_export.plan.converted_attempts import loaded_names, other_layouts_of  # few adapters are

        loaded = [] if rules is None else [loaded_names(base, rules)]
        adapter = with_dots(adapter, [base, *(layout.tensors for layout in other_layouts_of(base)), *loaded])
    adapter = with_whole_experts(adapter, base)
    attempts = _attempts(adapter, base, rules)
    best = _best(attempts)
    for variant in per_expert(adapter) if best.matched < len(best.modules) else ():
        others = _attempts(variant, base, rules)
        if (other := _best(others)).matched == len(other.modules):
            adapter, attempts, best = variant, others, other
            break
    for other in attempts:
        if other is not best and other.matched == best.matched == len(best.modules):
            _refuse_two_answers(adapter, best, other)
    best.adapter, misfits = turned(adapter, lambda name: _shape(best, name), model_types(rules.config if rules else {}))
    spelled = best.spelled() if isinstance(best, AsSpelled) else Respelling(best).result()
    return replace(spelled, misfits=[*misfits, *spelled.misfits])


def _attempts(adapter: Adapter, base: BaseTensors, rules: ArchitectureRules | None) -> list[AsSpelled | ConvertedNames]:
    as_spelled = AsSpelled(adapter, base)
    fits = as_spelled.fits
    if fits and (rules is None or not rules.own):
        return [as_spelled]
    from lora_export.plan.converted_attempts import converted_attempts  # most adapters have the names of the base

    return [as_spelled, *converted_attempts(adapter, base, rules, fits=fits)]


def layouts_within(base: BaseTensors, around: Iterable[str]) -> list[OtherLayout] | None:
    """The other layouts of a base with further tensors, as far as they are of its own; None where it has no further."""
    further = [name for name in around if name not in base]
    if not further:
        return None
    from lora_export.names.diffusion_layouts import other_layouts

    return [
        replace(layout, tensors={name: one for name, one in layout.tensors.items() if set(one.sources) <= base.keys()})
        for layout in other_layouts([*base, *further])
    ]


def _best(attempts: Sequence[AsSpelled | ConvertedNames]) -> AsSpelled | ConvertedNames:
    # The first, where several match as many. Experts may have one name before and after transformers converts them.
    return max(attempts, key=lambda attempt: (attempt.matched, attempt.matched_tensors, attempt.has_converted_experts))


def _shape(attempt: Attempt, tensor: str) -> tuple[int, ...] | None:
    try:
        found = attempt.assembled(tensor)
    except NotExpressible:
        return None  # it is reported where the tensor is placed
    return attempt.stack_of_parts(tensor) if found is None else found.shape


def _refuse_two_answers(adapter: Adapter, one: Attempt, other: Attempt) -> None:
    for module in one.modules:
        first, second = one.weights_of(module), other.weights_of(module)
        if first != second:
            raise InputRefused(
                f"the names of adapter {adapter.name} fit the base in two ways: {adapter.spelled(module)} is "
                f"{', '.join(first)} by {one.meaning}, and {', '.join(second)} by {other.meaning}. "
                "Rename the adapter's modules as the base spells them, by "
                f"{named('prefixes')} where a prefix is enough"
            )


def unknown_names(rules: ArchitectureRules | None) -> str:
    """What is not known about the names of a base, for a message; empty where all is known."""
    if rules is None:
        return ""
    if not rules.is_known:
        return (
            f"The names that transformers {rules.version} gives the parts of {rules.architecture} are not in the table "
            "of this package."
        )
    saved_by = str(rules.config.get("transformers_version", ""))
    if _is_newer(saved_by, rules.version):
        return (
            f"The base was saved by transformers {saved_by}. This package has the names of transformers "
            f"{rules.version}: a newer one may rename more weights."
        )
    return ""


def _is_newer(one: str, other: str) -> bool:
    from packaging.version import InvalidVersion, Version

    try:
        return Version(one).release[:2] > Version(other).release[:2]
    except InvalidVersion:
        return False


def respelled(
    adapters: Sequence[Adapter], specs: Iterable[TensorSpec], rules: ArchitectureRules | None
) -> list[Adapter]:
    """The adapters under the names of a module or graph; those that have these names already are the same objects.

    Raises MatchError for a layer without tensors, and where a pair belongs to a part of a tensor: only a merge into a
    checkpoint changes parts. Raises InputRefused as `spell`.
    """
    specs, found = list(specs), []
    own, stacked = BaseTensors(specs), BaseTensors(with_stacks(specs))
    for adapter in adapters:
        # An adapter of single experts has the names of their projections: a converter places these in the stack.
        base = own if any(split_part(module)[1] for module in adapter.pairs) else stacked
        one = spell(adapter, base, rules)
        is_same = one.spelling is Spelling.SAME and not adapter.flattened
        if is_same and not adapter.experts:
            found.append(adapter)
            continue
        # Under the adapter's own names, a part is refused where it is attached or inserted. A part of three dimensions
        # is an expert.
        parts = [
            Misfit(adapter.name, name, "is a part of a tensor here; only a merge into a checkpoint can change it")
            for name, view in one.views.items()
            if not is_same and len(base[view.stored_name].shape) < 3
        ]
        if problems := [*one.misfits, *parts]:
            raise MatchError(problems, targets=len(adapter.pairs))
        if is_same:
            found.append(one.adapter)
        else:
            pairs = {name: _as_named(pair, name, one) for name, pair in one.adapter.pairs.items()}
            notes = (*adapter.notes, *one.notes)
            found.append(replace(one.adapter, pairs=pairs, targets=(), notes=notes))
    return found


def _as_named(pair: LoraPair, name: str, spelled: SpelledAdapter) -> LoraPair:
    """The pair for a part that is found by its name alone, and then has the shape in which it is stored."""
    view = spelled.views.get(spelled.prefix.to_base(name) or name)
    if view is None or not view.layout.is_transposed:
        return pair
    if pair.depends_on_weight:
        raise InputRefused(f"{name}: {pair.kind} on a part of a tensor that is stored transposed is not supported")
    return pair.transposed


# --- Names in which `_` stands for the dots, such as `blocks_0_attn_to_q`, resolved by the names of the base ---
#
# The flattening cannot be undone alone: `to_q` has a `_` of its own. The names of the base decide, in its own layout or
# in another one that it has (see `names/diffusion_layouts.py`).

_TENSOR_SUFFIX = re.compile(r"\.(weight|bias|in_proj_weight|in_proj_bias)")
_SHOWN_NAMES = 3
_MOST_PREFIXES = 20


def with_dots(adapter: Adapter, layouts: Sequence[Iterable[str]]) -> Adapter:
    """The adapter with the dots in its names. `layouts` are the tensor names of the base, in each of its layouts.

    The layout that has most of the adapter's modules decides, the first of several. Names that it lacks stay as they
    are. Raises InputRefused where two names of the base flatten to one name of the adapter.
    """
    names = [*adapter.pairs, *adapter.biases, *(tensor.rpartition(".")[0] for tensor in adapter.added)]
    flat = list(dict.fromkeys(names))
    best: dict[str, list[str]] = {}
    for tensors in layouts:
        modules = _modules(tensors)
        for found in _by_prefix(flat, modules):
            if len(found) > len(best):
                best = found
    if ambiguous := {name: real for name, real in best.items() if len(real) > 1}:
        name, real = next(iter(ambiguous.items()))
        raise InputRefused(
            f"{adapter.name}: {adapter.spelled(name)} may mean {' and '.join(real[:_SHOWN_NAMES])}: the names of the "
            "base become one when `_` takes the place of the dots"
        )
    dotted = {name: real[0] for name, real in best.items()}

    def with_its_dots(name: str) -> str:
        module, dot, what = name.rpartition(".")  # of a tensor: its weight or bias
        return dotted.get(name) or dotted.get(module, module) + dot + what

    return adapter.renamed(with_its_dots, flattened=False)


def _modules(tensors: Iterable[str]) -> list[str]:
    modules: dict[str, None] = {}
    for tensor in tensors:
        suffix = _TENSOR_SUFFIX.search(tensor, max(0, tensor.rfind(".")))
        modules[tensor[: suffix.start()] if suffix and suffix.end() == len(tensor) else tensor] = None
    return list(modules)


def _by_prefix(flat: Sequence[str], modules: Sequence[str]) -> Iterator[dict[str, list[str]]]:
    """Adapter's name -> base's names after the prefix, for each prefix that one of them may have."""
    flattened = [(module, module.replace(".", "_")) for module in modules]
    for of_adapter, of_base in _prefixes(flat, flattened):
        own: dict[str, list[str]] = {}
        for module, name in flattened:
            if module.startswith(of_base):
                own.setdefault(of_adapter + name[len(of_base) :], []).append(module[len(of_base) :])
        yield {name: own[name] for name in flat if name in own}


def _prefixes(flat: Sequence[str], flattened: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Pairs of a prefix of the adapter and one of the base with which one of the adapter's first names is found.

    The most frequent pair comes first. At least one of the two is empty. Without a prefix comes before all.
    """
    found: Counter[tuple[str, str]] = Counter()
    for name in flat[:_SHOWN_NAMES]:
        for module, other in flattened:
            start = len(module) - len(name)
            if other.endswith(f"_{name}") and module[start - 1] == ".":
                found["", module[:start]] += 1
            elif name.endswith(f"_{other}"):
                found[name[: -len(other)], ""] += 1
    return [("", ""), *(pair for pair, _ in found.most_common(_MOST_PREFIXES))]


class Respelling:
    """The tensors of an adapter, one after another, under the names of the base."""

    def __init__(self, attempt: ConvertedNames):
        self.attempt, self.adapter = attempt, attempt.adapter
        self.views: dict[str, TensorSpec] = {}
        self.misfits: list[Misfit] = []
        self.spelling = dict(self.adapter.spelling)
        self.modules: dict[str, str] = {}  # module of the adapter -> its new name, where it has one
        # module of the adapter -> those whose weights have all entries of a tensor
        self.whole: dict[str, list[str]] = {}
        self.transposed: set[str] = set()  # modules of the adapter whose weights the base stores transposed

    def result(self) -> SpelledAdapter:
        attempt, adapter = self.attempt, self.adapter
        pairs = self._each_once((module, self._pairs(module, pair)) for module, pair in adapter.pairs.items())
        biases = self._arrays({f"{module}.bias": change for module, change in adapter.biases.items()})
        added, replaced = self._arrays(adapter.added), self._arrays(adapter.replaced)
        token_rows = self._each_once(
            (tensor, [(name, rows) for name, place in self._tensor(tensor, ()) if self._is_whole(place, tensor)])
            for tensor, rows in adapter.token_rows.items()
        )
        spelled = replace(
            adapter,
            pairs=pairs,
            biases={name.removesuffix(".bias"): change for name, change in biases.items()},
            added=added,
            replaced=replaced,
            token_rows=token_rows,
            layouts={new: layout for module, layout in adapter.layouts.items() for new in self._stored_alike(module)},
            tied={self._renamed(head): self._renamed(table) for head, table in adapter.tied.items()},
            spelling=self.spelling,
        )
        return SpelledAdapter(
            spelled,
            attempt.own_prefix,
            attempt.spelling,
            self.views,
            [*self.misfits, *attempt.misfits(spelled)],
            [*prefix_notes(adapter, attempt.prefix), attempt.note],
        )

    def _arrays(self, values: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return self._each_once(
            (tensor, [(name, place.of_array(value)) for name, place in self._tensor(tensor, value.shape)])
            for tensor, value in values.items()
        )

    def _each_once(self, found: Iterable[tuple[str, Iterable[tuple[str, _Change]]]]) -> dict[str, _Change]:
        """New name -> change, of what each module or tensor of the adapter becomes. Two of one name are a misfit."""
        changes: dict[str, _Change] = {}
        owners: dict[str, str] = {}
        for owner, named_changes in found:
            for name, change in named_changes:
                if name in changes:
                    self._refuse_second(name, owners[name], owner)
                changes[name], owners[name] = change, owner
        return changes

    def _pairs(self, module: str, pair: LoraPair) -> Iterable[tuple[str, LoraPair]]:
        tensor = self.attempt.tensor_of(module)
        if tensor is None:
            return [(module, pair)]
        try:
            pair = self.attempt.laid_on(tensor, pair)
        except NotExpressible as problem:
            self._refuse(self.adapter.spelled(module), tensor, problem)
            return []
        found = self._tensor(tensor, shape_in_model(pair), spelled=self.adapter.spelled(module))
        parts = []
        self.whole[module] = []
        for name, place in found:
            new = name if place.region is not None else module_of_tensor(name)
            self.spelling[new] = self.adapter.spelled(module)
            try:
                if place.region is not None and pair.embedding:
                    raise NotExpressible("splits a table of embeddings")
                parts.append((new, place.of_pair(pair)))
                self.whole[module] += [new] if place.region is None else []
                self.transposed |= {module} if place.transposed else set()
            except NotExpressible as problem:
                self._refuse(self.adapter.spelled(module), place.tensor, problem)
        if len(parts) == 1:
            self.modules[module] = parts[0][0]
        return parts

    def _tensor(self, tensor: str, shape: Sequence[int], spelled: str = "") -> list[tuple[str, Place]]:
        """The new names of a tensor of the adapter, with the places that they mean."""
        spelled = spelled or self.adapter.spelled(tensor)
        try:
            places = self.attempt.places(tensor, shape)
        except NotExpressible as problem:
            self._refuse(spelled, tensor, problem)
            return []
        if not places:
            return [(tensor, Place(tensor))]
        named = []
        for place in places:
            prefix = self.attempt.own_prefix
            if place.region is not None:
                self.views.setdefault(place.name, place.view(self.attempt.base[place.tensor]))
            name = prefix.adapter + place.name.removeprefix(prefix.base)
            self.spelling[name] = spelled
            named.append((name, place))
        return named

    def _is_whole(self, place: Place, tensor: str) -> bool:
        if place.region is None:
            return True
        self._refuse(self.adapter.spelled(tensor), place.tensor, NotExpressible("splits a table of embeddings"))
        return False

    def _refuse(self, key: str, tensor: str, problem: NotExpressible) -> None:
        self.misfits.append(Misfit(self.adapter.name, key, f"{self.attempt.converts(tensor)} {problem}"))

    def _refuse_second(self, name: str, one: str, other: str) -> None:
        why = f"{self.adapter.spelled(one)} changes {name} too: one may repeat the other. Remove one from the file"
        self.misfits.append(Misfit(self.adapter.name, self.adapter.spelled(other), why))

    def _stored_alike(self, module: str) -> list[str]:
        """The new names under which the weight of a module is stored, or parts of its rows, and not transposed."""
        return [] if module in self.transposed else self.whole.get(module) or [self._renamed(module)]

    def _renamed(self, module: str) -> str:
        return self.modules.get(module, module)
