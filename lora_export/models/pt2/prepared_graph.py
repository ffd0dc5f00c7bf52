"""A program's graph prepared to run: each node with its operator or layer, and the values that it reads last."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lora_export.errors import InputRefused
from lora_export.models.pt2 import allowed_operators
from lora_export.models.pt2.program_types import Graph, Node
from lora_export.models.pt2.recover_layers import argument_of, operator_of, readable, values_in

# The argument of each operator that is the input of a layer called in its place. For other operators it is "input".
LAYER_INPUTS = {"embedding.default": "indices", "mm.default": "self", "addmm.default": "mat1"}
# Blocks under a switch of torch, which are run as plain graphs. Switched off, they compute the same; gradients differ.
INLINED = {
    "torch.ops.higher_order.wrap_with_set_grad_enabled": 1,  # the number of arguments before the graph
    "torch.ops.higher_order.wrap_with_autocast": 4,
}


class TensorLocation(NamedTuple):
    """The module and the attribute that hold a value of the graph."""

    owner: str
    attribute: str


@dataclass(frozen=True, eq=False)
class PreparedNode:
    """One node, ready to run."""

    node: Node
    operator: allowed_operators.Operator | None  # None: the inner graph runs in its place
    arguments: tuple[tuple[str, Any], ...]
    layer: str  # the module that is called in the operator's place; empty where the operator runs
    layer_input: Any  # the argument that this module gets
    inner: PreparedGraph | None
    last_reads: tuple[str, ...]  # the values that no later node reads


@dataclass(frozen=True, eq=False)
class PreparedGraph:
    """A graph, ready to run."""

    graph: Graph
    nodes: tuple[PreparedNode, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> PreparedGraph:
        return self  # immutable, and a module is copied often


def prepare(
    graph: Graph,
    locations: Mapping[str, TensorLocation],
    inputs: set[str],
    layers: Mapping[int, str | None],
    path: Path,
) -> PreparedGraph:
    """Look up the operators of a graph's nodes.

    `locations` has the program's own tensors, `inputs` the values of its inputs, and `layers` the result of
    `recover_layers`. Raises InputRefused with the first node that is not supported, and how many others are not.
    """
    last = _last_reads(graph)
    nodes, problems = [], []
    for number, node in enumerate(graph.nodes):
        layer = layers.get(node.number, "")
        if layer is None:
            continue
        try:
            nodes.append(_prepared(node, layer, locations.keys() | inputs, path, tuple(last.get(number, ()))))
        except InputRefused as error:
            problems.append(str(error))
    if problems:
        more = f" (and {len(problems) - 1} more nodes like it)" if len(problems) > 1 else ""
        raise InputRefused(f"{problems[0]}{more}")
    return PreparedGraph(graph, tuple(nodes))


def all_nodes(prepared: PreparedGraph) -> Iterator[PreparedNode]:
    """Every node, those of inner graphs included."""
    for node in prepared.nodes:
        yield node
        if node.inner is not None:
            yield from all_nodes(node.inner)


def _last_reads(graph: Graph) -> dict[int, list[str]]:
    """Node -> the values that no later node reads. Values that no node reads are not among them."""
    reads: dict[str, int] = {}
    for number, node in enumerate(graph.nodes):
        for _, argument in node.inputs:
            for value in values_in(argument):
                reads[value] = number
    for value in values_in(list(graph.outputs)):
        reads.pop(value, None)
    last: dict[int, list[str]] = {}
    for value, number in reads.items():
        last.setdefault(number, []).append(value)
    return last


def _prepared(node: Node, layer: str, fixed: set[str], path: Path, last_reads: tuple[str, ...]) -> PreparedNode:
    """Raises InputRefused for operators that are not run, and for those that write into a `fixed` value."""
    where = f"{path}: node {node.name}"
    if node.target in INLINED:
        return _inlined(node, path, last_reads)
    if node.target.startswith(allowed_operators.HIGHER_ORDER):
        raise InputRefused(f"{where}: {readable(node.target)} runs graphs in a way that is not supported")
    operator = allowed_operators.resolve(node.target, where)
    if any(isinstance(argument, Graph) for _, argument in node.inputs):
        raise InputRefused(f"{where}: {readable(node.target)} takes no graph as an argument")
    if unknown := [name for name, _ in node.inputs if operator.names is not None and name not in operator.names]:
        raise InputRefused(f"{where}: {readable(node.target)} has no argument {', '.join(unknown)[:80]}")
    target = next(iter(node.inputs), None)
    if operator.writes and target is not None and (written := set(values_in(target[1])) & fixed):
        raise InputRefused(
            f"{where}: {readable(node.target)} changes {', '.join(sorted(written))}, an input or a tensor of the "
            "program: programs that keep state from run to run are not supported"
        )
    layer_input = argument_of(node, LAYER_INPUTS.get(operator_of(node), "input"), None) if layer else None
    # Pinning is for copies to a GPU.
    arguments = tuple((name, value) for name, value in node.inputs if name != "pin_memory")
    return PreparedNode(node, operator, arguments, layer, layer_input, None, last_reads)


def _inlined(node: Node, path: Path, last_reads: tuple[str, ...]) -> PreparedNode:
    before = INLINED[node.target]
    values = [value for _, value in node.inputs]
    where = f"{path}: node {node.name} ({readable(node.target)})"
    if len(values) <= before or not isinstance(values[before], Graph):
        raise InputRefused(f"{where} has no graph where it should")
    enabled = values[2] if node.target.endswith("autocast") else False
    if enabled is not False:
        raise InputRefused(f"{where}: a block under autocast is not supported")
    graph: Graph = values[before]
    arguments = tuple(("", value) for value in values[before + 1 :])
    if len(arguments) != len(graph.inputs):
        raise InputRefused(f"{where} passes {len(arguments)} values to a graph that takes {len(graph.inputs)}")
    names = {name for name in graph.inputs if name is not None}
    return PreparedNode(node, None, arguments, "", None, prepare(graph, {}, names, {}, path), last_reads)
