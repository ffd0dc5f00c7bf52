"""Names of weights that hold adapters of their own: an adapter for each task, stacked, as a parametrization.

`torch.nn.utils.parametrize` stores the weight as `X.parametrizations.weight.original`, and what changes it beside that.
jina-embeddings-v3 has `X.parametrizations.weight.0.lora_A` (tasks, rank, in) and `lora_B` (tasks, out, rank) there, and
for a table of embeddings (tasks, words, rank) and (tasks, rank, width).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_export.errors import InputRefused

ORIGINAL = re.compile(r"(?P<module>.+)\.parametrizations\.weight\.original")
STACKED_ADAPTER = re.compile(r"(?P<module>.+)\.parametrizations\.weight\.0\.lora_(?P<side>[AB])")
PARAMETRIZED = re.compile(r".+\.parametrizations\..+")
_TASKS = "lora_adaptations"  # in the model's config: the names of the tasks
FIELDS = (_TASKS, "lora_rank", "lora_alpha", "lora_dropout_p", "lora_main_params_trainable")  # that are of the adapters


def tasks_of(shape: Sequence[int]) -> int:
    """For how many tasks a factor of this shape is: one that is no stack is for one."""
    return shape[0] if len(shape) == 3 else 1


def refuse_other_parametrizations(names: Iterable[str], source: object) -> None:
    """Raise InputRefused for parametrizations that are no such adapters, as DoRA's `magnitude` is."""
    others = [n for n in names if PARAMETRIZED.fullmatch(n) and not STACKED_ADAPTER.fullmatch(n)]
    if others := [name for name in others if not ORIGINAL.fullmatch(name)]:
        raise InputRefused(f"{source}: {len(others)} unknown tensors of parametrizations, such as {others[0]}")


def has_own_adapters(names: Iterable[str]) -> bool:
    """Whether some of these tensors are stacked adapters."""
    return any(STACKED_ADAPTER.fullmatch(name) for name in names)


def plain_name(name: str) -> str | None:
    """The name of a tensor in the model without its adapters; None for a part of these."""
    if STACKED_ADAPTER.fullmatch(name):
        return None
    found = ORIGINAL.fullmatch(name)
    return f"{found['module']}.weight" if found else name


def original_name(module: str) -> str:
    """What a module's weight is stored as."""
    return f"{module}.parametrizations.weight.original"


def task_names(config: Mapping[str, Any], count: int) -> tuple[str, ...]:
    """The names of so many tasks, by the config; their numbers where it has none. Raises InputRefused for others."""
    names = config.get(_TASKS)
    if names is None:
        return tuple(map(str, range(count)))
    is_list = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
    if not is_list or len(set(names)) != len(names) or len(names) != count:
        raise InputRefused(f"{_TASKS} of the config is {names!r}; it must have the names of {count} tasks")
    return tuple(names)
