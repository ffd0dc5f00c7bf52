"""Names in which `_` stands for the dots, such as `blocks_0_attn_to_q`, resolved by the names of the base.

The flattening cannot be undone alone: `to_q` has a `_` of its own. The names of the base decide, in its own layout or
in another one that it has (see `other_layout.py`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from lora_export.errors import InputRefused
from lora_export.lora import Adapter

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
