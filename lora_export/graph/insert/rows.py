"""Adapters chosen row by row: an input says for each row of a batch which adapter it has, 0 being none.

Standard operators only, so that any provider runs it: A stacked (adapters + 1, in, rank) and B stacked
(adapters + 1, rank, out), the first of each zeros, are gathered by row and multiplied batch-wise. Where many rows have
few tokens each, those copies cost more than the products: there all rows are multiplied by all A, each keeps its own
ranks, and these are multiplied by all B (tests/benchmarks/README.md has what was measured). That was measured on a
CPU, and is chosen in fp32 alone: half precision is for other devices, and on a CPU, which computes it in fp32,
onnxruntime would round at other places of the base.

An embedding's A is one table of all adapters, in which each row looks up its own. A convolution is computed for all
adapters, whose ranks lie side by side, and each row keeps its own: none of ONNX's has other weights for each row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import ShapeInferencePass

from lora_export.errors import InputRefused, one_line
from lora_export.formats.onnx_adapter import ADAPTER_IDS, ROW_ADAPTERS_KEY, cast_factor, refuse_beyond_low_rank
from lora_export.graph.fold import new_initializer
from lora_export.graph.insert.dora import length_factors
from lora_export.graph.insert.inserter import NONE, Attributes, Branch, Factor, Inserter, Rescaling, module_of
from lora_export.graph.quantised import layouts as nbits
from lora_export.graph.readers import common_dtype
from lora_export.graph.sites import Site, Sites, unused
from lora_export.plan import Plan, Step

# All adapters' products are cheaper than copies for each row where ADAPTERS (tokens + READ) <= COPIED rows: reading an
# adapter costs as much as multiplying READ tokens by it, and copying one as much as multiplying COPIED tokens.
READ, COPIED = 16, 32
LOWEST_OPSET = 15  # Shape has `start` and `end` since
SHOWN = 20  # problems that an error lists
Dim = int | ir.SymbolicDim


def choose_by_row(model: ir.Model, sites: Sites, plan: Plan, *, batch: str = "batch") -> None:
    """Put every adapter of the plan beside its layers, in memory, to be chosen by the new input `adapter_ids`.

    `adapter_ids` is int64 [batch]: 0 is the base, 1 the plan's first adapter, and so on; their names
    stand in the graph's metadata. Any other id, and a count that is not the batch's, ends a run with an
    error. Shorter ranks are filled with zeros, and an adapter is zeros where it has no pair. The scale
    lies in B; the base's weights keep their bytes. `batch` is the symbol that the graph's inputs have
    for their first dimension; where none has it, the one that all inputs have there is meant, or else the
    only one of them that enters every layer. `sites` does not describe the graph any more then.

    DoRA's factors (adapters + 1, out) are ones where there is none; a plan with DoRA has to be made with
    `apart`, since the adapters are never there at once.

    Raises InputRefused, with every such place, where no dimension of what enters a layer is the batch
    for certain; for adapters that are more than low-rank pairs; and where a weight is also read by
    something that is no layer of its kind, an adapter overflows the weights' dtype, or the opset is
    below 15. Throw the graph away then.
    """
    if model.opset_imports.get("", 0) < LOWEST_OPSET:
        raise InputRefused(f"the graph is of opset {model.opset_imports.get('', 0)}; rows need {LOWEST_OPSET}")
    refuse_beyond_low_rank(plan.adapters)
    inserter = Inserter(model)
    if ADAPTER_IDS in inserter.values:
        raise InputRefused(
            f"the graph has an input or value {ADAPTER_IDS} already: start from the graph without adapters"
        )
    there = {
        step.weight: inserter.places(step.weight, sites, embedding=step.terms[0].pair.embedding)
        for step in plan.low_rank
    }
    places = [(name, site) for name, found in there.items() for site in found]
    if any(_entering(site).shape is None for _, site in places):
        _infer_shapes(model)
    leader, batch = _leader(model, batch, [site for _, site in places])
    layouts = _layouts(places, batch)
    chooser = _Chooser(inserter, leader, len(plan.adapters))
    names = [adapter.name for adapter in plan.adapters]
    factors = {name: length_factors(plan.low_rank, name, there.__getitem__) for name in names}
    for step in plan.low_rank:
        found = there[step.weight]
        stacks = _Stacks(inserter, step, names, common_dtype(found))
        a, b = stacks.convolutions if found[0].is_convolution else stacks.pairs
        lengths = stacks.factors([factors[name].get(step.weight) for name in names]) if step.has_dora else None
        for site in found:
            layout = layouts[site.place]
            rescaling = None if lengths is None else chooser.rescaling(site, layout, lengths)
            if site.is_convolution:
                way = partial(chooser.convolved, site, a, b, stacks.owners)
            else:
                way = partial(chooser.branch, site, layout, a, b)
            inserter.put_beside(site, way, rescaling)
    inserter.finish()
    model.metadata_props[ROW_ADAPTERS_KEY] = json.dumps({"adapters": names})


def _leader(model: ir.Model, batch: str, layers: Sequence[Site]) -> tuple[ir.Value, str]:
    """An input whose first dimension is the batch, and the batch's symbol."""
    symbols = {value: value.shape[0] for value in model.graph.inputs if value.shape is not None and len(value.shape)}
    if not any(_is(size, batch) for size in symbols.values()):
        names = {size.value for size in symbols.values() if isinstance(size, ir.SymbolicDim) and size.value}
        # Exporters that were told no names give inputs of one batch different symbols.
        fits = names if len(set(symbols.values())) == 1 else {name for name in names if _enters_all(layers, name)}
        batch = fits.pop() if len(fits) == 1 else batch
    for value, size in symbols.items():
        if _is(size, batch):
            return value, batch
    first = [f"{value.name} {value.shape}" for value in model.graph.inputs]
    raise InputRefused(f"no input of the graph has the batch, `{batch}`, as its first dimension: {', '.join(first)}")


def _enters_all(layers: Sequence[Site], symbol: str) -> bool:
    return not any(isinstance(_layout(site, symbol), str) for site in layers)


def _is(size: Dim, symbol: str) -> bool:
    return isinstance(size, ir.SymbolicDim) and size.value == symbol


class _Stacks:
    """What all adapters add to one weight, as initializers; the first of each stack is the base, which adds nothing."""

    def __init__(self, inserter: Inserter, step: Step, adapters: Sequence[str], dtype: str):
        self.inserter, self.step, self.dtype = inserter, step, dtype
        own = [step.for_adapter(name) for name in adapters]
        self.sides = [[] if there is None else [term.factors for term in there.terms] for there in own]
        self.ranks = [sum(term.pair.rank for term in there.terms) if there else 0 for there in own]

    @property
    def pairs(self) -> tuple[Factor, Factor]:
        """A (adapters + 1, in, rank) and B (adapters + 1, rank, out), zeros where there is nothing.

        An embedding's A are one table (adapters + 1 times its rows, rank).
        """
        out_features, in_features = self.step.terms[0].pair.shape
        rank = max(self.ranks)
        a = np.zeros((len(self.sides) + 1, in_features, rank), np.float32)
        b = np.zeros((len(self.sides) + 1, rank, out_features), np.float32)
        for number, sides in enumerate(self.sides, 1):
            begin = 0
            for first, second in sides:
                ranks = slice(begin, begin := begin + len(second))
                a[number, :, ranks] = first
                b[number, ranks] = second
        table = a.reshape(-1, rank) if self.step.terms[0].pair.embedding else a
        return self._factor("lora_A", table), self._factor("lora_B", b)

    @property
    def convolutions(self) -> tuple[Factor, Factor]:
        """A (ranks, in, kernel) and B (out, ranks, 1...), all adapters' side by side."""
        sides = [side for there in self.sides for side in there]
        a, b = np.concatenate([a for a, _ in sides]), np.concatenate([b for _, b in sides], axis=1)
        return self._factor("lora_A", a), self._factor("lora_B", b)

    @property
    def owners(self) -> NDArray[np.bool_]:
        """Which of the ranks that lie side by side are each adapter's (adapters + 1, ranks)."""
        number = np.repeat(np.arange(len(self.ranks)) + 1, self.ranks)
        owns: NDArray[np.bool_] = number == np.arange(len(self.ranks) + 1)[:, None]
        return owns

    def factors(self, factors: Sequence[NDArray[np.float64] | None]) -> Factor:
        """DoRA's factors (adapters + 1, out), ones where an adapter has none."""
        stack = np.ones((len(factors) + 1, self.step.terms[0].pair.shape[0]))
        for row, factor in zip(stack[1:], factors, strict=True):
            row[:] = 1 if factor is None else factor.reshape(-1)
        return self._factor("lora_magnitude_vector", stack)

    def _factor(self, side: str, array: NDArray[Any]) -> Factor:
        return self.inserter.factor(
            module_of(self.step.weight), side, cast_factor(self.step.weight, side, array, self.dtype)
        )


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


def _layouts(places: Sequence[tuple[str, Site]], batch: str) -> dict[tuple[ir.Node, int], _Layout]:
    """Where each place has its batch. Raises InputRefused, with every place where nobody can tell."""
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


def _infer_shapes(model: ir.Model) -> None:
    """Give values the shapes and types that ONNX infers, also behind MatMulNBits, of which it knows nothing.

    That is inferred of a copy, in which a MatMul by an input of the weight's shape takes its place.
    """
    plain = model.clone()
    for node in list(ir.traversal.RecursiveGraphIterator(plain.graph)):
        packed = nbits.of_node(node, 1) if len(node.inputs) > 1 else None
        if packed is not None:
            kind = ir.DataType.from_numpy(np.dtype(packed.dtype))
            weight = ir.Value(name=f"{node.name}.plain", shape=ir.Shape(packed.shape[::-1]), type=ir.TensorType(kind))
            plain.graph.inputs.append(weight)
            node.resize_inputs(2)
            node.replace_input_with(1, weight)
            node.op_type, node.domain = "MatMul", ""
            node.attributes.clear()
    ShapeInferencePass()(plain)
    inferred = {value.name: value for value in _values(plain)}
    for value in _values(model):
        told = inferred[value.name]
        value.shape = told.shape if value.shape is None else value.shape
        value.type = told.type if value.type is None else value.type


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        yield from node.outputs


def _entering(site: Site) -> ir.Value:
    """What the layer computes on; of an embedding, the numbers of the rows that it looks up."""
    x = site.node.inputs[1 if site.is_lookup else 0]
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
    if site.is_convolution and not _is(x.shape[0], batch):
        return f"{x.shape} enters it, the first dimension of which is not the batch for certain"
    if site.is_convolution:
        return _Layout(len(x.shape))
    axes = [axis for axis, size in enumerate(x.shape) if _is(size, batch)]
    if len(axes) == 1 and site.is_lookup:
        return _Layout(len(x.shape) + 1, axes[0])
    if len(axes) == 1 and axes[0] < len(x.shape) - 1 and isinstance(x.shape[-1], int):
        return _Layout(len(x.shape), axes[0])
    flat = None if axes or site.is_lookup else _flattened(x, batch)
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

    def __init__(self, inserter: Inserter, leader: ir.Value, adapters: int):
        assert leader.shape is not None
        self.inserter, self.batch = inserter, leader.shape[0]
        self.adapters = adapters
        self.constants: dict[tuple[int, ...], ir.Value] = {}
        self.masks: dict[int, ir.Value] = {}
        self.dense: dict[ir.Value, ir.Value] = {}
        graph = inserter.model.graph
        ids = ir.Value(name=ADAPTER_IDS, shape=ir.Shape([self.batch]), type=ir.TensorType(ir.DataType.INT64))
        graph.inputs.append(ids)
        nodes = _Nodes(inserter, f"/{ADAPTER_IDS}")
        self.count = nodes.add("Shape", [leader], [1], ir.DataType.INT64, start=0, end=1)
        # Gather counts negative ids from the end; one that is too large it refuses.
        negative = nodes.add("Less", [ids, self._constant(0)], [self.batch], ir.DataType.BOOL)
        counted = [negative, self._constant(adapters + 1), ids]
        found = nodes.add("Where", counted, [self.batch], ir.DataType.INT64)
        # One id would be spread over the whole batch; as many as rows, and no others, can be reshaped.
        self.ids = nodes.add("Reshape", [found, self.count], [self.batch])
        graph.insert_before(graph[0], nodes.made)

    def branch(self, site: Site, layout: _Layout, a: Factor, b: Factor, outputs: range) -> Branch:
        """x·A·B with A and B by row, in the shape of these outputs of the site's node."""
        nodes = _Nodes(self.inserter, a.path)
        product = site.node.outputs[0]
        shape = product.shape and [*product.shape[:-1], len(outputs)]
        a, b = nodes.suited(site, a), nodes.suited(site, b, (outputs, 0.0))
        inner = self._looked_up(nodes, site, layout, a) if site.is_lookup else _entering(site)
        inner = self._spread(nodes, inner, layout, _features(inner))
        order = [layout.axis, *(axis for axis in range(len(_sizes(inner))) if axis != layout.axis)]
        if layout.axis:
            inner = nodes.add("Transpose", [inner], [_sizes(inner)[axis] for axis in order], perm=order)
        if site.is_lookup or self.adapters >= COPIED or site.dtype != "float32":
            for factor in (b,) if site.is_lookup else (a, b):
                nodes.path = factor.path
                inner = self._multiply(nodes, inner, factor.value)
        else:
            inner = self._cheaper(nodes, inner, a, b)
        if layout.axis:
            back = [order.index(axis) for axis in range(len(order))]
            inner = nodes.add("Transpose", [inner], [_sizes(inner)[axis] for axis in back], perm=back)
        if layout.is_flat:
            inner = nodes.add("Reshape", [inner, self._constant(-1, _features(inner))], shape)
        elif layout.rank == 2:
            inner = nodes.add("Squeeze", [inner, self._constant(1)], shape)
        return Branch(nodes.made, inner, b.path)

    def _looked_up(self, nodes: _Nodes, site: Site, layout: _Layout, table: Factor) -> ir.Value:
        """The rows of A that are looked up, each row of the batch in its own adapter's part of the table."""
        tokens, count = _entering(site), site.whole[0]
        sizes = _sizes(tokens)
        if tokens.dtype != ir.DataType.INT64:
            tokens = nodes.add("Cast", [tokens], sizes, ir.DataType.INT64, to=int(ir.DataType.INT64))
        # Negative ones count from the end of the adapter's own part.
        negative = nodes.add("Less", [tokens, self._constant(0)], sizes, ir.DataType.BOOL)
        behind = nodes.add("Add", [tokens, self._constant(count)], sizes)
        tokens = nodes.add("Where", [negative, behind, tokens], sizes, ir.DataType.INT64)
        first = nodes.add("Mul", [self.ids, self._constant(count)], [self.batch])
        axes = [axis for axis in range(len(sizes)) if axis != layout.axis]
        if axes:
            spread = [self.batch if axis == layout.axis else 1 for axis in range(len(sizes))]
            first = nodes.add("Unsqueeze", [first, self._constant(*axes)], spread)
        own = nodes.add("Add", [tokens, first], sizes)
        kind = table.value.dtype
        return nodes.add("Gather", [table.value, own], [*sizes, _features(table.value)], kind)

    def convolved(self, site: Site, a: Factor, b: Factor, owners: NDArray[np.bool_], _: range) -> Branch:
        """A convolution by all adapters' A, of which each row keeps its own ranks, and one by all their B."""
        nodes = _Nodes(self.inserter, a.path)
        a, b = nodes.suited(site, a), nodes.suited(site, b)
        product, ranks = site.node.outputs[0], owners.shape[1]
        shape = product.shape and [product.shape[0], ranks, *product.shape[2:]]
        inner = nodes.add("Conv", [_entering(site), a.value], shape, None, site.node.attributes)
        own = self._of_rows(nodes, self.inserter.constant(a.path, "rows", owners), len(site.shape), axis=0, last=1)
        # Chosen, not multiplied: what is not finite in another adapter is none of this row's.
        nothing = self.inserter.constant(a.path, "nothing", np.zeros((), np.dtype(site.dtype)))
        inner = nodes.add("Where", [own, inner, nothing], shape, inner.dtype)
        nodes.path = b.path
        return Branch(nodes.made, nodes.add("Conv", [inner, b.value], product.shape), b.path)

    def rescaling(self, site: Site, layout: _Layout, factors: Factor) -> Rescaling:
        """The multiplication of each row by its own adapter's factors."""

        def multiplied(total: ir.Value) -> list[ir.Node]:
            nodes = _Nodes(self.inserter, factors.path)
            stack, shape = nodes.suited(site, factors, (range(site.width), 1.0)).value, site.node.outputs[0].shape
            if site.is_convolution:
                own = self._of_rows(nodes, stack, layout.rank, axis=0, last=1)
            else:
                own = self._of_rows(nodes, stack, 4 if layout.is_flat else layout.rank, axis=layout.axis)
            if not layout.is_flat:
                nodes.add("Mul", [total, own], shape)
                return nodes.made
            spread = self._spread(nodes, total, layout, site.width)
            spread = nodes.add("Mul", [spread, own], _sizes(spread))
            nodes.add("Reshape", [spread, self._constant(-1, site.width)], shape)
            return nodes.made

        return Rescaling(multiplied, factors.path)

    def _of_rows(self, nodes: _Nodes, stack: ir.Value, rank: int, *, axis: int, last: int = -1) -> ir.Value:
        """Each row's own part of a stack (adapters + 1, n), in so many dimensions, of which `last` is n."""
        width = _sizes(stack)[1]
        own = nodes.add("Gather", [stack, self.ids], [self.batch, width], axis=0)
        places = {axis: self.batch, last % rank: width}
        ones = [at for at in range(rank) if at not in places]
        if not ones:
            return own
        return nodes.add("Unsqueeze", [own, self._constant(*ones)], [places.get(at, 1) for at in range(rank)])

    def _spread(self, nodes: _Nodes, x: ir.Value, layout: _Layout, features: int) -> ir.Value:
        """x with a dimension that is the batch, and at least one between it and the features."""
        if layout.is_flat:
            last = self._constant(layout.inner, features)
            shape = nodes.add("Concat", [self._constant(layout.outer), self.count, last], [4], axis=0)
            outer, inner = (ir.SymbolicDim(None) if size == -1 else size for size in (layout.outer, layout.inner))
            return nodes.add("Reshape", [x, shape], [outer, self.batch, inner, features])
        if layout.rank == 2:
            return nodes.add("Unsqueeze", [x, self._constant(1)], [self.batch, 1, features])
        return x

    def _multiply(self, nodes: _Nodes, x: ir.Value, stack: ir.Value) -> ir.Value:
        """x (batch, ..., in) by each row's own matrix out of the stack (adapters + 1, in, out)."""
        between, matrix = _sizes(x)[1:-1], _sizes(stack)[1:]
        own = nodes.add("Gather", [stack, self.ids], [self.batch, *matrix], axis=0)
        if len(between) > 1:
            ones = range(1, len(between))
            own = nodes.add("Unsqueeze", [own, self._constant(*ones)], [self.batch, *(1 for _ in ones), *matrix])
        return nodes.add("MatMul", [x, own], [self.batch, *between, matrix[-1]])

    # --- all adapters at once, where that is cheaper ---

    def _cheaper(self, nodes: _Nodes, x: ir.Value, a: Factor, b: Factor) -> ir.Value:
        """x (batch, ..., in) by each row's own A and B: by copies of them, or by all of them."""
        nodes.path = b.path
        condition = self._is_dense(nodes, x)
        many, few = _Nodes(self.inserter, a.path), _Nodes(self.inserter, a.path)
        apart = self._multiply(many, x, a.value)
        together = self._by_all(nodes, few, x, a, b)
        many.path = b.path
        apart = self._multiply(many, apart, b.value)
        ways = {"then_branch": (few, together), "else_branch": (many, apart)}
        graphs = {
            name: ir.AttrGraph(name, ir.Graph([], [output], nodes=made.made, name=f"{b.path}/{name}"))
            for name, (made, output) in ways.items()
        }
        return nodes.add("If", [condition], _sizes(apart), a.value.dtype, graphs)

    def _is_dense(self, nodes: _Nodes, x: ir.Value) -> ir.Value:
        """Whether all adapters' products are cheaper for this x: once for all layers that read it."""
        if x in self.dense:
            return self.dense[x]
        made, features, reader = _Nodes(self.inserter, f"/{ADAPTER_IDS}"), _features(x), x.producer()
        rows = made.add("Mul", [self.count, self._constant(COPIED * features)], [1])
        most = made.add("Sub", [rows, self._constant(READ * self.adapters * features)], [1])
        size = made.add("Size", [x], [], ir.DataType.INT64)
        there = made.add("Mul", [size, self._constant(self.adapters)], [1])
        few = made.add("LessOrEqual", [there, most], [1], ir.DataType.BOOL)
        few = made.add("Squeeze", [few, self._constant(0)], [])
        if reader is not None and reader.graph is not None:  # before whichever layer comes first
            reader.graph.insert_after(reader, made.made)
            self.dense[x] = few
        else:
            nodes.made += made.made
        return few

    def _by_all(self, nodes: _Nodes, few: _Nodes, x: ir.Value, a: Factor, b: Factor) -> ir.Value:
        """x by all A side by side, of which each row keeps its own ranks, by all B one below the other.

        The matrices are made of the stacks: a runtime that folds constants has done so when the graph is loaded.
        """
        slots, inner, rank = map(int, _sizes(a.value))  # type: ignore[arg-type]
        wide, out = slots * rank, _features(b.value)
        turned = nodes.add("Transpose", [a.value], [inner, slots, rank], perm=[1, 0, 2])
        beside = nodes.add("Reshape", [turned, self._constant(inner, wide)], [inner, wide])
        below = nodes.add("Reshape", [b.value, self._constant(wide, out)], [wide, out])
        own = self._own_ranks(rank)
        between = _sizes(x)[1:-1]
        if len(between) > 1:
            ones = range(1, len(between))
            own = few.add("Unsqueeze", [own, self._constant(*ones)], [self.batch, *(1 for _ in between), wide])
        kind = a.value.dtype
        assert kind is not None
        product = few.add("MatMul", [x, beside], [self.batch, *between, wide], kind)
        # Chosen, not multiplied: what is not finite by another adapter is none of this row's.
        nothing = self.inserter.constant(a.path, "nothing", np.zeros((), kind.numpy()))
        kept = few.add("Where", [own, product, nothing], [self.batch, *between, wide], kind)
        few.path = b.path
        return few.add("MatMul", [kept, below], [self.batch, *between, out])

    def _own_ranks(self, rank: int) -> ir.Value:
        """Which of all adapters' ranks, side by side, are each row's own (batch, 1, ranks)."""
        if rank not in self.masks:
            slots = self.adapters + 1
            owners = np.repeat(np.eye(slots, dtype=bool), rank, axis=1)
            nodes = _Nodes(self.inserter, f"/{ADAPTER_IDS}")
            table = self.inserter.constant(f"/{ADAPTER_IDS}", f"owners.{rank}", owners)
            own = nodes.add("Gather", [table, self.ids], [self.batch, slots * rank], axis=0)
            self.masks[rank] = nodes.add("Unsqueeze", [own, self._constant(1)], [self.batch, 1, slots * rank])
            producer = self.ids.producer()
            assert producer is not None
            self.inserter.model.graph.insert_after(producer, nodes.made)
        return self.masks[rank]

    def _constant(self, *numbers: int) -> ir.Value:
        if numbers not in self.constants:
            name = unused(f"{ADAPTER_IDS}.{'_'.join(map(str, numbers))}", self.inserter.values)
            self.constants[numbers] = new_initializer(self.inserter.model, name, ir.Tensor(np.array(numbers, np.int64)))
        return self.constants[numbers]


class _Nodes:
    """Nodes in the order in which they run."""

    def __init__(self, inserter: Inserter, path: str):
        self.inserter, self.path = inserter, path
        self.made: list[ir.Node] = []

    def suited(self, site: Site, factor: Factor, filled: tuple[range, float] | None = None) -> Factor:
        """As `Inserter.suited`, and `Inserter.filled` with these outputs and this number."""
        before, factor = self.inserter.suited(site, factor)
        filling, factor = self.inserter.filled(site, factor, *filled) if filled else ([], factor)
        self.made += [*before, *filling]
        return factor

    def add(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        shape: Iterable[Dim] | None,
        dtype: ir.DataType | None = None,
        own: Attributes = NONE,
        **attributes: int | Sequence[int],
    ) -> ir.Value:
        """One more; its output has the first input's type where `dtype` is not told."""
        known = None if shape is None else ir.Shape(shape)
        node = self.inserter.node(op_type, inputs, self.path, known, {**own, **attributes})
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
