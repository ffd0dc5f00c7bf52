"""The names of an adapter and of a base: model prefixes, nearest names, layers that the adapter has no tensors for.

An adapter that was trained on the text model of a multimodal base has names such as `model.layers.0`, where the base
has `model.language_model.layers.0`. Nothing but the user tells that the text model is meant.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_export.errors import InputRefused, Misfit
from lora_export.lora import Adapter, ParameterEnding, split_part
from lora_export.options.spelling import named
from lora_export.plan.types import Layout, TensorSpec

if TYPE_CHECKING:
    from lora_export.names.diffusion_layouts import OtherLayout
    from lora_export.names.loaded_names import LoadedNames

NUMBER = re.compile(r"\d+")
DOT = re.compile(r"\.")
MOST_PREFIXES = 100  # prefixes tried for the sake of a better message
LONGEST_COMPARED = 120  # characters of a name for which a nearest one is looked for
MOST_COMPARISONS = 5_000  # of names, in search of the nearest ones: some seconds


class BaseTensors(dict[str, TensorSpec]):
    """The specs of a base by name, and the base's name nearest to a misspelled one."""

    def __init__(self, specs: Iterable[TensorSpec]):
        super().__init__((spec.name, spec) for spec in specs)
        self._comparisons = 0
        self._nearest: dict[str, str | None] = {}  # a name without its numbers -> the nearest of the base's
        self.aliases = {alias: spec.name for spec in self.values() for alias in spec.aliases}
        self.loaded: LoadedNames | None = None  # set by `attempts.loaded_names`
        self.layouts: list[OtherLayout] | None = None  # set by `spelling.spell`
        self.can_untie = True  # set by `build.make`

    @functools.cached_property
    def _by_pattern(self) -> dict[str, dict[tuple[str, ...], str]]:
        """Names without their numbers -> the numbers -> the name. Apart from layers and experts, a base has few."""
        by_pattern: dict[str, dict[tuple[str, ...], str]] = {}
        for name in self:
            same_pattern = by_pattern.setdefault(_without_numbers(name.removesuffix(".weight")), {})
            same_pattern.setdefault(tuple(NUMBER.findall(name)), name)
        return by_pattern

    def stored_as(self, name: str) -> str:
        """Why a change of this name would change another tensor too; empty where it is no alias."""
        if name not in self.aliases:
            return ""
        return (
            f"{name} is stored as {self.aliases[name]}: the two are tied, and a change of one would change both. "
            f"{apart_or_both(can_untie=self.can_untie)}"
        )

    def nearest(self, name: str) -> str:
        """`; the nearest name is ...`, or an empty string."""
        pattern = _without_numbers(name.removesuffix(".weight"))
        if pattern not in self._nearest:
            self._nearest[pattern] = self._nearest_pattern(pattern)
        nearest = self._nearest[pattern]
        if nearest is None:
            return ""
        names = self._by_pattern[nearest]
        return f"; the nearest name is {names.get(tuple(NUMBER.findall(name)), next(iter(names.values())))}"

    def _nearest_pattern(self, pattern: str) -> str | None:
        # Each comparison is slow, and an adapter with only unknown names would need thousands of them.
        self._comparisons += len(self._by_pattern)
        if len(pattern) > LONGEST_COMPARED or self._comparisons > MOST_COMPARISONS:
            return None
        return next(iter(difflib.get_close_matches(pattern, self._by_pattern, n=1, cutoff=0.5)), None)


IN_CHECKPOINT = "in a merge into the checkpoint of which the file was made"


def apart_or_both(*, can_untie: bool, can_be_both: bool = True, takes_more: bool = True) -> str:
    """The ways out where tied tensors would change together: two, unless the config or the changes exclude one.

    A base that does not take more tensors is a file that was made of a checkpoint.
    """
    apart = f"{named('tied', 'untie')} gives each a tensor of its own, as the adapter was trained"
    apart += "" if takes_more else f", {IN_CHECKPOINT}"
    both = f"{named('tied', 'both')} changes both"
    return "; ".join([apart] * can_untie + [both] * can_be_both) or "No merge changes them apart"


@dataclass(frozen=True)
class Prefix:
    """The model prefix that the names of the adapter have and those of the base lack, or the other way round."""

    adapter: str = ""
    base: str = ""

    def __bool__(self) -> bool:
        return bool(self.adapter or self.base)

    def to_base(self, name: str) -> str | None:
        """The name of the base for a name of the adapter; None where that lacks the prefix."""
        return self.base + name.removeprefix(self.adapter) if name.startswith(self.adapter) else None

    def __str__(self) -> str:
        if self.adapter:
            return f"the adapter's names have the prefix `{self.adapter}`, which the base's names lack"
        return f"the base's names have the prefix `{self.base}`, which the adapter's names lack"


def weight_of(module: str | None, base: Mapping[str, TensorSpec]) -> str | None:
    """The base's name for the weight of a module: its `.weight`, packed attention's projection, or itself.

    The name of a part, such as `experts.down_proj[3]`, is that of the part of the weight.
    """
    if module is None:
        return None
    names = (f"{module}.weight", f"{module}.in_proj_weight", module)
    found = next((name for name in names if name in base), None)
    owner, indices = split_part(module)
    if found is None and indices:
        weight = weight_of(owner, base)
        return None if weight is None else f"{weight}[{indices}]"
    return found


def considered_modules(adapter: Adapter) -> list[str]:
    """The modules whose names decide how an adapter is spelled: of the parts of one tensor, the first."""
    by_owner: dict[str, str] = {}
    for module in adapter.pairs:
        if module not in adapter.tied:
            by_owner.setdefault(split_part(module)[0], module)
    return list(by_owner.values()) or [name.rpartition(".")[0] for name in (*adapter.replaced, *adapter.token_rows)]


def find_prefix(adapter: Adapter, base: Mapping[str, TensorSpec]) -> Prefix:
    """How the names of the adapter differ from those of the base: not at all, or by one leading model prefix.

    A prefix counts only where *every* pair then has its weight. Where none does, the prefix is one with which most
    pairs have, so that fewer misfits are listed. Raises InputRefused where two prefixes fit.
    """
    modules = considered_modules(adapter)
    if not modules:
        return Prefix()

    def count_matched(prefix: Prefix) -> int:
        return sum(weight_of(prefix.to_base(module), base) is not None for module in modules)

    if count_matched(Prefix()) == len(modules):
        return Prefix()
    candidates = list(_possible_prefixes(modules[0], base))
    fitting = [
        candidate
        for candidate in dict.fromkeys(candidates)
        if all(weight_of(candidate.to_base(module), base) is not None for module in modules)  # most fail at once
    ]
    if len(fitting) > 1:
        raise InputRefused(
            f"the names of adapter {adapter.name} fit the base with {len(fitting)} different prefixes: "
            + ", ".join(f"`{fit.adapter or fit.base}`" for fit in fitting)
            + ". Rename its modules so that only one fits"
        )
    if fitting:
        return fitting[0]
    best = max(candidates[:MOST_PREFIXES], key=count_matched, default=Prefix())
    return best if count_matched(best) > count_matched(Prefix()) else Prefix()


def _possible_prefixes(module: str, base: Mapping[str, TensorSpec]) -> Iterator[Prefix]:
    parts = module.split(".")
    for count in range(1, len(parts)):
        yield Prefix(adapter=".".join(parts[:count]) + ".")
    owner, indices = split_part(module)
    for suffix in (f".{owner}.weight", f".{owner}.in_proj_weight", *([f".{owner}"] if indices else [])):
        for name in base:
            if name.endswith(suffix):
                yield Prefix(base=name.removesuffix(suffix) + ".")


STACKED_PARTS = frozenset({"gate_up_proj", "down_proj"})  # parameters of all experts in transformers
_OF_EXPERTS = re.compile(r"(?:^|\.)experts\.")
_ONE_EXPERT = re.compile(r"(.*?\bexperts)\.\d+\.")  # a tensor of a base that stores each expert by itself


def missing_targets(adapter: Adapter, prefix: Prefix, base: Mapping[str, TensorSpec]) -> list[Misfit]:
    """Layers of the base that the adapter's config targets, and for which its file has no tensors.

    Where the adapter has pairs for other layers with the same ending, a layer counts only if its name differs from
    one of them in numbers alone: the `q_proj` of a vision tower is not missing from an adapter of the decoder, the
    decoder's next layer is.
    """
    owners = (split_part(name)[0].removesuffix(".weight") for name in adapter.pairs)
    adapted = {prefix.to_base(module) or module for module in owners}
    replaced = {prefix.to_base(tensor) or tensor for tensor in adapter.replaced}
    patterns = {_without_numbers(module) for module in adapted}
    adapted_endings = {ending for module in adapted for ending in endings(module)}
    targets = set(adapter.targets)
    of_modules = {target for target in adapter.targets if not isinstance(target, ParameterEnding)}
    missing = []
    for spec in base.values():
        module = spec.name.removesuffix(".weight")
        possible = targets if module == spec.name else of_modules
        target = next((ending for ending in endings(module) if ending in possible), None)
        is_bias = spec.layout is Layout.OTHER and len(spec.shape) < 3  # or the weight of a norm
        if target is None or module in adapted or spec.name in replaced or is_bias:
            continue
        if _without_numbers(module) in patterns or target not in adapted_endings:
            missing.append(_without_tensors(adapter, module))
    of_stacks = any(ending.rpartition(".")[2] in STACKED_PARTS for ending in targets - of_modules)
    if of_stacks and not any(_OF_EXPERTS.search(f"{module}.") for module in (*adapted, *replaced)):
        stacks = {found[1]: None for name in base if (found := _ONE_EXPERT.match(name))}
        missing += [_without_tensors(adapter, stack) for stack in stacks]
    return missing


def _without_tensors(adapter: Adapter, layer: str) -> Misfit:
    return Misfit(adapter.name, layer, "targeted by the adapter's config, but its file has no tensors for it")


def endings(module: str) -> Iterator[str]:
    """The whole name, and the part after each of its dots."""
    yield module
    for dot in DOT.finditer(module):
        yield module[dot.end() :]


def _without_numbers(name: str) -> str:
    return NUMBER.sub("#", name)


# --- Leading parts of names that the user states (`prefixes`), and which ones would help ---


LEAST_SHARED = 2  # parts at the end of two names that must be equal
MOST_PROPOSED = 3


def with_prefixes(adapters: Sequence[Adapter], prefixes: Mapping[str, str]) -> list[Adapter]:
    """The adapters with other prefixes in their names. The longest prefix of a name counts.

    Raises InputRefused for a prefix that no name has, and where two names become one.
    """
    if not prefixes:
        return list(adapters)
    unused = set(prefixes)

    def renamed(name: str) -> str:
        old = max((each for each in prefixes if name.startswith(each)), key=len, default=None)
        if old is None:
            return name
        unused.discard(old)
        return prefixes[old] + name.removeprefix(old)

    found = [_renamed(adapter, renamed) for adapter in adapters]
    if unused:
        names = [next(iter((*one.pairs, *one.replaced, *one.token_rows)), "none") for one in adapters]
        raise InputRefused(
            f"{named('prefixes')}: no name of an adapter begins with {', '.join(map(repr, sorted(unused)))}. "
            f"The first names are {', '.join(names) or 'none'}"
        )
    return found


def _renamed(adapter: Adapter, renamed: Callable[[str], str]) -> Adapter:
    new = adapter.renamed(renamed)
    if len(new.every_name) < len(adapter.every_name):
        raise InputRefused(f"{named('prefixes')} gives two tensors of adapter {adapter.name} the same name")
    return new


def fitting_prefixes(adapter: Adapter, names: Iterable[str], fits: Callable[[Adapter], bool]) -> list[tuple[str, str]]:
    """The pairs (FROM, TO), at most three, with which the names of an adapter fit those of a base.

    `names` are the tensors of the base; `fits` tells whether an adapter fits.
    """
    modules = list(dict.fromkeys(split_part(module)[0] for module in adapter.pairs if module not in adapter.tied))
    if not modules:
        return []
    bases = [name.removesuffix(".weight") for name in names]
    existing, found = set(bases), []
    for old, new in dict.fromkeys(_candidates(modules[0], bases)):
        if all((new + name.removeprefix(old) if name.startswith(old) else name) in existing for name in modules):
            if fits(with_prefixes([adapter], {old: new})[0]):
                found.append((old, new))
            if len(found) == MOST_PROPOSED:
                break
    return found


def _candidates(module: str, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    own = module.split(".")
    for name in names:
        other = name.split(".")
        shared = 0
        while shared < min(len(own), len(other)) and own[-1 - shared] == other[-1 - shared]:
            shared += 1
        if shared >= LEAST_SHARED and shared < len(own):
            old, new = (parts[: len(parts) - shared] for parts in (own, other))
            if not any(part.isdigit() for part in (*old, *new)):  # another layer is never meant
                yield ".".join([*old, ""]), ".".join([*new, ""])


def prefix_remedy(proposals: Sequence[tuple[str, str]]) -> str:
    """What a message proposes; empty where nothing would help."""
    if not proposals:
        return ""
    options = " or ".join(named("prefixes", {old: new}) for old, new in proposals)
    return f"With {options} the adapter's names fit the base. Check that this is the part it was trained on."
