"""The keys of pairs in a file of tensors, by module; and pairs, with everything that is wrong with them at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from lora_export.errors import InputRefused, listed, refuse_unprintable
from lora_export.formats.tensor_files import TensorSource
from lora_export.lora import LoraPair

Sides = Mapping[str, str]  # the side of a pair ("a", "b", ...) -> the key of its tensor


def keys_by_module(file: TensorSource, *patterns: re.Pattern[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The keys that one of the patterns, with the groups `module` and `side`, matches; and the other keys.

    Raises InputRefused for a file without tensors, for a module that has a side twice, and for names with control
    characters.
    """
    refuse_unprintable(file.entries, f"the names in {file.path}")
    modules: dict[str, dict[str, str]] = {}
    others = []
    for key in file.entries:
        match = next(filter(None, (pattern.fullmatch(key) for pattern in patterns)), None)
        if match is None:
            others.append(key)
            continue
        sides = modules.setdefault(match["module"], {})
        side = match["side"].lower()
        if side in sides:
            raise InputRefused(f"{file.path} contains one tensor under two names: {sides[side]} and {key}")
        sides[side] = key
    if not file.entries:
        raise InputRefused(f"{file.path} contains no tensor")
    return modules, others


def read_pairs(
    file: TensorSource,
    modules: Mapping[str, Sides],
    build: Callable[[str, Sides], Mapping[str, LoraPair]],
    *,
    others: Iterable[str] = (),
) -> tuple[dict[str, LoraPair], dict[str, str]]:
    """The pairs that `build` makes of each module's tensors, and the key of A for each pair's name.

    Raises InputRefused with everything that is wrong: a side that is missing, what `build` refuses, two pairs of one
    name, and each of `others`, which are keys of unknown kinds.
    """
    pairs: dict[str, LoraPair] = {}
    spelling: dict[str, str] = {}
    problems = [f"{key}: unknown kind of tensor" for key in others]
    for module, sides in modules.items():
        if missing := [side for side in ("a", "b") if side not in sides]:
            problems.append(f"{module}: {' and '.join(missing).upper()} is missing")
            continue
        try:
            built = build(module, sides)
        except InputRefused as error:
            problems.append(f"{module}: {error}")
            continue
        problems += [f"{module}: {spelling[name]} has the name {name} too" for name in built if name in pairs]
        pairs |= built
        spelling |= dict.fromkeys(built, sides["a"])
    if problems:
        raise InputRefused(f"{file.path} is refused:", listed(sorted(problems), len(problems)))
    return pairs, spelling
