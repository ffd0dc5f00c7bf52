"""The tensors of a checkpoint that its model ties, under the names that they have or would have in its files.

transformers' `tie_word_embeddings` ties the output embeddings of most language models to the input embeddings. The file
has one tensor then, and no name for the other. Which ones they are is in the frozen table of `names`. Other
files may name them in their headers, as safetensors' `save_model` does.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lora_export.errors import InputRefused
from lora_export.names.architecture import ArchitectureRules
from lora_export.names.loaded_names import LoadedNames
from lora_export.names.table import is_embedding, read_table
from lora_export.options.spelling import named
from lora_export.plan import TensorSpec, Tied, Ties
from lora_export.storage.safetensors_file import Entry
from lora_export.weights.checkpoint import Checkpoint, tensor_aliases

TIED = "tie_word_embeddings"
TABLE_BYTES_AT_ONCE = 4 << 20  # of each of two tables that are compared


def ties_of(base: Checkpoint, handling: Tied | str) -> Ties:
    """The ties of a base, to be handled so, and what it stores of them. None where its model has none.

    Reads headers only; `Ties.classified` reads the tables that the base stores twice, where an adapter changes them.
    Where the class of the model ties none by default, and its config states nothing, these are tensors without a name
    of their own in the files.

    Unless they are errors, raises InputRefused for a class whose ties are not known, and for one that its config cannot
    untie.
    """
    return replace(_ties_of(base, Tied(handling)), takes_more=base.takes_more)


def _ties_of(base: Checkpoint, handling: Tied) -> Ties:
    tied_by_model = is_tied(base)
    if tied_by_model is False and TIED in base.config:
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
    if not can_untie(rules):
        bound = (
            f"{rules.architecture} without {TIED} is another model in transformers {table.version}, which does not "
            "scale its outputs, or stays tied"
        )
    is_bound = handling is Tied.UNTIE and bool(bound)
    if is_bound and base.config.get(TIED) is not False:
        raise InputRefused(f"{named('tied', 'untie')}: {bound}. Use {named('tied', 'both')}, or leave it out")
    ties = _by_config(base, handling, rules, tied, bound)
    if is_bound or tied_by_model is False:
        # A config that states false stays as it is: tensors with a name of their own are apart, others stay tied.
        stored = {spec.name for spec in base.specs}
        kept = {name: of for name, of in ties.tensors.items() if (name in stored) is is_bound}
        ties = replace(ties, tensors=kept)
    return _with_stored(ties, base) if tied_by_model else ties


def _with_stored(ties: Ties, base: Checkpoint) -> Ties:
    """The ties with the tied tensors that a base stores, and the comparison of these with their sources."""
    entries = {name: (file.path, entry) for file in base.shards.values() for name, entry in file.entries.items()}
    stored = {name: source for name, source in ties.tensors.items() if name in entries and source in entries}

    @functools.cache
    def has_other_values(name: str) -> bool:
        return not _have_equal_bytes(entries[name], entries[stored[name]])

    return replace(ties, stored=frozenset(stored), has_other_values=has_other_values)


def is_tied(base: Checkpoint) -> bool | None:
    """Whether the model of a base ties its tensors, by its config and its class. None where neither decides it."""
    text, stated = base.config.get("text_config"), base.config.get(TIED)
    if base.rules is None:
        return None if stated is None else bool(stated)
    table, name = read_table(), base.rules.architecture
    by_text = name in table.tied_by_text and isinstance(text, Mapping) and bool(text.get(TIED))
    if by_text or name in table.tied_always:
        return True
    if stated is not None:
        return bool(stated)
    return None if name not in table.ties or name in table.tied_by_part else name in table.tied_by_default


def _have_equal_bytes(one: tuple[Path, Entry], other: tuple[Path, Entry]) -> bool:
    from lora_export.storage.file_pieces import read_piece  # few merges compare tables

    (file, first), (other_file, second) = one, other
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    for done in range(0, first.nbytes, TABLE_BYTES_AT_ONCE):
        pieces = np.empty((2, min(TABLE_BYTES_AT_ONCE, first.nbytes - done)), np.uint8)
        read_piece(file, pieces[0], first.start + done)
        read_piece(other_file, pieces[1], second.start + done)
        if not np.array_equal(pieces[0], pieces[1]):
            return False
    return True


def can_untie(rules: ArchitectureRules | None) -> bool:
    """Whether a config of this class can untie its tensors; true of classes that transformers does not have."""
    return rules is None or rules.architecture not in read_table().cannot_untie


def word_tables(base: Checkpoint, specs: Iterable[TensorSpec]) -> list[str]:
    """The tensors among these that are tables of words: input embeddings, and what may be tied to them.

    Of a class of transformers that ties tensors, they are these tensors. Of another one, they are matrices with a row
    for each word whose modules have a name that a class of transformers ties.
    """
    specs, rules = list(specs), base.rules
    tied = {} if rules is None else read_table().ties.get(rules.architecture, {})
    if rules is not None and tied:
        names = {*tied, *tied.values()}
        matrices = _outside_of_layers(spec.name for spec in specs if len(spec.shape) == 2)
        loaded = LoadedNames(rules, matrices)
        return [name for name in matrices if names.intersection(_loaded(name, loaded))]
    tables = [spec.name for spec in specs if len(spec.shape) == 2 and spec.shape[0] == base.word_count]
    found = [name for name in tables if _last_part(name) in read_table().tied_modules]
    return found if any(map(is_embedding, map(_last_part, found))) else []  # a head alone is tied to nothing


def _outside_of_layers(names: Iterable[str]) -> list[str]:
    """The names without a number. Those that a config ties have none, and the others are thousands."""
    return [name for name in names if not any(part.isdecimal() for part in name.split("."))]


def _loaded(name: str, loaded: LoadedNames) -> list[str]:
    return [tensor.name for tensor in loaded.by_stored.get(name, ())] or [name]


def _last_part(tensor: str) -> str:
    return tensor.removesuffix(".weight").rpartition(".")[2]


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
            own_names |= {**spelled, stored[first]: first}
    by_config = not (bound and base.config.get(TIED) is False)  # else the class ties them
    return Ties(handling, tensors, by_config=by_config, loaded=own_names, bound=bound)


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
