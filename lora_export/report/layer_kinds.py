"""The layers of a model by kind: `encoder.layer.*.attention.self.query`, and how many there are."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

Item = TypeVar("Item")


def kind_of(name: str) -> str:
    """A name without the numbers of its layers and experts. In flattened names, these are between two `_`."""
    return re.sub(r"(^|(?<=[.\[]))\d+(?=[.\],]|$)|(?<=_)\d+(?=_)", "*", name)


def by_kind(items: Iterable[Item], name: Callable[[Item], str], same: Callable[[Item], Hashable]) -> list[list[Item]]:
    """The items in groups: those whose names have one kind and for which `same` is equal, in the order of the first."""
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault((kind_of(name(item)), same(item)), []).append(item)
    return list(groups.values())


def title(names: list[str]) -> str:
    """The name of a group: its kind, or the name itself where it has one member."""
    return names[0] if len(names) == 1 else kind_of(names[0])
