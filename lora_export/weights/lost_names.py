"""Names of an output that its class in transformers does not read, and weights of the class that it lacks.

transformers ignores a stored tensor that its class has no name for, and draws a weight that no file has at random. What
is known of a class is in the frozen table of `names`: the tensors that it ties, and the modules that not all classes of
its model type have.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from lora_export.names.architecture import ArchitectureRules, rules_of
from lora_export.names.loaded_names import LoadedNames
from lora_export.names.table import read_table
from lora_export.weights.checkpoint import Checkpoint
from lora_export.weights.tied_tensors import TIED

NUMBERED_PART = re.compile(r"(?<![^.])\d+(?![^.])")


def lost_names(
    base: Checkpoint, names: Collection[str], config: Mapping[str, Any], added: Collection[str]
) -> dict[str, str]:
    """What transformers would ignore or draw at random in an output that is made of `base`, and why.

    The keys are names of tensors, or of modules that have none. `names` and `config` are those of the output, `added`
    the names that the base has no tensor for. What the base lacks itself is not reported. Empty where the config names
    no class that is known.
    """
    has_same_class = config.get("architectures") == base.config.get("architectures")
    if has_same_class and not added and config.get(TIED) == base.config.get(TIED):
        return {}
    rules = rules_of(config) if config.get("architectures") else None
    if rules is None:
        return {}
    loaded = LoadedNames(rules, names)
    found = (_unread(rules, loaded, names, added), _without_weights(base, rules, loaded), _untied(base, rules, loaded))
    return dict(itertools.chain(*found))


def _unread(
    rules: ArchitectureRules, loaded: LoadedNames, names: Collection[str], added: Collection[str]
) -> Iterator[tuple[str, str]]:
    classes = read_table().modules.get(str(rules.config["model_type"]), {})
    # A class without modules of its own is loaded as any class of its type.
    known = classes.get(rules.architecture) or [module for each in classes.values() for module in each]
    ties = read_table().ties.get(rules.architecture, {})
    of_base = {_first_part(tensor) for name, tensor in _single(loaded).items() if name not in added}

    def is_read(name: str) -> bool:
        return any(_is_same(_module(name), module) for module in known)

    for name in added:
        (found, *_) = LoadedNames(rules, [name])
        if name not in loaded.by_stored:
            others = [other for other in names if other != name and found in LoadedNames(rules, [other])]
            yield name, f"{', '.join(others)} has the same name in {rules.architecture}"
        elif (
            known and _first_part(found) not in of_base and found not in {*ties, *ties.values()} and not is_read(found)
        ):
            yield name, f"{rules.architecture} has no weight of this name, and ignores it"


def _without_weights(base: Checkpoint, rules: ArchitectureRules, loaded: LoadedNames) -> Iterator[tuple[str, str]]:
    """The modules of another class than the base's for which there is no tensor."""
    before, table = base.rules, read_table()
    if before is None or before.architecture == rules.architecture:
        return
    tied = {} if rules.config.get(TIED) is False else table.ties.get(rules.architecture, {})
    stored = {_module(name) for name in (*loaded, *tied)}
    for module in table.modules.get(str(rules.config["model_type"]), {}).get(rules.architecture, ()):
        if not any(_is_same(each, module) for each in stored):
            yield module, f"{rules.architecture} has it, and neither the base nor the adapters have its weights"


def _untied(base: Checkpoint, rules: ArchitectureRules, loaded: LoadedNames) -> Iterator[tuple[str, str]]:
    """The tied tensors of a base that are untied in the output, and have no tensor there."""
    if base.config.get(TIED) is False or rules.config.get(TIED) is not False:
        return
    tied = read_table().ties.get(rules.architecture, {})
    for source in dict.fromkeys(tied.values()):
        group = [source, *(name for name, other in tied.items() if other == source)]
        stored = [name for name in group if name in loaded]
        for name in group if stored else ():
            if name not in loaded:
                yield name, f"it is tied to {stored[0]} in the base, and is neither tied nor stored in the output"


def _single(loaded: LoadedNames) -> dict[str, str]:
    """The stored tensors that become one tensor of the loaded model, with its name."""
    return {tensor.stored: name for name, tensor in loaded.items() if tensor.stored}


def _first_part(name: str) -> str:
    return name.partition(".")[0]


def _module(name: str) -> str:
    """The module of a tensor without its numbers; a parameter of the model itself is its own."""
    return NUMBERED_PART.sub("#", name.rpartition(".")[0] or name)


def _is_same(one: str, other: str) -> bool:
    """Whether two names of modules are the same, except that one may lack the prefix of an inner model."""
    return f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}")
