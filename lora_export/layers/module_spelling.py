"""Names of a module: transformers may have renamed its weights when it loaded them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from lora_export.layers.module_tensors import specs
from lora_export.lora import Adapter
from lora_export.names.architecture import ArchitectureRules, rules_of
from lora_export.names.loaded_names import LoadedNames
from lora_export.plan.name_prefixes import with_prefixes
from lora_export.plan.spelling import respelled


def respelled_for(module: nn.Module, adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters under the names of a module. Raises as `plan.spelling.respelled`.

    Where a module is the inner part of a model (`outer_names`), names of the whole model fit it, too. Pairs on a layer
    that it had and does not read (`unread`) are left out, with a note.
    """
    adapters = [_without_unread(module, _without_outer_names(module, adapter)) for adapter in adapters]
    rules = _conversion_rules(module) if adapters else None
    return adapters if rules is None else respelled(adapters, specs(module), rules)


def _without_outer_names(module: nn.Module, adapter: Adapter) -> Adapter:
    outer: tuple[str, ...] = getattr(module, "outer_names", ())
    used = {prefix: "" for prefix in outer if any(name.startswith(prefix) for name in _names(adapter))}
    return with_prefixes([adapter], used)[0]


def _without_unread(module: nn.Module, adapter: Adapter) -> Adapter:
    unread: tuple[str, ...] = getattr(module, "unread", ())
    dropped = [name for name in _names(adapter) if name.startswith(unread)] if unread else []
    if not dropped:
        return adapter
    note = f"{adapter.name} changes {', '.join(dropped)}, which no output of the model reads: left out"
    kept = adapter.renamed(lambda name: None if name.startswith(unread) else name)
    return replace(kept, notes=(*adapter.notes, note))


def _names(adapter: Adapter) -> list[str]:
    return [*adapter.pairs, *adapter.replaced, *adapter.biases, *adapter.added, *adapter.token_rows]


def with_loaded_names(module: nn.Module, dtypes: Mapping[str, str]) -> dict[str, str]:
    """Dtypes of stored tensors, also under the names that these have in the module.

    A tensor that was made of several stored ones has a dtype if all of these have it.
    """
    rules = _conversion_rules(module)
    if rules is None:
        return dict(dtypes)
    found = dict(dtypes)
    for tensor in LoadedNames(rules, dtypes).values():
        kinds = {dtypes[name] for name in tensor.sources}
        if len(kinds) == 1:
            found[tensor.name] = kinds.pop()
    return found


def _conversion_rules(module: nn.Module) -> ArchitectureRules | None:
    """How transformers renames the weights of one of its models while it loads them; None for other modules."""
    config = getattr(module, "config", None)
    if config is None or not type(module).__module__.startswith("transformers."):
        return None
    return rules_of({**config.to_dict(), "architectures": [type(module).__name__]})
