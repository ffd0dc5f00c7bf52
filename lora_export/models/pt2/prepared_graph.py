"""A program's graph prepared to run: each node with its operator, of a closed list, or the layer called in its place.

The list (`models/programs.json`) is closed since the file is not trusted. PyTorch's operators are looked up by these
names alone. All others are refused by name: operators that open files (`aten::from_file`), that place a tensor on
another's memory (`set_`, `resize_`), that draw random numbers, or that do not check the sizes they are given; every
other namespace; all functions of Python. Some operators that exported programs contain do not check their arguments. In
their place, the public function that does is run.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor

from lora_export.errors import InputRefused, count
from lora_export.layers.torch_internals import schema_of
from lora_export.models.pt2.graph_json import PROGRAMS, Graph, Node
from lora_export.models.pt2.recover_layers import argument_of, operator_of, readable, values_in

Function = Callable[..., Any]

LARGEST_SIZE = 1 << 62  # beyond this, Python would compute on with integers that torch cannot hold
ATEN_NAME = re.compile(r"torch\.ops\.aten\.(\w+)\.(\w+)")
HIGHER_ORDER = "torch.ops.higher_order."

# Reads a tensor's bytes as another type, which has another meaning once the tensor is in fp64.
REFUSED_OPERATORS = {"view.dtype"}


def _assert(self: Any, assert_msg: str = "") -> None:
    if not bool(self):
        raise RuntimeError(assert_msg or "an assertion of the program fails")


def _checked_range(size: Any, min: Any = None, max: Any = None) -> None:
    if (min is not None and size < min) or (max is not None and size > max):
        raise RuntimeError(f"a size is {size}; it must be between {min} and {max}")


def _attention(query: Tensor, key: Tensor, value: Tensor, **more: Any) -> tuple[Tensor, None]:
    named = {name: more[name] for name in ("attn_mask", "dropout_p", "is_causal", "scale") if name in more}
    return F.scaled_dot_product_attention(query, key, value, **named), None


def _group_norm(input: Tensor, weight: Any, bias: Any, *, group: int, eps: float, **_: int) -> tuple[Any, ...]:
    return F.group_norm(input, group, weight, bias, eps), None, None


def _batch_norm(
    input: Tensor, weight: Any, bias: Any, running_mean: Tensor, running_var: Tensor, eps: float, **_: float
) -> tuple[Any, ...]:
    return F.batch_norm(input, running_mean, running_var, weight, bias, training=False, eps=eps), None, None


def _zeros(size: Any, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    return torch.zeros(size, dtype=dtype, device=device)


# Functions that replace operators which do not check their arguments, or which return uninitialised memory. A None in
# their results is a by-product for gradients; a program that reads it fails.
REPLACEMENTS: dict[str, Function] = {
    "_assert_scalar.default": _assert,
    "_assert_async.default": _assert,
    "_assert_async.msg": _assert,
    "_assert_tensor_metadata.default": lambda **_: None,  # asserts dtypes, which differ in a reference in fp64
    "sym_constrain_range.default": _checked_range,
    "sym_constrain_range_for_size.default": _checked_range,
    "_scaled_dot_product_flash_attention_for_cpu.default": _attention,
    "native_group_norm.default": _group_norm,
    "_native_batch_norm_legit_no_training.default": _batch_norm,
    "_is_all_true.default": lambda self: self.all(),
    "_weight_norm.default": lambda v, g, dim=0: v * (g / torch.norm_except_dim(v, 2, dim)),
    "_unsafe_view.default": lambda self, size: self.reshape(size),
    "empty.memory_format": _zeros,
    "empty_like.default": lambda self, dtype=None, **_: torch.zeros_like(self, dtype=dtype),
    "new_empty.default": lambda self, size, dtype=None, **_: self.new_zeros(size, dtype=dtype),
    "empty_permuted.default": _zeros,
}
# What runs the operators -> their names: programs, and what TorchScript has beside these
OPERATOR_NAMES: Mapping[str, frozenset[str]] = {use: frozenset(names) for use, names in PROGRAMS["operators"].items()}
OPERATORS = OPERATOR_NAMES["programs"]


def _bounded(function: Function) -> Function:
    def computed(*numbers: Any) -> Any:
        result = function(*numbers)
        if not -LARGEST_SIZE <= result <= LARGEST_SIZE:
            raise ValueError(f"a size computed from {numbers} is too large")
        return result

    return computed


def _power(base: Any, exponent: Any) -> Any:
    if not -64 <= exponent <= 64:
        raise ValueError(f"a size to the power of {exponent} is too large")
    return base**exponent


BOUNDED = ("add", "sub", "mul", "floordiv", "mod", "truediv", "neg", "pos")
# The functions that compute sizes; a program names Python's own.
SIZE_FUNCTIONS: dict[str, Function] = {
    **{f"_operator.{name}": getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{f"_operator.{name}": _bounded(getattr(operator, name)) for name in BOUNDED},
    "_operator.and_": operator.and_,
    "_operator.or_": operator.or_,
    "_operator.pow": _bounded(_power),
    "math.trunc": math.trunc,
    "torch.sym_not": operator.not_,
    "torch.sym_int": int,
    "torch.sym_float": float,
    "torch.sym_max": max,
    "torch.sym_min": min,
    "torch.sym_sum": _bounded(sum),
    "torch.sym_ite": lambda condition, yes, no: yes if condition else no,
    "torch.sym_sqrt": math.sqrt,
    "torch._sym_sqrt": math.sqrt,
}


class Operator(NamedTuple):
    """A function that a node runs."""

    run: Function
    names: Collection[str] | None  # of its arguments; None where they are positional
    writes: bool  # into one of its arguments


def resolve(target: str, where: str) -> Operator:
    """The operator of this name. Raises InputRefused, with the location `where`, for all but those of the lists."""
    if target in SIZE_FUNCTIONS:
        return Operator(SIZE_FUNCTIONS[target], None, writes=False)
    refused = InputRefused(f"{where}: {target[:80]!r} is not among the operators that lora-export runs from a file")
    match = ATEN_NAME.fullmatch(target)
    name, overload = match.groups() if match else ("", "")
    spelled = f"{name}.{overload}"
    known = name in OPERATORS or (name.endswith("_") and not name.endswith("__") and name[:-1] in OPERATORS)
    if not match or spelled in REFUSED_OPERATORS or not (known or spelled in REPLACEMENTS):
        raise refused
    packet = getattr(torch.ops.aten, name, None)
    if packet is None or overload not in packet.overloads():
        raise InputRefused(f"{where}: this PyTorch ({torch.__version__}) has no operator {target[:80]!r}")
    found = getattr(packet, overload)
    schema = schema_of(found)
    arguments = schema.arguments
    # TorchScript's operators on strings and lists have the same names, and can make a list of any length.
    on_tensors = any("Tensor" in str(value.type) for value in (*arguments, *schema.returns))
    if any(argument.is_out for argument in arguments) or not (on_tensors or spelled in REPLACEMENTS):
        raise refused
    writes = any(argument.alias_info is not None and argument.alias_info.is_write for argument in arguments)
    return Operator(REPLACEMENTS.get(spelled, found), [argument.name for argument in arguments], writes)


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
    operator: Operator | None  # None: the inner graph runs in its place
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
    nodes, problems, unread = [], [], _unread_initial_values(graph)
    for number, node in enumerate(graph.nodes):
        layer = layers.get(node.number, "")
        if layer is None or number in unread:
            continue
        try:
            nodes.append(_prepared(node, layer, locations.keys() | inputs, path, tuple(last.get(number, ()))))
        except InputRefused as error:
            problems.append(str(error))
    if problems:
        more = f" (and {count(len(problems) - 1, 'more node')} like it)" if len(problems) > 1 else ""
        raise InputRefused(f"{problems[0]}{more}")
    return PreparedGraph(graph, tuple(nodes))


def all_nodes(prepared: PreparedGraph) -> Iterator[PreparedNode]:
    """Every node, those of inner graphs included."""
    for node in prepared.nodes:
        yield node
        if node.inner is not None:
            yield from all_nodes(node.inner)


# What draws the values of a new tensor, which may be random
INITIAL_VALUES = re.compile(r"torch\.ops\.aten\.(empty|detach|uniform_|normal_|zero_|fill_)\.\w+")


def _unread_initial_values(graph: Graph) -> set[int]:
    """The places of nodes that draw values of new tensors which nothing reads.

    A forward pass that makes a layer and gives it the weights of another one leaves them: BigBird's does so.
    """
    made_by: dict[str, int] = {}  # value -> the node that made its memory
    nodes: dict[int, set[int]] = {}  # that node -> those that only draw its values, itself among them
    read: set[int | None] = set()
    for number, node in enumerate(graph.nodes):
        makers = {made_by.get(value) for _, argument in node.inputs for value in values_in(argument)}
        match = INITIAL_VALUES.fullmatch(node.target)
        is_new = match is not None and match[1] == "empty"
        maker = number if is_new else next(iter(makers), None)
        if match is None or maker is None or len(makers) > 1:
            read |= makers
            continue
        nodes.setdefault(maker, set()).add(number)
        made_by |= {name: maker for name in node.outputs if isinstance(name, str)}
    read |= {made_by.get(value) for value in values_in(list(graph.outputs))}
    return {number for maker, own in nodes.items() if maker not in read for number in own}


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
    if node.target.startswith(HIGHER_ORDER):
        raise InputRefused(f"{where}: {readable(node.target)} runs graphs in a way that is not supported")
    found = resolve(node.target, where)
    if any(isinstance(argument, Graph) for _, argument in node.inputs):
        raise InputRefused(f"{where}: {readable(node.target)} takes no graph as an argument")
    if unknown := [name for name, _ in node.inputs if found.names is not None and name not in found.names]:
        raise InputRefused(f"{where}: {readable(node.target)} has no argument {', '.join(unknown)[:80]}")
    if _drops_numbers(node):
        raise InputRefused(
            f"{where}: {readable(node.target)} leaves out numbers at random: the program was exported in training "
            "mode. Export it again after module.eval()"
        )
    target = next(iter(node.inputs), None)
    if found.writes and target is not None and (written := set(values_in(target[1])) & fixed):
        raise InputRefused(
            f"{where}: {readable(node.target)} changes {', '.join(sorted(written))}, an input or a tensor of the "
            "program: programs that keep state from run to run are not supported"
        )
    layer_input = argument_of(node, LAYER_INPUTS.get(operator_of(node), "input"), None) if layer else None
    # Pinning is for copies to a GPU.
    arguments = tuple((name, value) for name, value in node.inputs if name != "pin_memory")
    return PreparedNode(node, found, arguments, layer, layer_input, None, last_reads)


def _drops_numbers(node: Node) -> bool:
    is_dropout = "dropout" in operator_of(node) and argument_of(node, "train", None) is not False
    return bool(argument_of(node, "p", 0) if is_dropout else argument_of(node, "dropout_p", 0))


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
