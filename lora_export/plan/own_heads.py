"""Whole layers that adapters bring, such as a task head, where each row of a batch has those of its own adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from lora_export.errors import InputRefused, listed
from lora_export.lora import Adapter, ModuleEndings
from lora_export.options.spelling import command
from lora_export.plan.build import make
from lora_export.plan.types import TensorSpec

Head = Mapping[str, NDArray[Any]]  # the base's name of a tensor -> the adapter's own, (out, in) or (out,)


def head_into_base() -> str:
    """The command that merges an adapter's head into the base, and nothing else."""
    return command("merge", "BASE", "ADAPTER", output="with-head", only_head=True)


def head_names(adapter: Adapter) -> list[str]:
    """The names of the tensors that an adapter saves whole, without those that PEFT saves beside a pair."""
    return [name for name in adapter.replaced if name.removesuffix(".weight") not in adapter.pairs]


def without_own_head(adapter: Adapter) -> Adapter:
    """The adapter without the tensors of `head_names`."""
    return without_whole_tensors(adapter, head_names(adapter))


def without_whole_tensors(adapter: Adapter, names: Iterable[str]) -> Adapter:
    """The adapter without these of its whole tensors, whose modules its file does not lack."""
    dropped = frozenset(names)
    others = {name: value for name, value in adapter.replaced.items() if name not in dropped}
    saved = (ending for ending in adapter.saved_whole if not any(map(ModuleEndings([ending]).module_around, dropped)))
    return replace(adapter, replaced=others, saved_whole=ModuleEndings(saved))


def own_heads(adapters: Sequence[Adapter], specs: Iterable[TensorSpec]) -> list[Head]:
    """The head of each adapter under the names of the base. Empty for an adapter without one.

    A head may have another number of labels, its first dimension, than the base's. Raises InputRefused where the base
    has no such layer, and MatchError for another size.
    """
    specs = list(specs)
    heads: list[Head] = []
    for adapter in adapters:
        own = frozenset(head_names(adapter))
        alone = replace(adapter, pairs={}, replaced={name: adapter.replaced[name] for name in own}, targets=())
        steps = make([alone], with_labels_of(adapter, specs)).steps if own else ()
        heads.append(
            {
                step.weight: step.replace.T if step.spec.layout.is_transposed else step.replace
                for step in steps
                if step.replace is not None
            }
        )
    return heads


def with_labels_of(adapter: Adapter, specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """The specs of the base, with the number of labels of the adapter's head. Raises InputRefused for one it lacks."""
    by_name, lacking = {spec.name: spec for spec in specs}, []
    for name in head_names(adapter):
        found = [base for base in by_name if f".{base}".endswith(f".{name}") or f".{name}".endswith(f".{base}")]
        if not found:
            lacking.append(f"{adapter.name}, {name}")
            continue
        spec, shape = by_name[max(found, key=len)], adapter.replaced[name].shape
        is_head = len(spec.shape) == len(shape) in (1, 2) and spec.shape[1:] == shape[1:]
        by_name[spec.name] = replace(spec, shape=shape) if is_head and not spec.layout.is_transposed else spec
    if lacking:
        raise InputRefused(
            "the base lacks these layers, which adapters save whole, so that rows with id 0 would have none:",
            listed(lacking),
            f"Merge one adapter's head into the base first: {head_into_base()}",
        )
    return list(by_name.values())
