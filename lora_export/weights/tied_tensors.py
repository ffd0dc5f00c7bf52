"""The tensors of a checkpoint that its model ties, under the names that they have or would have in its files.

transformers' `tie_word_embeddings` ties the output embeddings of most language models to the input embeddings. The file
has one tensor then, and no name for the other. Which ones they are is in the frozen table of `names`. Other
files may name them in their headers, as safetensors' `save_model` does.

transformers ignores a stored tensor that its class has no name for, and draws a weight that no file has at random. What
is known of a class is in the same table: the tensors that it ties, and the modules that not all classes of its model
type have.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from lora_export.errors import InputRefused, MatchError, Misfit
from lora_export.names.architecture import ArchitectureRules, rules_of
from lora_export.names.loaded_names import LoadedNames
from lora_export.names.table import is_embedding, read_table
from lora_export.options.spelling import named
from lora_export.plan import TensorSpec, Tied, Ties
from lora_export.weights.checkpoint import Checkpoint, tensor_aliases

TIED = "tie_word_embeddings"


def ties_of(base: Checkpoint, handling: Tied | str) -> Ties:
    """The ties of a base, to be handled so. None where its config has none.

    Unless they are errors, raises InputRefused for a class whose ties are not known, and for one that its config cannot
    untie.
    """
    handling = Tied(handling)
    if base.config.get(TIED) is False:
        return Ties(handling)
    rules = base.rules
    if rules is None:
        return Ties(handling, {} if handling is Tied.ERROR else tensor_aliases(base.shards.values()))
    table = read_table()
    tied = table.ties.get(rules.architecture)
    if tied is None:
        if handling is Tied.ERROR:
            return Ties(handling)
        raise InputRefused(
            f"{named('tied', handling)}: which tensors {rules.architecture} ties is not known (of transformers "
            f"{table.version}). Leave {named('tied')} out, or store each of them as a tensor of its own first"
        )
    bound = ""
    if rules.architecture in table.cannot_untie:
        bound = (
            f"{rules.architecture} without {TIED} is another model in transformers {table.version}, which does not "
            "scale its outputs, or stays tied"
        )
    if handling is Tied.UNTIE and bound:
        raise InputRefused(f"{named('tied', 'untie')}: {bound}. Use {named('tied', 'both')}")
    return _by_config(base, handling, rules, tied, bound)


def word_tables(base: Checkpoint, specs: Iterable[TensorSpec]) -> list[str]:
    """The tensors among these that are tables of words: input embeddings, and what may be tied to them.

    Of a class of transformers that ties tensors, they are these tensors. Of another one, they are matrices with a row
    for each word whose modules have a name that a class of transformers ties.
    """
    specs, table, rules = list(specs), read_table(), base.rules
    tied = {} if rules is None else table.ties.get(rules.architecture, {})
    if rules is not None and tied:
        names = {*tied, *tied.values()}
        matrices = _outside_of_layers(spec.name for spec in specs if len(spec.shape) == 2)
        loaded = LoadedNames(rules, matrices)
        return [
            name
            for name in matrices
            if names.intersection([tensor.name for tensor in loaded.by_stored.get(name, ())] or [name])
        ]
    parts = {name.split(".")[-2] for each in table.ties.values() for name in (*each, *each.values()) if "." in name}
    found = [
        spec.name
        for spec in specs
        if len(spec.shape) == 2 and spec.shape[0] == base.word_count and _last_part(spec.name) in parts
    ]
    return found if any(map(is_embedding, map(_last_part, found))) else []  # a head alone is tied to nothing


def _outside_of_layers(names: Iterable[str]) -> list[str]:
    """The names without a number. Those that a config ties have none, and the others are thousands."""
    return [name for name in names if not any(part.isdecimal() for part in name.split("."))]


def _last_part(tensor: str) -> str:
    return tensor.removesuffix(".weight").rpartition(".")[2]


@contextlib.contextmanager
def tied_as_remedy(base: Checkpoint, handling: Tied | str) -> Iterator[None]:
    """Add to a MatchError about tied tensors that an option handles them."""
    try:
        yield
    except MatchError as error:
        if Tied(handling) is not Tied.ERROR or error.remedy:
            raise
        rules = base.rules
        names = read_table().ties.get(rules.architecture, {}) if rules is not None else {}
        names = {**names, **tensor_aliases(base.shards.values())}
        found = next((name for name in names if any(_is_about(misfit, name) for misfit in error.misfits)), None)
        if found is None:
            raise
        raise error.with_remedy(
            f"{found} is tied to {names[found]}. {named('tied', 'untie')} gives it a tensor of its own, as the adapter "
            f"was trained; {named('tied', 'both')} changes both"
        ) from None


def _is_about(misfit: Misfit, tensor: str) -> bool:
    module = tensor.removesuffix(".weight")
    return module in misfit.key or misfit.problem.startswith(module)


def tied_head(architecture: str) -> str:
    """The module whose weight a class of transformers ties to its input embeddings; empty unless it is just one."""
    names = [name for name in read_table().ties.get(architecture, ()) if name.endswith(".weight")]
    return names[0].removesuffix(".weight") if len(names) == 1 else ""


def untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the same model with a tensor for each name. Its parts have the value too, where they had it."""
    untied = {
        key: untied_config(value) if isinstance(value, Mapping) and value.get(TIED) else value
        for key, value in config.items()
    }
    return {**untied, TIED: False}


def _by_config(base: Checkpoint, handling: Tied, rules: ArchitectureRules, tied: Mapping[str, str], bound: str) -> Ties:
    loaded = LoadedNames(rules, _outside_of_layers(spec.name for spec in base.specs))
    stored = {name: found.stored for name, found in loaded.items() if found.conversion is None}
    if handling is not Tied.ERROR:
        _refuse_missing_prefix(stored, tied, handling)
    tensors: dict[str, str] = {}
    own_names: dict[str, str] = {}
    for source in dict.fromkeys(tied.values()):
        group = [source, *(name for name, other in tied.items() if other == source)]
        first = next((name for name in group if name in stored), None)
        if first is not None:
            others = [name for name in group if name != first]
            spelled = {stored.get(name) or _as_spelled(name, first, stored[first], rules): name for name in others}
            tensors |= dict.fromkeys(spelled, stored[first])
            own_names |= spelled
    return Ties(handling, tensors, by_config=True, loaded=own_names, bound=bound)


def _refuse_missing_prefix(stored: Mapping[str, str], tied: Mapping[str, str], handling: Tied) -> None:
    """Raise InputRefused for names without the prefix of the inner model: a head beside them would not be found."""
    for name in tied.values():
        for position, letter in enumerate(name):
            if letter == "." and name[position + 1 :] in stored and name not in stored:
                raise InputRefused(
                    f"{named('tied', handling)}: the base's names lack the prefix `{name[: position + 1]}` of its "
                    "model, which tied tensors need. Load it and save it again (save_pretrained) first"
                )


def _as_spelled(name: str, first: str, stored: str, rules: ArchitectureRules) -> str:
    """The name that a tensor of the loaded model has in files of the same generation of names as this base."""
    if first == stored:
        return name
    dots = [position for position, letter in enumerate(stored) if letter == "."]
    candidates = [stored[: dot + 1] + name for dot in reversed(dots)]
    return next((each for each in candidates if name in LoadedNames(rules, [each])), name)


# --- Names of an output that its class in transformers does not read, and weights of the class that it lacks ---


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
    of_base = {_first_part(one.stored) for name, one in loaded.items() if one.stored and name not in added}

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


def _first_part(name: str) -> str:
    return name.partition(".")[0]


def _module(name: str) -> str:
    """The module of a tensor without its numbers; a parameter of the model itself is its own."""
    return NUMBERED_PART.sub("#", name.rpartition(".")[0] or name)


def _is_same(one: str, other: str) -> bool:
    """Whether two names of modules are the same, except that one may lack the prefix of an inner model."""
    return f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}")
