"""What a program of torch.export consists of, as its file describes it. Nothing here imports PyTorch."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lora_export.artifacts import archive

# torch's own numbers for dtypes (torch/_export/serde/schema.py), and the names in NumPy and ml_dtypes.
DTYPES_BY_NUMBER = {
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
ITEM_BYTES = {name: 1 if name == "bool" else int(re.sub(r"\D", "", name)) // 8 for name in DTYPES_BY_NUMBER.values()}


class Symbol(NamedTuple):
    """A size that may vary."""

    name: str  # equal for equal sizes; empty where the size is an expression of others
    hint: int | None  # the size when the program was exported


class Value(NamedTuple):
    """A reference to an input of the graph or to an output of an earlier node."""

    name: str


class TorchName(NamedTuple):
    """A constant of torch: a `dtype`, a `memory_format`, a `layout` or a `device`."""

    kind: str
    name: str


class Argument(NamedTuple):
    """One argument of a node, by the operator's name for it. Higher-order operators have no names."""

    name: str
    value: Any  # Value, TorchName, Graph, a number, a string, None, or a list of these


@dataclass(frozen=True)
class Node:
    target: str  # the operator, as the file spells it
    number: int  # position in the graph
    name: str  # for messages: two nodes may have the same
    inputs: tuple[Argument, ...]
    outputs: tuple[Any, ...]  # for each result a name, a list of names, or None where it has no name


@dataclass(frozen=True)
class Graph:
    """Nodes in the order in which they run. Each reads only graph inputs and outputs of nodes before it."""

    inputs: tuple[str | None, ...]  # None for a constant that no node reads
    nodes: tuple[Node, ...]
    outputs: tuple[Any, ...]  # like the values of arguments
    is_single: bool  # its one tensor is returned by itself, not in a list


@dataclass(frozen=True)
class TensorType:
    """The dtype and sizes of a tensor."""

    dtype: str
    sizes: tuple[int | Symbol, ...]


class StoredArray(NamedTuple):
    """The data of a tensor: a view of a member's bytes."""

    member: str
    dtype: str
    sizes: tuple[int, ...]
    strides: tuple[int, ...]  # in elements, not bytes
    offset: int  # in elements


@dataclass(frozen=True)
class ProgramTensor:
    """A parameter, buffer or constant of the program."""

    value: str  # its name in the graph
    name: str  # its name in the module
    kind: str  # `parameter`, `buffer` or `constant`
    data: StoredArray
    persistent: bool = True


@dataclass(frozen=True, eq=False)
class ProgramDescription:
    """A program as its file describes it, checked."""

    path: Path
    graph: Graph
    inputs: Mapping[str, TensorType]  # by the names of forward's parameters, in their order
    input_values: Mapping[str, str]  # the graph's names of the inputs
    tensors: tuple[ProgramTensor, ...]
    outputs: Any  # the returned structure: a tuple, list or dict of positions in graph.outputs, or one position
    ranges: Mapping[str, tuple[int, int | None]]  # symbol -> least and greatest size
    graph_sha256: str  # of the graph's JSON
    members: Mapping[str, zipfile.ZipInfo] = field(repr=False)

    def read_members(self) -> dict[str, bytearray]:
        """The bytes of each member that holds a tensor, their checksums verified."""
        names = dict.fromkeys(tensor.data.member for tensor in self.tensors)
        with archive.opened(self.path) as file:
            return {name: archive.content(file, self.members[name], self.path) for name in names}
