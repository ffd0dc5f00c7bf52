"""Leading parts of an adapter's names, replaced as the user states (`prefixes`), and which ones would help.

An adapter that was trained on the text model of a multimodal base has names such as `model.layers.0`, where the base
has `model.language_model.layers.0`. Nothing but the user tells that the text model is meant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from lora_export.errors import InputRefused
from lora_export.lora import Adapter, split_part
from lora_export.options.spelling import named

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
    names = [*adapter.pairs, *adapter.replaced, *adapter.biases, *adapter.added, *adapter.token_rows]
    new = adapter.renamed(renamed)
    if len([*new.pairs, *new.replaced, *new.biases, *new.added, *new.token_rows]) < len(names):
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
