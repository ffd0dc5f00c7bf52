"""Where the weights live in a graph, and what they were called.

Exporters fold, transpose and merge weights, but the names survive in layers. They are asked in this
order, and each site records which one answered: the initializer's own name, the names that it was
folded from, the module that the node was traced in, the node's own name. What stays ambiguous is
listed as unnamed, and is nobody's weight.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.plan import FLOATS, Layout, TensorSpec

FOLDED_FROM = "pkg.onnxscript.optimizer.folded_from"  # on a value; onnxscript's key
NAME_SCOPES = "pkg.torch.onnx.name_scopes"  # on a node; this and the next are PyTorch's keys
KIND = "pkg.torch.export.graph_signature.InputSpec.kind"  # on an initializer
QUANTISED = frozenset({"MatMulNBits", "MatMulInteger", "MatMulIntegerToFloat", "QLinearMatMul", "DequantizeLinear"})


class How(StrEnum):
    """Which layer of names answered."""

    INITIALIZER = "initializer"
    FOLDED_FROM = "folded_from"
    NAME_SCOPE = "name_scope"
    NODE_NAME = "node_name"
    NONE = "none"


@dataclass(frozen=True, eq=False)
class Site:
    """One place where a node reads a float initializer."""

    node: ir.Node  # the reader; where a Transpose stands between, the one behind it
    index: int  # which of its inputs
    value: ir.Value  # the initializer
    layout: Layout  # how the initializer lies for a linear layer; OTHER where the node is none
    turned: bool = False  # whether a Transpose stands between
    name: str = ""  # of the parameter, as the model calls it
    how: How = How.NONE

    @property
    def place(self) -> tuple[ir.Node, int]:
        return self.node, self.index

    @property
    def is_linear(self) -> bool:
        return self.layout is not Layout.OTHER

    @property
    def array(self) -> NDArray[Any]:
        """The initializer as stored. Reads external data."""
        tensor = self.value.const_value
        assert tensor is not None
        return tensor.numpy()

    @property
    def matrix(self) -> NDArray[Any]:
        """The weight in the (out, in) view."""
        return self.array.T if self.layout is Layout.IN_OUT else self.array


@dataclass(frozen=True, eq=False)
class Sites:
    """Every place where a graph uses a weight. Outlived by any change of the graph: find them again then."""

    by_name: Mapping[str, tuple[Site, ...]]  # one parameter may be read in several places
    unnamed: tuple[Site, ...]  # linear layers whose weight nobody could name for certain
    notes: tuple[str, ...]  # what was not looked at

    @property
    def specs(self) -> list[TensorSpec]:
        """One spec a parameter, as the model has it: an exporter's transposition is undone in shape and layout."""
        return [_spec(name, there) for name, there in self.by_name.items()]

    @property
    def linear(self) -> tuple[Site, ...]:
        return tuple(site for there in self.by_name.values() for site in there if site.is_linear)

    def name_of(self, site: Site) -> str:
        """The name of the site at the same place; empty where it has none."""
        return next(
            (name for name, there in self.by_name.items() if site.place in {other.place for other in there}), ""
        )

    def __str__(self) -> str:
        counts = Counter(site.how for site in self.linear)
        found = ", ".join(f"{count} named by {how.replace('_', ' ')}" for how, count in counts.items())
        lines = [f"{len(self.linear) + len(self.unnamed)} linear layers: {found or 'none with a name'}"]
        lines += [f"  {_place(site)}: no certain name (tried {', '.join(_tried(site))})" for site in self.unnamed]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def find(model: ir.Model) -> Sites:
    """Find every float initializer's readers, subgraphs included, and name them.

    Reads tensor data only where two initializers claim one name: they must be equal, or neither has it.
    """
    named: dict[str, list[Site]] = {}
    nameless: list[Site] = []
    initializers = (value for graph in model.graphs() for value in graph.initializers.values() if _is_float(value))
    for parameter, sites in _by_parameter(site for value in initializers for site in readers(value)).items():
        for site in _told_apart(parameter, sites) if parameter else map(_named_by_node, sites):
            if site.name:
                named.setdefault(site.name, []).append(site)
            else:
                nameless.append(site)
    for name in [name for name, sites in named.items() if not _agree(sites)]:
        nameless += [replace(site, name="", how=How.NONE) for site in named.pop(name)]
    return Sites(
        by_name={name: tuple(sites) for name, sites in named.items()},
        unnamed=tuple(site for site in nameless if site.is_linear),
        notes=tuple(_notes(model)),
    )


def readers(value: ir.Value) -> Iterator[Site]:
    """Every node that reads an initializer, itself or through a Transpose; not named yet."""
    for node, index in value.uses():
        if not _is_transpose(node, value):
            yield Site(node, index, value, _layout(node, index, value))
            continue
        for behind, at in node.outputs[0].uses():
            yield Site(behind, at, value, flipped(_layout(behind, at, value)), turned=True)


def value_names(model: ir.Model) -> set[str]:
    """Every name that a value has anywhere in the model's graph and subgraphs."""
    values = [value for graph in model.graphs() for value in (*graph.inputs, *graph.initializers.values())]
    values += [output for node in ir.traversal.RecursiveGraphIterator(model.graph) for output in node.outputs]
    return {value.name for value in values if value.name}


def unused(name: str, taken: set[str]) -> str:
    """The name, numbered where it is taken; it is taken afterwards."""
    number, free = 0, name
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    taken.add(free)
    return free


def _is_float(value: ir.Value) -> bool:
    return value.const_value is not None and _dtype(value) in FLOATS


def _dtype(value: ir.Value) -> str:
    assert value.const_value is not None
    dtype = value.const_value.dtype
    return "string" if dtype.is_string() else str(dtype.numpy())


def _is_onnx(node: ir.Node, *op_types: str) -> bool:
    return node.domain in ("", "ai.onnx") and node.op_type in op_types


def _is_transpose(node: ir.Node, value: ir.Value) -> bool:
    """A Transpose of a matrix: its permutation, left out or not, can only be the turn or the identity."""
    if not _is_onnx(node, "Transpose") or _rank(value) != 2:
        return False
    perm = node.attributes.get("perm")
    return perm is None or list(perm.as_ints()) == [1, 0]


def _rank(value: ir.Value) -> int:
    assert value.const_value is not None
    return len(value.const_value.shape)


def _layout(node: ir.Node, index: int, value: ir.Value) -> Layout:
    """How a matrix lies when this node reads it as its second operand."""
    if index != 1 or _rank(value) != 2 or not _is_onnx(node, "MatMul", "Gemm"):
        return Layout.OTHER
    if node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1:
        return Layout.OUT_IN
    return Layout.IN_OUT


def flipped(layout: Layout) -> Layout:
    """How a matrix lies on the other side of a Transpose."""
    return {Layout.IN_OUT: Layout.OUT_IN, Layout.OUT_IN: Layout.IN_OUT}.get(layout, layout)


# --- names --------------------------------------------------------------------------------------


def _by_parameter(sites: Iterable[Site]) -> dict[str, list[Site]]:
    """Sites by what their initializer is called; under the empty name those whose initializer has lost its name."""
    groups: dict[str, list[Site]] = {}
    for site in sites:
        name, how = _parameter(site.value)
        groups.setdefault(name, []).append(replace(site, how=how))
    return groups


def _parameter(value: ir.Value) -> tuple[str, How]:
    name = value.name or ""
    if KIND in value.metadata_props or _looks_like_parameter(name):
        return name, How.INITIALIZER
    origins = _strings(value.metadata_props.get(FOLDED_FROM, ""))
    if len(origins) == 1 and _looks_like_parameter(origins[0]):
        return origins[0], How.FOLDED_FROM
    return "", How.NONE


def _looks_like_parameter(name: str) -> bool:
    """`encoder.layer.0.weight` does; `val_49`, `onnx::MatMul_812` and `/encoder/Constant_output_0` do not."""
    return re.fullmatch(r"\w[\w-]*(\.[\w-]+)+|(in_proj_)?(weight|bias)", name) is not None


def _strings(text: str) -> list[str]:
    """A Python list of strings that an exporter left as text; empty for anything else."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    return value if isinstance(value, list) and all(isinstance(item, str) for item in value) else []


def _told_apart(parameter: str, sites: list[Site]) -> list[Site]:
    """Name the readers of one parameter's initializer: usually its own module, wherever that is called.

    Readers in other modules mean that tied or equal tensors became one. Each is then called by its own
    module and by what the owner calls the tensor: `layers.0.norm.weight` read in `layers.1.norm` is
    `layers.1.norm.weight`. Without an owner among the readers, or where one of them does not tell its
    module or reads the tensor twice (as weight and as bias), all of them stay unnamed.
    """
    if len({site.node for site in sites}) < len(sites):
        return [replace(site, how=How.NONE) for site in sites]
    modules = [_module(site.node)[0] for site in sites]
    if len(set(modules)) == 1 and (modules[0] is not None or len(sites) == 1):
        return [replace(site, name=parameter) for site in sites]
    owned = [module for module in modules if module is not None and parameter.startswith(f"{module}.")]
    if None in modules or not owned:
        return [replace(site, how=How.NONE) for site in sites]
    own_name = parameter.removeprefix(max(owned, key=len))  # ".weight"
    return [
        replace(site, name=parameter)
        if not module or module in owned
        else replace(site, name=f"{module}{own_name}", how=How.NAME_SCOPE)
        for site, module in zip(sites, modules, strict=True)
    ]


def _named_by_node(site: Site) -> Site:
    """A linear layer whose initializer has lost its name: the module that its node was traced in has one weight."""
    module, how = _module(site.node)
    return replace(site, name=f"{module}.weight", how=how) if module and site.is_linear else site


def _module(node: ir.Node) -> tuple[str | None, How]:
    """The innermost module that a node was traced in; None where nothing tells."""
    scopes = _strings(node.metadata_props.get(NAME_SCOPES, ""))
    if len(scopes) > 1 and not scopes[-2].startswith("_empty_nn_module_stack"):
        # A module's second call is `name@1` to torch.export; the last scope is the operator.
        return re.sub(r"@\d+", "", scopes[-2]), How.NAME_SCOPE
    path = re.fullmatch(r"/(?:(.+)/)?[A-Z]\w*", node.name or "")
    return (path[1] or "").replace("/", ".") if path else None, How.NODE_NAME


def _agree(sites: list[Site]) -> bool:
    """Whether all sites of one name hold one weight, lying one way for each initializer."""
    layouts = {(site.value, site.layout) for site in sites if site.is_linear}
    values = {site.value for site in sites}
    if len(layouts) > len({value for value, _ in layouts}):
        return False
    first, *others = {site.value: site for site in sorted(sites, key=lambda site: not site.is_linear)}.values()
    return len(values) == 1 or all(np.array_equal(first.matrix, other.matrix) for other in others)


def _spec(name: str, sites: tuple[Site, ...]) -> TensorSpec:
    site = min(sites, key=lambda site: not site.is_linear)
    tensor = site.value.const_value
    assert tensor is not None
    shape = tuple(int(size) for size in tensor.shape.numpy())
    layout = site.layout
    if is_stored_transposed(site):
        shape, layout = shape[::-1], Layout.OUT_IN
    return TensorSpec(name, shape, _dtype(site.value), layout, nbytes=tensor.nbytes)


def is_stored_transposed(site: Site) -> bool:
    """Whether an exporter turned the model's parameter before it stored it.

    A Linear's (out, in) weight that lies (in, out) has been folded through a Transpose; transformers'
    Conv1D keeps (in, out) itself, and arrives under its own name without a mark.
    """
    if site.layout is not Layout.IN_OUT:
        return False
    return FOLDED_FROM in site.value.metadata_props or _parameter(site.value)[1] is How.NONE


# --- what is not looked at ----------------------------------------------------------------------


def _notes(model: ir.Model) -> Iterator[str]:
    quantised: Counter[str] = Counter()
    unread: Counter[str] = Counter()
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type in QUANTISED:
            quantised[node.op_type] += 1
        elif node.op_identifier() in model.functions:
            unread[f"the function {node.op_type}"] += sum(map(_is_matrix, node.inputs))
        elif _is_onnx(node, "MatMul", "Gemm"):
            second = node.inputs[1].producer() if node.inputs[1] is not None else None
            unread["a Constant node"] += second is not None and second.op_type == "Constant"
            unread[f"{node.op_type} as its first operand"] += _is_matrix(node.inputs[0])
        elif not _is_onnx(node, "Gather", "Transpose"):
            unread[f"{node.op_type}"] += sum(map(_is_matrix, node.inputs))
    for op_type, count in quantised.items():
        yield f"{count} {op_type} nodes hold quantised weights, which are not looked at"
    for reader, count in unread.items():
        if count:
            yield f"{count} matrices are read by {reader}, where no linear layer is looked for"


def _is_matrix(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and _is_float(value) and _rank(value) == 2


def _tried(site: Site) -> Iterator[str]:
    yield f"its initializer `{site.value.name}`"
    yield f"folded from {site.value.metadata_props.get(FOLDED_FROM, 'nothing')}"
    yield f"its module {_module(site.node)[0] or 'unknown'}"


def _place(site: Site) -> str:
    return f"{site.node.op_type} `{site.node.name}`"
