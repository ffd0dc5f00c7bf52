"""What a program of torch.export consists of, as it is read from its file."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lora_export.models.pt2 import archive

# torch's own numbers for them (torch/_export/serde/schema.py); NumPy's and ml_dtypes' names.
DTYPES = {
    1: "uint8",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "float16",
    7: "float32",
    8: "float64",
    12: "bool",
    13: "bfloat16",
    28: "uint16",
    34: "uint32",
    35: "uint64",
}
ITEM_BYTES = {name: 1 if name == "bool" else int(re.sub(r"\D", "", name)) // 8 for name in DTYPES.values()}


class Symbol(NamedTuple):
    """A size that may vary."""

    name: str  # the same for sizes that are the same; empty where it is an expression of others
    hint: int | None  # what it was when the program was exported


class Value(NamedTuple):
    """What an input or an earlier node is called."""

    name: str


class Word(NamedTuple):
    """What torch has a name for: a `dtype`, a `memory_format`, a `layout` or a `device`."""

    kind: str
    name: str


class Named(NamedTuple):
    """One argument of a node, under the operator's own name for it; a higher-order one has no names."""

    name: str
    value: Any  # Value, Word, Graph, a number, a string, None, or a list of these


@dataclass(frozen=True)
class Node:
    target: str  # as the file spells it
    number: int  # in its graph
    name: str  # for messages: nothing says that it is the only one's
    inputs: tuple[Named, ...]
    outputs: tuple[Any, ...]  # a name, a list of names, or None for what is not named, of each result


@dataclass(frozen=True)
class Graph:
    """Nodes in the order in which they run; each reads only what is there before it."""

    inputs: tuple[str | None, ...]  # None for a constant that no node reads
    nodes: tuple[Node, ...]
    outputs: tuple[Any, ...]  # as arguments are
    is_single: bool  # one tensor is handed out as itself


@dataclass(frozen=True)
class Tensor:
    """What is said of a tensor."""

    dtype: str
    sizes: tuple[int | Symbol, ...]


class Payload(NamedTuple):
    """A tensor that is stored: a view of a member's bytes."""

    member: str
    dtype: str
    sizes: tuple[int, ...]
    strides: tuple[int, ...]  # in numbers, not bytes
    offset: int


@dataclass(frozen=True)
class Stored:
    """A tensor of the program's own."""

    value: str  # what the graph calls it
    name: str  # what the module calls it
    kind: str  # `parameter`, `buffer` or `constant`
    payload: Payload
    persistent: bool = True


@dataclass(frozen=True, eq=False)
class Exported:
    """A program as its file describes it, checked."""

    path: Path
    graph: Graph
    inputs: Mapping[str, Tensor]  # by the names of forward's parameters, in their order
    input_values: Mapping[str, str]  # what the graph calls them
    stored: tuple[Stored, ...]
    outputs: Any  # the structure that is handed out: a tuple, list or dict of places in graph.outputs, or one
    ranges: Mapping[str, tuple[int, int | None]]  # symbol -> least and greatest size
    digest: str  # of the graph's JSON
    members: Mapping[str, zipfile.ZipInfo] = field(repr=False)

    def contents(self) -> dict[str, bytearray]:
        """The bytes of each member in which a tensor lies, their checksums compared."""
        names = dict.fromkeys(there.payload.member for there in self.stored)
        with archive.opened(self.path) as file:
            return {name: archive.content(file, self.members[name], self.path) for name in names}
