"""The frozen facts of transformers: `transformers.json` and `modules.json`, which `make names` writes.

A merge does not import transformers. The first holds the rules of its conversion mapping as data, the classes that each
architecture is made of, and the tensors that it ties. The second holds the names of its model types, and what only the
class of a model tells of its modules. `tests/names` compares both with the installed transformers.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

PATH = Path(__file__).with_name("transformers.json")
MODULES = Path(__file__).with_name("modules.json")
LEGACY = "legacy"  # the key of the rules that apply to every model


class ModelPart(NamedTuple):
    """A module of an architecture that is a model of its own."""

    path: str  # of the module; empty for the whole model
    architecture: str
    model_type: str
    config: str  # the keys of its config in that of the whole, joined by dots; empty where it has none of its own


@dataclass(frozen=True)
class ConversionTable:
    """The rules, and what each architecture is made of."""

    version: str  # of transformers
    rules: Mapping[str, list[Mapping[str, Any]]]  # class name or model type -> its rules, in order
    parts: Mapping[str, tuple[ModelPart, ...]]  # architecture -> its parts, the whole model first
    prefixes: Mapping[str, str]  # architecture -> the name of its inner model (`base_model_prefix`)
    auto: Mapping[str, Mapping[str, str]]  # head -> model type -> the class that a part of this type is built as
    ties: Mapping[str, Mapping[str, str]]  # architecture -> tied tensor -> the tensor whose values it has, loaded names
    tied_by_default: frozenset[str]  # architectures that tie them where their config has no `tie_word_embeddings`
    tied_always: frozenset[str]  # those that tie them even where it is false
    tied_by_text: frozenset[str]  # those that tie them where only the config's part `text_config` states it
    tied_by_part: frozenset[str]  # those whose parts tie them, by the configs of these parts
    cannot_untie: frozenset[str]  # architectures that are other models without `tie_word_embeddings`
    unbuilt: frozenset[str]  # architectures whose parts are unknown
    # Model type -> class -> modules that not all classes of the type have, such as heads and poolers. `#` is a number.
    modules: Mapping[str, Mapping[str, list[str]]]

    @functools.cached_property
    def tied_modules(self) -> frozenset[str]:
        """The names of modules, without those around them, of which a class ties a tensor."""
        names = {name for tied in self.ties.values() for name in (*tied, *tied.values())}
        return frozenset(name.split(".")[-2] for name in names if "." in name)


@functools.cache
def read_table() -> ConversionTable:
    """The table of this version of the package, parsed once."""
    raw = json.loads(PATH.read_text(encoding="utf-8"))
    lists = {key: value for key, value in raw["rules"].items() if isinstance(value, list)}
    rules = {key: lists[value] if isinstance(value, str) else value for key, value in raw["rules"].items()}
    return ConversionTable(
        version=raw["transformers"],
        # In the file, a plain rename is a pair.
        rules={
            key: [{"from": rule[:1], "to": rule[1:]} if isinstance(rule, list) else rule for rule in value]
            for key, value in rules.items()
        },
        parts={name: tuple(ModelPart(*part) for part in value[1:]) for name, value in raw["classes"].items()},
        prefixes={name: value[0] for name, value in raw["classes"].items()},
        auto=raw["auto"],
        ties={name: tied for tied, names in raw["ties"] for name in names},
        tied_by_default=frozenset(raw["tied_by_default"]),
        tied_always=frozenset(raw["tied_always"]),
        tied_by_text=frozenset(raw["tied_by_text"]),
        tied_by_part=frozenset(raw["tied_by_part"]),
        cannot_untie=frozenset(raw["cannot_untie"]),
        unbuilt=frozenset(raw["unbuilt"]),
        modules=raw["modules"],
    )


# --- Modules ---

_TABLE = json.loads(MODULES.read_text(encoding="utf-8"))

KNOWN_MODEL_TYPES = frozenset(_TABLE["model_types"])
# Model type -> the last parts of the names of its modules that are `Conv1D`, whose weights are stored (in, out). All
# other linear layers of these types are `nn.Linear`, (out, in).
CONV1D_MODULES = {name: frozenset(modules) for name, modules in _TABLE["conv1d"].items()}
# Model type -> modules of the same names that are nn.Linear
LINEAR_MODULES = {name: frozenset(modules) for name, modules in _TABLE["linear_of_these_names"].items()}
OF_CONV1D = "Conv1D"  # the kind of their names
CONV1D_NAMES = frozenset().union(*CONV1D_MODULES.values())  # in GPT-2 and its relatives
# The last parts of the names of modules that are an nn.Linear in several models of transformers, and a Conv1D in none.
LINEAR_NAMES = frozenset(_TABLE["linear"])
# The last parts of the names of tables of embeddings. A file tells nn.Embedding from nn.Linear in no other way.
EMBEDDING_MODULES = frozenset(_TABLE["embeddings"])
# A model type as which transformers converts experts -> the others that it converts so. PEFT renames targets by it.
TAKEN_FOR_EXPERTS = {name: frozenset(types) for name, types in _TABLE["taken_for_experts"].items()}


def is_embedding(module: str) -> bool:
    """Whether a module of this name is a table of embeddings in transformers."""
    return module.rpartition(".")[2] in EMBEDDING_MODULES


def module_kind(module: str) -> str:
    """What the modules of one class share in their names: the last part, or all but the numbers before a number.

    The names of a Conv1D are one kind: a model has it in all these places, or an nn.Linear.
    """
    outer, _, last = module.rpartition(".")
    if last in CONV1D_NAMES:
        return OF_CONV1D
    return f"{re.sub(r'[0-9]+', '#', outer)}.{last}" if last.isdecimal() else last
