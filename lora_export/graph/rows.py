"""Adapters chosen row by row: an input says for each row of a batch which adapter it has, 0 being none.

Standard operators only, so that any provider runs it: A stacked (adapters + 1, in, rank) and B stacked
(adapters + 1, rank, out), the first of each zeros, are gathered by row and multiplied batch-wise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import ShapeInferencePass

from lora_export.errors import InputRefused, one_line
from lora_export.formats.onnx_adapter import IDS, ROWS, refuse_what_no_input_carries, stored
from lora_export.graph.branches import Branch, Factor, Weaver, module_of
from lora_export.graph.fold import new_initializer
from lora_export.graph.sites import Site, Sites, unused
from lora_export.plan import Plan, Step

LOWEST_OPSET = 15  # Shape has `start` and `end` since
SHOWN = 20  # problems that an error lists
Dim = int | ir.SymbolicDim


def choose_by_row(model: ir.Model, sites: Sites, plan: Plan, *, batch: str = "batch") -> None:
    """Put every adapter of the plan beside its layers, in memory, to be chosen by the new input `adapter_ids`.

    `adapter_ids` is int64 [batch]: 0 is the base, 1 the plan's first adapter, and so on; their names
    stand in the graph's metadata. Any other id, and a count that is not the batch's, ends a run with an
    error. Shorter ranks are filled with zeros, and an adapter is zeros where it has no pair. The scale
    lies in B; the base's weights keep their bytes. `batch` is the symbol that the graph's inputs have
    for their first dimension. `sites` does not describe the graph any more then.

    Raises InputRefused, with every such place, where no dimension of what enters a layer is the batch
    for certain; for adapters that are more than pairs of matrices; and where a weight is also read by
    something that is no linear layer, an adapter overflows the weights' dtype, or the opset is below 15.
    Throw the graph away then.
    """
    if model.opset_imports.get("", 0) < LOWEST_OPSET:
        raise InputRefused(f"the graph is of opset {model.opset_imports.get('', 0)}; rows need {LOWEST_OPSET}")
    refuse_what_no_input_carries(plan.adapters)
    weaver = Weaver(model)
    if IDS in weaver.values:
        raise InputRefused(f"the graph has an input or value {IDS} already: start from the graph without adapters")
    leader = _leader(model, batch)
    there = {step.weight: weaver.places(step.weight, sites) for step in plan.low_rank}
    layouts = _layouts(model, [(name, site) for name, found in there.items() for site in found], batch)
    chooser = _Chooser(weaver, leader, len(plan.adapters))
    names = [adapter.name for adapter in plan.adapters]
    for step in plan.low_rank:
        found = there[step.weight]
        a, b = _stacks(weaver, step, names, found[0].dtype)
        for site in found:
            weaver.stand_beside(site, [chooser.branch(site, layouts[site.place], a, b)])
    model.metadata_props[ROWS] = json.dumps({"adapters": names})


def _leader(model: ir.Model, batch: str) -> ir.Value:
    """An input whose first dimension is the batch."""
    for value in model.graph.inputs:
        if value.shape is not None and len(value.shape) and _is(value.shape[0], batch):
            return value
    first = [f"{value.name} {value.shape}" for value in model.graph.inputs]
    raise InputRefused(f"no input of the graph has the batch, `{batch}`, as its first dimension: {', '.join(first)}")


def _is(size: Dim, symbol: str) -> bool:
    return isinstance(size, ir.SymbolicDim) and size.value == symbol


def _stacks(weaver: Weaver, step: Step, adapters: Sequence[str], dtype: str) -> tuple[Factor, Factor]:
    """A (adapters + 1, in, rank) and B (adapters + 1, rank, out), zeros where there is nothing."""
    out_features, in_features = step.terms[0].pair.shape
    terms = {name: [term for term in step.terms if term.adapter == name] for name in adapters}
    rank = max(sum(term.pair.rank for term in own) for own in terms.values())
    a = np.zeros((len(adapters) + 1, in_features, rank), np.float32)
    b = np.zeros((len(adapters) + 1, rank, out_features), np.float32)
    for number, own in enumerate(terms.values(), 1):
        begin = 0
        for term in own:
            ranks = slice(begin, begin := begin + term.pair.rank)
            with np.errstate(over="ignore"):  # looked for where it is stored
                a[number, :, ranks] = term.pair.a.T
                b[number, ranks] = term.pair.b.T * np.float32(term.strength * term.pair.scale)
    module = module_of(step.weight)
    sides: Mapping[str, NDArray[Any]] = {"lora_A": a, "lora_B": b}
    first, second = (
        weaver.factor(module, side, stored(step.weight, side, array, dtype)) for side, array in sides.items()
    )
    return first, second


# --- where the batch is -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """How a matrix multiplication's input has to be turned for its batch to come first."""

    rank: int  # of the input
    axis: int = 0  # the batch's, after the reshaping
    # Of rows that were flattened: how many lie outside and inside of the batch, -1 where only a run tells.
    outer: int = 0
    inner: int = 0

    @property
    def is_flat(self) -> bool:
        return self.outer != 0


def _layouts(model: ir.Model, places: Sequence[tuple[str, Site]], batch: str) -> dict[tuple[ir.Node, int], _Layout]:
    """Where each place has its batch. Infers shapes where the graph does not tell them."""
    if any(_entering(site).shape is None for _, site in places):
        ShapeInferencePass()(model)
    found: dict[tuple[ir.Node, int], _Layout] = {}
    problems = []
    for name, site in places:
        layout = _layout(site, batch)
        if isinstance(layout, str):
            problems.append(one_line(f"  {name} ({site.node.op_type} `{site.node.name}`): {layout}"))
        else:
            found[site.place] = layout
    if problems:
        more = [f"  and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise InputRefused(
            f"{len(problems)} layers cannot have an adapter for each row of the batch, `{batch}`:\n"
            + "\n".join([*problems[:SHOWN], *more])
            + "\nLeave them out of the adapter, or swap whole adapters instead (--lora inputs). Nothing was written."
        )
    return found


def _entering(site: Site) -> ir.Value:
    x = site.node.inputs[0]
    assert x is not None
    return x


def _layout(site: Site, batch: str) -> _Layout | str:
    """Where the batch is in what enters a layer, or why nobody can tell."""
    x = _entering(site)
    turned = site.node.attributes.get_int("transA", 0) == 1 or site.node.attributes.get_float("alpha", 1.0) != 1
    if site.node.op_type == "Gemm" and turned:
        return "it turns or scales what enters it"
    if x.shape is None:
        return "nothing tells the shape of what enters it"
    axes = [axis for axis, size in enumerate(x.shape) if _is(size, batch)]
    if len(axes) == 1 and axes[0] < len(x.shape) - 1 and isinstance(x.shape[-1], int):
        return _Layout(len(x.shape), axes[0])
    flat = None if axes else _flattened(x, batch)
    return flat or f"{x.shape} enters it, in which no one dimension is the batch for certain"


def _flattened(x: ir.Value, batch: str) -> _Layout | None:
    """For rows that a Reshape made of several dimensions: which of these was the batch."""
    assert x.shape is not None
    node, features = x.producer(), x.shape[-1]
    while node is not None and node.op_type in ("Cast", "Identity") and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    before = node.inputs[0] if node is not None and node.op_type == "Reshape" else None
    if len(x.shape) != 2 or before is None or before.shape is None or not isinstance(features, int):
        return None
    rows, columns = list(before.shape), 1
    while rows and columns != features and isinstance(size := rows.pop(), int):
        columns *= size
    axes = [axis for axis, size in enumerate(rows) if _is(size, batch)]
    if columns != features or len(axes) != 1:
        return None
    outer, inner = _product(rows[: axes[0]]), _product(rows[axes[0] + 1 :])
    return None if outer == inner == -1 else _Layout(2, 1, outer, inner)


def _product(sizes: Sequence[Dim]) -> int:
    """-1 where one of the sizes is not known yet."""
    known = [size for size in sizes if isinstance(size, int)]
    return math.prod(known) if len(known) == len(sizes) else -1


# --- nodes --------------------------------------------------------------------------------------


class _Chooser:
    """The ids as a graph's input, and branches that follow them."""

    def __init__(self, weaver: Weaver, leader: ir.Value, adapters: int):
        assert leader.shape is not None
        self.weaver, self.batch = weaver, leader.shape[0]
        self.constants: dict[tuple[int, ...], ir.Value] = {}
        graph = weaver.model.graph
        ids = ir.Value(name=IDS, shape=ir.Shape([self.batch]), type=ir.TensorType(ir.DataType.INT64))
        graph.inputs.append(ids)
        nodes = _Nodes(weaver, f"/{IDS}")
        self.count = nodes.add("Shape", [leader], [1], ir.DataType.INT64, start=0, end=1)
        # Gather counts negative ids from the end; one that is too large it refuses.
        negative = nodes.add("Less", [ids, self._constant(0)], [self.batch], ir.DataType.BOOL)
        counted = [negative, self._constant(adapters + 1), ids]
        found = nodes.add("Where", counted, [self.batch], ir.DataType.INT64)
        # One id would be spread over the whole batch; as many as rows, and no others, can be reshaped.
        self.ids = nodes.add("Reshape", [found, self.count], [self.batch])
        graph.insert_before(graph[0], nodes.made)

    def branch(self, site: Site, layout: _Layout, a: Factor, b: Factor) -> Branch:
        """x·A·B with A and B by row, in the shape of what the site's node computes."""
        nodes = _Nodes(self.weaver, a.path)
        product = site.node.outputs[0]
        inner = self._spread(nodes, _entering(site), layout)
        order = [layout.axis, *(axis for axis in range(len(_sizes(inner))) if axis != layout.axis)]
        if layout.axis:
            inner = nodes.add("Transpose", [inner], [_sizes(inner)[axis] for axis in order], perm=order)
        for factor in (a, b):
            nodes.path = factor.path
            inner = self._multiply(nodes, inner, factor.value)
        if layout.axis:
            back = [order.index(axis) for axis in range(len(order))]
            inner = nodes.add("Transpose", [inner], [_sizes(inner)[axis] for axis in back], perm=back)
        if layout.is_flat:
            inner = nodes.add("Reshape", [inner, self._constant(-1, _features(inner))], product.shape)
        elif layout.rank == 2:
            inner = nodes.add("Squeeze", [inner, self._constant(1)], product.shape)
        return Branch(nodes.made, inner, b.path)

    def _spread(self, nodes: _Nodes, x: ir.Value, layout: _Layout) -> ir.Value:
        """x with a dimension that is the batch, and at least one between it and the features."""
        if layout.is_flat:
            last = self._constant(layout.inner, _features(x))
            shape = nodes.add("Concat", [self._constant(layout.outer), self.count, last], [4], axis=0)
            outer, inner = (ir.SymbolicDim(None) if size == -1 else size for size in (layout.outer, layout.inner))
            return nodes.add("Reshape", [x, shape], [outer, self.batch, inner, _features(x)])
        if layout.rank == 2:
            return nodes.add("Unsqueeze", [x, self._constant(1)], [self.batch, 1, _features(x)])
        return x

    def _multiply(self, nodes: _Nodes, x: ir.Value, stack: ir.Value) -> ir.Value:
        """x (batch, ..., in) by each row's own matrix out of the stack (adapters + 1, in, out)."""
        between, matrix = _sizes(x)[1:-1], _sizes(stack)[1:]
        own = nodes.add("Gather", [stack, self.ids], [self.batch, *matrix], axis=0)
        if len(between) > 1:
            ones = range(1, len(between))
            own = nodes.add("Unsqueeze", [own, self._constant(*ones)], [self.batch, *(1 for _ in ones), *matrix])
        return nodes.add("MatMul", [x, own], [self.batch, *between, matrix[-1]])

    def _constant(self, *numbers: int) -> ir.Value:
        if numbers not in self.constants:
            name = unused(f"{IDS}.{'_'.join(map(str, numbers))}", self.weaver.values)
            self.constants[numbers] = new_initializer(self.weaver.model, name, ir.Tensor(np.array(numbers, np.int64)))
        return self.constants[numbers]


class _Nodes:
    """Nodes in the order in which they run."""

    def __init__(self, weaver: Weaver, path: str):
        self.weaver, self.path = weaver, path
        self.made: list[ir.Node] = []

    def add(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        shape: Iterable[Dim] | None,
        dtype: ir.DataType | None = None,
        **attributes: int | Sequence[int],
    ) -> ir.Value:
        """One more; its output has the first input's type where `dtype` is not told."""
        known = None if shape is None else ir.Shape(shape)
        node = self.weaver.node(op_type, inputs, self.path, known, attributes)
        if dtype is not None:
            node.outputs[0].type = ir.TensorType(dtype)
        self.made.append(node)
        return node.outputs[0]


def _sizes(value: ir.Value) -> list[Dim]:
    assert value.shape is not None
    return list(value.shape)


def _features(value: ir.Value) -> int:
    size = _sizes(value)[-1]
    assert isinstance(size, int)
    return size
