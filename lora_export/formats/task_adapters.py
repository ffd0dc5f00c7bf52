"""Adapters inside of a model's own weights, one for each task, as jina-embeddings-v3 stores them.

The scale is `lora_alpha / lora_rank` of the model's config, which names the tasks (`lora_adaptations`), too. Factors
that are no stacks are one adapter.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from lora_export.errors import InputRefused, count
from lora_export.formats.adapter_files import (
    SHARD,
    TensorSource,
    base_config,
    hash_of_unchanged,
    names_in,
    open_tensors,
    positive_number,
    read_floats,
    refuse_problems,
    stated_rank_and_alpha,
)
from lora_export.formats.peft_config import adapter_scale
from lora_export.lora import Adapter, LoraPair
from lora_export.options.reading import DEFAULTS, ReadOptions
from lora_export.options.spelling import named
from lora_export.storage.safetensors_file import is_safetensors

DESCRIPTION = "a model whose own weights hold an adapter for each task (`parametrizations.weight.0.lora_A`)"
MODEL_WEIGHTS = "model.safetensors"


def recognises(path: Path) -> bool:
    """Whether a model has stacked adapters. Reads headers alone."""
    weights = _weights(path)
    return weights is not None and any(map(STACKED_ADAPTER.fullmatch, names_in(weights)))


def read(path: Path, name: str, options: ReadOptions = DEFAULTS) -> Adapter:
    """Read the adapter of one task. Raises InputRefused with everything that is wrong with it."""
    weights = _weights(path)
    if weights is None:
        raise InputRefused(f"{path} has no {MODEL_WEIGHTS}")
    file, config = open_tensors(weights, options), base_config(weights.parent, options) or {}
    modules: dict[str, dict[str, str]] = {}  # module -> side -> key
    for key in file.entries:
        if match := STACKED_ADAPTER.fullmatch(key):
            modules.setdefault(match["module"], {})[match["side"]] = key
    refuse_other_parametrizations(file.entries, file.path)
    tasks = {tasks_of(file.entries[key].shape) for sides in modules.values() for key in sides.values()}
    if len(tasks) != 1:
        raise InputRefused(f"{file.path}: its adapters are stacked for different numbers of tasks")
    (number,) = tasks
    names = task_names(config, number)
    task = _chosen(file, names, options.stored_adapter)
    scale = _scale(file, modules, config, options)
    pairs, problems = {}, []
    for module, sides in modules.items():
        try:
            pairs[module] = _pair(file, module, sides, names.index(task), scale)
        except InputRefused as error:
            problems.append(f"{module}: {error}")
    refuse_problems(file, problems)
    return Adapter(
        name=name,
        format="task_adapters",
        pairs=pairs,
        layouts={module: "out_in" for module, pair in pairs.items() if not pair.embedding},
        spelling={module: sides["A"] for module, sides in modules.items()},
        scale_source="lora_alpha / lora_rank in config.json" if "lora_alpha" in config else "alpha / rank, as stated",
        notes=(f"the adapter of the task {task}, of {count(number, 'task')} in {file.path.name}",),
        sha256=hashlib.sha256(f"{hash_of_unchanged(file)} {task}".encode()).hexdigest(),
    )


def _weights(path: Path) -> Path | None:
    """The file of a model: the path itself, that of a folder, or the first of its shards."""
    if path.is_file():
        return path if is_safetensors(path) else None
    if not path.is_dir():
        return None
    if (path / MODEL_WEIGHTS).is_file():
        return path / MODEL_WEIGHTS
    return min((each for each in path.iterdir() if SHARD.fullmatch(each.name) and each.is_file()), default=None)


def _chosen(file: TensorSource, names: tuple[str, ...], chosen: str) -> str:
    if chosen in names:
        return chosen
    if not chosen and len(names) == 1:
        return names[0]
    choice = f"it has no {chosen}" if chosen else f"choose one: {named('stored_adapter', names[0])}"
    raise InputRefused(f"{file.path} contains {count(len(names), 'adapter')}: {', '.join(names)}; {choice}")


def _scale(
    file: TensorSource, modules: Mapping[str, Mapping[str, str]], config: Mapping[str, Any], options: ReadOptions
) -> float:
    if "lora_alpha" in config and "lora_rank" in config:
        options.refuse_rank_and_alpha("the model's config.json")
        rank, alpha = (
            positive_number("the model's config.json", name, config[name]) for name in ("lora_rank", "lora_alpha")
        )
    else:
        rank, alpha = stated_rank_and_alpha(f"no config.json beside {file.path} has lora_rank and lora_alpha", options)
    first = file.entries[next(iter(next(iter(modules.values())).values()))].shape
    if rank not in first[-2:]:
        raise InputRefused(f"{file.path}: the rank is {rank:g}, and no side of its factors {first} is")
    return adapter_scale(int(rank), alpha, {})


def _pair(file: TensorSource, module: str, sides: Mapping[str, str], task: int, scale: float) -> LoraPair:
    if missing := sorted({"A", "B"} - sides.keys()):
        raise InputRefused(f"lora_{missing[0]} is missing")
    a, b = (read_floats(file, sides[side]) for side in "AB")
    a, b = (one[None] if one.ndim == 2 else one for one in (a, b))
    if a.ndim != 3 or b.ndim != 3:
        raise InputRefused(
            f"lora_A is {a.shape} and lora_B {b.shape}; both need three dimensions, the first for the tasks"
        )
    stored = file.entries.get(f"{module}.parametrizations.weight.original")
    original = None if stored is None else stored.shape
    is_linear = a.shape[1] == b.shape[2] and original in (None, (b.shape[1], a.shape[2]))
    is_table = a.shape[2] == b.shape[1] and original in (None, (a.shape[1], b.shape[2]))
    if is_linear is is_table:
        raise InputRefused(f"lora_A is {a.shape}, lora_B {b.shape} and the weight {original}: no linear layer or table")
    one: NDArray[Any] = a[task] if is_linear else a[task].T
    other: NDArray[Any] = b[task] if is_linear else b[task].T
    return LoraPair(one, other, scale, embedding=is_table)


# --- Names of weights that hold adapters of their own: an adapter for each task, stacked, as a parametrization ---
#
# `torch.nn.utils.parametrize` stores the weight as `X.parametrizations.weight.original`, and what changes it beside
# that. jina-embeddings-v3 has `X.parametrizations.weight.0.lora_A` (tasks, rank, in) and `lora_B` (tasks, out, rank)
# there, and for a table of embeddings (tasks, words, rank) and (tasks, rank, width).

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
    known = (STACKED_ADAPTER, ORIGINAL)
    others = [n for n in names if PARAMETRIZED.fullmatch(n) and not any(each.fullmatch(n) for each in known)]
    if others:
        raise InputRefused(f"{source}: {len(others)} unknown tensors of parametrizations, such as {others[0]}")


def plain_name(name: str) -> str | None:
    """The name of a tensor in the model without its adapters; None for a part of these."""
    if STACKED_ADAPTER.fullmatch(name):
        return None
    found = ORIGINAL.fullmatch(name)
    return f"{found['module']}.weight" if found else name


def task_names(config: Mapping[str, Any], count: int) -> tuple[str, ...]:
    """The names of so many tasks, by the config; their numbers where it has none. Raises InputRefused for others."""
    names = config.get(_TASKS)
    if names is None:
        return tuple(map(str, range(count)))
    is_list = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
    if not is_list or len(set(names)) != len(names) or len(names) != count:
        raise InputRefused(f"{_TASKS} of the config is {names!r}; it must have the names of {count} tasks")
    return tuple(names)
