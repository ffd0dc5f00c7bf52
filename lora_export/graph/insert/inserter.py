"""What puts nodes and initializers of a branch beside a layer, under names that are free."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.graph.fold import new_initializer, refuse_overflow
from lora_export.graph.quantised.layouts import NBITS
from lora_export.graph.readers import CHANGED
from lora_export.graph.sites import Site, Sites, unused, value_names
from lora_export.plan import Layout

Attributes = Mapping[str, int | float | Sequence[int] | ir.Attr]
NONE: Attributes = MappingProxyType({})
# Operators that add a bias, and at which input.
BIASES: Mapping[str, int] = MappingProxyType({"Gemm": 2, "Conv": 2, NBITS: 5})
LOWEST_OPSET = 11  # a Gemm can do without its bias since, and Pad has its sizes as an input


def module_of(weight: str) -> str:
    """The module whose weight this is; empty where the weight is the whole model's."""
    return re.sub(r"(^|\.)(in_proj_)?weight$", "", weight)


def obstacle_to(site: Site, *, embedding: bool) -> str:
    """As `Site.obstacle`, where a pair of an embedding's, or of another layer's kind is to stand beside."""
    alone = site.inner is None and site.block is None
    if embedding:
        return "" if alone and site.is_lookup else site.obstacle or site.node.op_type
    return "" if alone and site.is_convolution else site.obstacle


class Factor(NamedTuple):
    """One side of a low-rank pair in a graph, and where it says it is."""

    value: ir.Value
    path: str  # the beginning of its nodes' names


class Branch(NamedTuple):
    """What will be added to a layer's product."""

    nodes: list[ir.Node]  # in the order in which they run
    product: ir.Value
    path: str


class Rescaling(NamedTuple):
    """The multiplication of a layer's product, branches included, by DoRA's factor."""

    nodes: Callable[[ir.Value], list[ir.Node]]  # of the product; the last gives the result
    path: str


class Addition(NamedTuple):
    """What one weight's outputs gain."""

    site: Site
    branch: Callable[[range], Branch]  # for these outputs of the node: the weight's, and neighbours' that gain zeros
    rescaling: Rescaling | None


class Inserter:
    """Adds nodes and initializers to a graph under names that are free.

    What is put beside a layer is in the graph after `finish`: a node whose matrix holds several weights side by side
    (q, k and v; gate and up) is added to once, by a product as wide as its own.
    """

    def __init__(self, model: ir.Model):
        self.model = model
        self.values = value_names(model)
        self.nodes = {node.name for node in ir.traversal.RecursiveGraphIterator(model.graph) if node.name}
        self.old = frozenset(self.values)
        self.beside: dict[ir.Node, list[Addition]] = {}

    def places(self, weight: str, sites: Sites, *, embedding: bool = False, in_place: bool = False) -> tuple[Site, ...]:
        """Where a weight is read. Raises InputRefused where no branch can stand beside one of its readers.

        With `in_place`, those that can read W + ΔW in its place are none of these.
        """
        there = sites.by_name[weight]
        others = [site for site in there if not (in_place and site.reads_whole)]
        strangers = sorted({told for site in others if (told := obstacle_to(site, embedding=embedding))})
        if strangers:
            raise InputRefused(
                f"{weight} is read by {', '.join(strangers)}, beside which no branch can stand. Merge the "
                "adapter into the weights instead, or start from the graph before its nodes were fused"
            )
        groups = max(site.node.attributes.get_int("group", 1) if site.is_convolution else 1 for site in there)
        if groups > 1:
            raise InputRefused(f"{weight}: a pair has no meaning beside a convolution of {groups} groups")
        return there

    def factor(self, module: str, part: str, array: NDArray[Any], *, name: str = "") -> Factor:
        """A new initializer `MODULE.PART.weight`, or of this name. Raises InputRefused where that is taken."""
        parts = [part for part in (module, part) if part]
        name = name or ".".join([*parts, "weight"])
        if name in self.old:
            raise InputRefused(
                f"the graph holds {name} already: an adapter stands beside its weights. Start from the graph without it"
            )
        refuse_overflow(name, array)
        value = new_initializer(self.model, unused(name, self.values), ir.Tensor(np.ascontiguousarray(array)))
        return Factor(value, "/".join(["", *parts]))

    def put(self, site: Site, pairs: Sequence[tuple[Factor, Factor]], rescaling: Rescaling | None = None) -> None:
        """Put pairs beside a site's node, or into what it reads."""
        if site.reads_whole:
            self._change_what_is_read(site, pairs, rescaling)
        else:
            self.put_beside(site, lambda outputs: self.low_rank(site, pairs, outputs), rescaling)

    def put_beside(self, site: Site, branch: Callable[[range], Branch], rescaling: Rescaling | None = None) -> None:
        """Let what a site's node computes gain a branch, and be multiplied then; see `Addition`."""
        self.beside.setdefault(site.node, []).append(Addition(site, branch, rescaling))

    def finish(self) -> None:
        """Add what was put beside nodes to what they compute."""
        for additions in self.beside.values():
            rescalings = [addition.rescaling for addition in additions if addition.rescaling is not None]
            self.stand_beside(additions[0].site, self._side_by_side(additions), rescalings)
        self.beside.clear()

    def _side_by_side(self, additions: Sequence[Addition]) -> list[Branch]:
        """The branches of a node, as wide as its product: of several blocks, one.

        Measured with onnxruntime beside a branch for each block, filled up with zeros for its neighbours' outputs: two
        thirds of the time (tests/benchmarks/README.md).
        """
        branches = [addition.branch(outputs) for addition, outputs in _spans(additions)]
        if additions[0].site.block is None or len(branches) == 1:
            return branches
        path, shape = branches[0].path, additions[0].site.node.outputs[0].shape
        together = self.node("Concat", [branch.product for branch in branches], path, shape, {"axis": -1})
        nodes = [node for branch in branches for node in branch.nodes]
        return [Branch([*nodes, together], together.outputs[0], path)]

    def _change_what_is_read(
        self, site: Site, pairs: Sequence[tuple[Factor, Factor]], rescaling: Rescaling | None
    ) -> None:
        """Let a site's node read W + A·B (in, out), which onnxruntime folds where A and B are constant.

        W keeps its bits where A·B is zeros: no other way leaves the node, and so what it computes, as it is.
        """
        total = site.node.inputs[site.index]
        assert total is not None and site.node.graph is not None
        path, upright = pairs[0][1].path, site.as_read is Layout.OUT_IN
        nodes = [self._turn(total, path)] if upright else []
        total = nodes[-1].outputs[0] if nodes else total
        before, a, b = self._joined(site, pairs)
        filled, b = self.filled(site, b, range(site.width), 0.0)
        product = self._multiply(a.value, b, NONE)
        changed = self.node("Add", [total, product.outputs[0]], path, total.shape)
        changed.metadata_props[CHANGED] = "sum"
        nodes += [*before, *filled, product, changed]
        total = changed.outputs[0]
        if rescaling is not None:
            nodes += rescaling.nodes(total)
            nodes[-1].metadata_props[CHANGED] = "length"
            total = nodes[-1].outputs[0]
        if upright:
            nodes.append(self._turn(total, path))
            total = nodes[-1].outputs[0]
        site.node.graph.insert_before(site.node, nodes)
        site.node.replace_input_with(site.index, total)

    def _turn(self, matrix: ir.Value, path: str) -> ir.Node:
        shape = None if matrix.shape is None else ir.Shape([matrix.shape[1], matrix.shape[0]])
        return self.node("Transpose", [matrix], path, shape, {"perm": [1, 0]})

    def low_rank(self, site: Site, pairs: Sequence[tuple[Factor, Factor]], outputs: range) -> Branch:
        """x·A·B, as a site's own node would have it; x are the rows that an embedding looks up."""
        before, a, b = self._joined(site, pairs)
        filled, b = self.filled(site, b, outputs, 0.0)
        if site.is_lookup:
            nodes = self._looked_up(site, a, b)
        elif site.is_convolution:
            nodes = self._convolved(site, a, b)
        else:
            x = site.node.inputs[0]
            assert x is not None
            turned, amplified = _attributes(site.node)
            down = self._multiply(x, a, turned)
            nodes = [down, self._multiply(down.outputs[0], b, amplified)]
        return Branch([*before, *filled, *nodes], nodes[-1].outputs[0], b.path)

    def _joined(self, site: Site, pairs: Sequence[tuple[Factor, Factor]]) -> tuple[list[ir.Node], Factor, Factor]:
        """All pairs as one in the dtype that a site computes in, their ranks side by side, and the nodes for that."""
        ranks = (0, 1) if site.is_convolution else (1, 0)
        nodes, joined = [], []
        for factors, axis in zip(zip(*pairs, strict=True), ranks, strict=True):
            before, suited = zip(*(self.suited(site, factor) for factor in factors), strict=True)
            nodes += [node for there in before for node in there]
            if len(suited) > 1:
                shape = list(suited[0].value.shape)
                shape[axis] = sum(factor.value.shape[axis] for factor in suited)
                values = [factor.value for factor in suited]
                nodes.append(self.node("Concat", values, suited[0].path, ir.Shape(shape), {"axis": axis}))
                suited = (_behind(suited[0], nodes),)
            joined.append(suited[0])
        a, b = joined
        return nodes, a, b

    def suited(self, site: Site, factor: Factor) -> tuple[list[ir.Node], Factor]:
        """A factor in the dtype that the site computes in, and the nodes that make it so."""
        kind = ir.DataType.from_numpy(np.dtype(site.dtype))
        nodes = [] if factor.value.dtype == kind else [self._cast_to(kind, factor.value, factor.path)]
        return nodes, _behind(factor, nodes)

    def filled(self, site: Site, factor: Factor, outputs: range, number: float) -> tuple[list[ir.Node], Factor]:
        """A factor whose last dimension is these outputs of a site's node, and the nodes that make it so.

        Where the site's weight is a block of the node's, its neighbours' outputs have this number.
        """
        wider = site.block is not None and site.block != outputs
        nodes = self._filled(site, factor, outputs, number) if wider else []
        return nodes, _behind(factor, nodes)

    def _cast_to(self, kind: ir.DataType, value: ir.Value, path: str) -> ir.Node:
        node = self.node("Cast", [value], path, value.shape, {"to": int(kind)})
        node.outputs[0].type = ir.TensorType(kind)
        return node

    def _filled(self, site: Site, factor: Factor, outputs: range, number: float) -> list[ir.Node]:
        assert site.block is not None
        self.needs(LOWEST_OPSET, "an adapter beside a part of a weight")
        value, path = factor.value, factor.path
        assert value.shape is not None
        sides = [0] * (len(value.shape) - 1)
        sizes = [*sides, site.block.start - outputs.start, *sides, outputs.stop - site.block.stop]
        shape = ir.Shape([*value.shape[:-1], len(outputs)])
        nodes = []
        if value.dtype == ir.DataType.BFLOAT16:  # which onnxruntime has no Pad for
            nodes.append(self._cast_to(ir.DataType.FLOAT, value, path))
            value = nodes[-1].outputs[0]
        assert value.dtype is not None
        inputs = [value, self.constant(path, "outputs", np.array(sizes, np.int64))]
        if number:
            inputs.append(self.constant(path, "fill", np.array(number, value.dtype.numpy())))
        nodes.append(self.node("Pad", inputs, path, shape))
        if factor.value.dtype == ir.DataType.BFLOAT16:
            nodes.append(self._cast_to(ir.DataType.BFLOAT16, nodes[-1].outputs[0], path))
        return nodes

    def needs(self, opset: int, what: str) -> None:
        """Raise InputRefused for a graph of an older set of operators."""
        there = self.model.opset_imports.get("", 0)
        if there < opset:
            raise InputRefused(f"the graph is of opset {there}; {what} needs {opset}. Export it anew, or merge")

    def _looked_up(self, site: Site, a: Factor, b: Factor) -> list[ir.Node]:
        ids = site.node.inputs[1]
        assert ids is not None and a.value.shape is not None
        shape = None if ids.shape is None else ir.Shape([*ids.shape, a.value.shape[-1]])
        down = self.node("Gather", [a.value, ids], a.path, shape)
        return [down, self._multiply(down.outputs[0], b, NONE)]

    def _convolved(self, site: Site, a: Factor, b: Factor) -> list[ir.Node]:
        x, product = site.node.inputs[0], site.node.outputs[0]
        assert x is not None and a.value.shape is not None
        shape = product.shape and ir.Shape([product.shape[0], a.value.shape[0], *product.shape[2:]])
        down = self.node("Conv", [x, a.value], a.path, shape, site.node.attributes)
        return [down, self.node("Conv", [down.outputs[0], b.value], b.path, product.shape)]

    def rescaling(self, site: Site, factor: Factor) -> Rescaling:
        """The multiplication of all rows by one factor (out,), a convolution's (out, 1...)."""
        self.needs(LOWEST_OPSET, "DoRA beside its weights")
        before, suited = self.suited(site, factor)
        filled, last = self.filled(site, suited, range(site.width), 1.0)

        def nodes(total: ir.Value) -> list[ir.Node]:
            return [*before, *filled, self.node("Mul", [total, last.value], factor.path, total.shape)]

        return Rescaling(nodes, factor.path)

    def stand_beside(self, site: Site, branches: Sequence[Branch], rescalings: Sequence[Rescaling] = ()) -> None:
        """Add branches as wide as what a site's node computes to that, before anything reads it.

        `rescalings` are of the sum; the node's own bias is added behind them.
        """
        product = site.node.outputs[0]
        assert site.node.graph is not None
        uses = product.uses()
        added: list[ir.Node] = []
        total = product
        for branch in branches:
            add = self.node("Add", [total, branch.product], branch.path, product.shape)
            added += [*branch.nodes, add]
            total = add.outputs[0]
        for rescaling in rescalings:
            added += rescaling.nodes(total)
            total = added[-1].outputs[0]
        if rescalings:
            added += self._bias_behind(site, total, rescalings[-1].path)
            total = added[-1].outputs[0]
        site.node.graph.insert_after(site.node, added)
        for node, index in uses:
            node.replace_input_with(index, total)
        for graph in self.model.graphs():
            for index, output in enumerate(graph.outputs):
                if output is product:  # the graph's output keeps its name
                    total.name, product.name = product.name, total.name
                    graph.outputs[index] = total

    def _bias_behind(self, site: Site, total: ir.Value, path: str) -> list[ir.Node]:
        """The bias taken out of a site's node and added to the sum; nothing where it has none."""
        bias = self._bias_taken_out(site.node)
        if bias is None:
            return []
        before = self._as_added(site, bias, path)
        last = before[-1].outputs[0] if before else bias
        return [*before, self.node("Add", [total, last], path, site.node.outputs[0].shape)]

    def _bias_taken_out(self, node: ir.Node) -> ir.Value | None:
        """The bias that a node adds no longer; None where it never did."""
        index = BIASES.get(node.op_type, len(node.inputs))
        bias = node.inputs[index] if index < len(node.inputs) else None
        if bias is not None:
            node.replace_input_with(index, None)
            while node.inputs[-1] is None:
                node.resize_inputs(len(node.inputs) - 1)
        return bias

    def _as_added(self, site: Site, bias: ir.Value, path: str) -> list[ir.Node]:
        """The nodes that make a bias what its node added: a Gemm's times beta, a convolution's upright."""
        if site.is_convolution:
            upright = np.array([-1, *[1] * (len(site.shape) - 2)], np.int64)
            return [self.node("Reshape", [bias, self.constant(path, "shape", upright)], path)]
        beta = site.node.attributes.get_float("beta", 1.0)
        if beta == 1:
            return []
        factor = self.constant(path, "beta", np.array(beta, np.dtype(site.dtype)))
        return [self.node("Mul", [bias, factor], path, bias.shape)]

    def constant(self, path: str, name: str, array: NDArray[Any]) -> ir.Value:
        """A new initializer of a name that follows a node's path."""
        name = unused(f"{path[1:].replace('/', '.')}.{name}", self.values)
        return new_initializer(self.model, name, ir.Tensor(array))

    def _multiply(self, x: ir.Value, factor: Factor, attributes: Attributes) -> ir.Node:
        assert factor.value.shape is not None
        known = x.shape is not None and "transA" not in attributes
        shape = ir.Shape([*x.shape[:-1], factor.value.shape[-1]]) if known and x.shape is not None else None
        return self.node("Gemm" if attributes else "MatMul", [x, factor.value], factor.path, shape, attributes)

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        path: str,
        shape: ir.Shape | None = None,
        attributes: Attributes = NONE,
    ) -> ir.Node:
        """A node whose one output has the first input's type; not in the graph yet."""
        name = unused(f"{path}/{op_type}", self.nodes)
        output = ir.Value(name=unused(f"{name}_output_0", self.values), type=inputs[0].type, shape=shape)
        return ir.node(op_type, inputs, attributes, outputs=[output], name=name)


def _spans(additions: Sequence[Addition]) -> Iterator[tuple[Addition, range]]:
    """What is added to a node, block by block, and for which outputs; those that gain nothing go with a neighbour."""
    if additions[0].site.block is None:
        yield from ((addition, range(addition.site.width)) for addition in additions)
        return
    blocks = {addition.site.block.start: addition for addition in additions if addition.site.block is not None}
    assert len(blocks) == len(additions)
    _, *starts = sorted(blocks)
    ends = [0, *starts, additions[0].site.width]
    for (_, addition), (start, stop) in zip(sorted(blocks.items()), pairwise(ends), strict=True):
        yield addition, range(start, stop)


def _behind(factor: Factor, nodes: Sequence[ir.Node]) -> Factor:
    """A factor as the last of these nodes leaves it."""
    return factor._replace(value=nodes[-1].outputs[0]) if nodes else factor


def _attributes(node: ir.Node) -> tuple[Attributes, Attributes]:
    """What a Gemm does to its input and its product: its branch turns x on the way in, and has alpha on the way out."""
    if node.op_type != "Gemm":
        return NONE, NONE
    alpha = node.attributes.get_float("alpha", 1.0)
    turned = node.attributes.get_int("transA", 0) == 1
    return {"transA": 1} if turned else NONE, {"alpha": alpha} if alpha != 1 else NONE
