"""A plan in a graph by another way than the one that is judged.

`at_the_weights` computes W + ΔW in the graph itself, between each weight and its reader, where `fold` computes it in
NumPy and `branches` computes x·ΔW beside it. Neither's arithmetic is used, nor what moves or copies weights there.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.graph.fold import new_initializer, refuse_what_a_graph_cannot_take
from lora_export.graph.insert.inserter import LOWEST_OPSET, Branch, Inserter, module_of, obstacle_to
from lora_export.graph.insert.nodes import branch
from lora_export.graph.readers import Site, flipped
from lora_export.graph.sites import Sites, unused
from lora_export.plan import Layout, Plan, Step
from lora_export.verification.references.graph_fp64 import ROUNDS, dequantise

LOW = frozenset({"float16", "bfloat16"})
Wide = NDArray[np.float64]


def at_the_weights(model: ir.Model, sites: Sites, plan: Plan, *, rounded: bool = False) -> None:
    """Let every reader of a planned weight read W + ΔW, computed by nodes of the graph, in memory.

    ΔW = Σ strength·scale·B·A as two products of what the adapter holds; DoRA's length is taken of the sum by
    nodes, too. Weights in half precision are summed in fp32 and rounded once; with `rounded` that rounding stays
    when the graph is widened. A MatMulNBits becomes a MatMul by the float weight that it stands for. `sites`
    does not describe the graph any more then.
    """
    refuse_what_a_graph_cannot_take(plan)
    inserter, products = Inserter(model), _Products(model)
    for step in plan.steps:
        for site in sites.by_name[step.weight]:
            _Reader(inserter, step, site, products.of(site), rounded=rounded).change()


def beside_the_weights(model: ir.Model, sites: Sites, plan: Plan) -> int:
    """As `branches.branch`, where branches can stand, and `at_the_weights` elsewhere; returns how many those are."""
    steps = [step for step in plan.steps if not _can_branch(model, step, sites)]
    at_the_weights(model, sites, replace(plan, steps=tuple(steps)))
    branch(model, sites, replace(plan, steps=tuple(step for step in plan.steps if step not in steps)))
    return len(steps)


def _can_branch(model: ir.Model, step: Step, sites: Sites) -> bool:
    if not step.terms or step.replace is not None or model.opset_imports.get("", 0) < LOWEST_OPSET:
        return False
    embedding, there = step.terms[0].pair.embedding, sites.by_name[step.weight]
    grouped = any(site.is_convolution and site.node.attributes.get_int("group", 1) > 1 for site in there)
    return not grouped and not any(obstacle_to(site, embedding=embedding) for site in there)


def beside_quantised(model: ir.Model, sites: Sites, plan: Plan) -> None:
    """x·ΔW beside weights that stay quantised, W + ΔW at all others: how exactly such a graph can be computed.

    A quantised product has an error of its own (it may round x to 8 bits), which a graph with float weights lacks.
    ΔW is one matrix, made of the factors when the graph runs; for DoRA it is made here.
    """
    apart = [step for step in plan.steps if any(site.quantised for site in sites.by_name[step.weight])]
    at_the_weights(model, sites, replace(plan, steps=tuple(step for step in plan.steps if step not in apart)))
    inserter = Inserter(model)
    for step in apart:
        for site in inserter.places(step.weight, sites):
            path = f"/{module_of(step.weight)}"
            made, change = _change(inserter, step, site)  # (in, out), or the rows of a table
            if step.terms[0].pair.embedding:
                ids = site.node.inputs[1]
                assert ids is not None
                node = inserter.node("Gather", [change, ids], path)
            else:
                kind = site.node.op_type if site.node.op_type == "Gemm" else "MatMul"
                node = inserter.node(kind, [_entering(site), change], path, None, _ways(site.node))
            inserter.stand_beside(site, [Branch([*made, node], node.outputs[0], path)])


def _change(inserter: Inserter, step: Step, site: Site) -> tuple[list[ir.Node], ir.Value]:
    """What is added to a quantised weight, (in, out) in the type that it computes in."""
    dtype = np.dtype(site.dtype)
    if step.magnitude is not None:
        before = (site.array.T if site.layout is Layout.EMBEDDING else site.matrix).astype(np.float64)
        change = _among_neighbours(site, _in_fp64(step, before) - before)
        return [], _initializer(inserter, step, "change", change.T.astype(dtype))
    b, a = _factors(step)
    b = _among_neighbours(site, b)
    sides = [_initializer(inserter, step, side, array.T.astype(dtype)) for side, array in (("A", a), ("B", b))]
    node = inserter.node("MatMul", sides, f"/{step.weight}", ir.Shape([a.shape[1], b.shape[0]]))
    return [node], node.outputs[0]


def _among_neighbours(site: Site, rows: Wide) -> Wide:
    """What belongs to a weight's outputs, with zeros for those of its neighbours in a packed one."""
    if (block := site.block) is None:
        return rows
    wide = np.zeros((_outputs(site), rows.shape[1]))
    wide[block.start : block.stop] = rows
    return wide


def _outputs(site: Site) -> int:
    """Output features of the matrix, neighbours included."""
    whole = site.quantised.shape if site.quantised is not None else tuple(map(int, site.tensor.shape.numpy()))
    return whole[1 if site.layout is Layout.IN_OUT else 0]


def _in_fp64(step: Step, before: Wide) -> Wide:
    """m / ‖W + ΔW‖ · (W + ΔW), of a weight (out, in)."""
    assert step.magnitude is not None
    b, a = _factors(step)
    total: Wide = before + b @ a
    total *= step.magnitude[:, None] / np.linalg.norm(total, axis=1, keepdims=True)
    return total


def _ways(node: ir.Node) -> dict[str, int | float]:
    """What a Gemm does to its input and its product besides."""
    if node.op_type != "Gemm":
        return {}
    return {"transA": node.attributes.get_int("transA", 0), "alpha": node.attributes.get_float("alpha", 1.0)}


def _entering(site: Site) -> ir.Value:
    x = site.node.inputs[0]
    assert x is not None
    return x


def _factors(step: Step) -> tuple[Wide, Wide]:
    """All of a step's pairs as one, exactly: B (out, ranks) times the scales, and A (ranks, in * kernel)."""
    scaled = [(term.pair, np.float64(term.scale)) for term in step.terms]
    b = [pair.b.reshape(-1, pair.rank).astype(np.float64) * scale for pair, scale in scaled]
    a = [pair.a.reshape(pair.rank, -1).astype(np.float64) for pair, _ in scaled]
    return np.concatenate(b, axis=1), np.concatenate(a)


def _initializer(inserter: Inserter, step: Step, part: str, array: NDArray[Any]) -> ir.Value:
    name = unused(f"{step.weight}.reference.{part}", inserter.values)
    return new_initializer(inserter.model, name, ir.Tensor(np.ascontiguousarray(array)))


class _Products:
    """The MatMuls in the place of MatMulNBits nodes: one for all the weights that lie side by side in one."""

    def __init__(self, model: ir.Model):
        self.model = model
        self.by_node: dict[ir.Node, ir.Node | None] = {}

    def of(self, site: Site) -> ir.Node | None:
        """The MatMul in the place of a site's node; None where that stays."""
        if site.quantised is not None and site.node not in self.by_node:
            self.by_node[site.node] = dequantise(self.model, site.node)
        return self.by_node.get(site.node)


class _Reader:
    """One reader of a planned weight, and the nodes that are put before it."""

    def __init__(self, inserter: Inserter, step: Step, site: Site, product: ir.Node | None, *, rounded: bool):
        self.inserter, self.step, self.site, self.rounded = inserter, step, site, rounded
        self.node = product or site.node
        self.index, self.layout = (1, Layout.IN_OUT) if product is not None else self._lies()

    def _lies(self) -> tuple[int, Layout]:
        """Where the node reads the weight, and how it lies for that node."""
        site = self.site
        layout = self.step.spec.layout if site.layout is Layout.OTHER else site.layout
        return site.index, flipped(layout) if site.turned else layout

    @property
    def turned(self) -> bool:
        return self.layout.is_transposed

    def change(self) -> None:
        """Put the nodes in."""
        before = self.node.inputs[self.index]
        assert before is not None
        dtype = ir.DataType.from_numpy(np.dtype(self.site.dtype))
        low = self.site.dtype in LOW
        value = self._whole() if self.step.replace is not None else before
        value = self._cast(value, ir.DataType.FLOAT) if low else value
        if self.step.terms:
            value = self._with_pairs(value)
        elif self.step.shift is not None:
            value = self._add("Add", value, self._given("shift", self.step.shift))
        if low:
            value = self._cast(value, dtype)
            if self.rounded:
                producer = value.producer()
                assert producer is not None
                producer.metadata_props[ROUNDS] = "once"
        self.node.replace_input_with(self.index, value)

    def _whole(self) -> ir.Value:
        """The tensor that takes the weight's place, as the reader wants it."""
        assert self.step.replace is not None
        turned = self.step.replace.ndim == 2 and self.step.spec.layout.is_transposed != self.turned
        array = self.step.replace.T if turned else self.step.replace
        return self._given("whole", array.astype(self.site.dtype))

    def _with_pairs(self, weight: ir.Value) -> ir.Value:
        b, a = _factors(self.step)
        b = _among_neighbours(self.site, b)
        sides = (a.T, b.T) if self.turned else (b, a)
        change = self._add("MatMul", *(self._given(f"factor{n}", side) for n, side in enumerate(sides)))
        kernel = self.step.terms[0].pair.a.shape[2:]
        if not kernel:
            return self._rescaled(self._add("Add", weight, change))
        shape = self._given("shape", np.array(self.step.terms[0].pair.shape, np.int64))
        flat = self._given("flat", np.array([b.shape[0], -1], np.int64))
        total = self._add("Add", self._add("Reshape", weight, flat), change)
        return self._add("Reshape", self._rescaled(total), shape)

    def _rescaled(self, total: ir.Value) -> ir.Value:
        """DoRA: each output's length becomes the magnitude. A product with ones is a sum in every opset."""
        magnitude = self.step.magnitude
        if magnitude is None:
            return total
        inner, upright = math.prod(self.step.terms[0].pair.shape[1:]), (1, -1) if self.turned else (-1, 1)
        squares = self._add("Mul", total, total)
        ones = self._given("ones", np.ones((1, inner) if self.turned else (inner, 1), np.float32))
        sums = self._add("MatMul", *((ones, squares) if self.turned else (squares, ones)))
        if (block := self.site.block) is None:
            lengths = self._given("magnitude", magnitude.reshape(upright))
            return self._add("Mul", total, self._add("Div", lengths, self._add("Sqrt", sums)))
        ours, others = np.zeros(_outputs(self.site), np.float32), np.ones(_outputs(self.site), np.float32)
        ours[block.start : block.stop], others[block.start : block.stop] = magnitude, 0
        lengths, kept = self._given("magnitude", ours.reshape(upright)), self._given("kept", others.reshape(upright))
        own = self._add("Div", lengths, self._add("Sqrt", self._add("Add", sums, kept)))
        return self._add("Mul", total, self._add("Add", own, kept))

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        cast = self._add("Cast", value, to=int(dtype))
        cast.type = ir.TensorType(dtype)
        return cast

    def _given(self, part: str, array: NDArray[Any]) -> ir.Value:
        """An initializer; fp64 numbers are rounded when the graph runs, or never where it is wide."""
        value = _initializer(self.inserter, self.step, part, array)
        return self._cast(value, ir.DataType.FLOAT) if array.dtype == np.float64 else value

    def _add(self, op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        node = self.inserter.node(op_type, inputs, f"/{self.step.weight}/reference", None, attributes)
        graph = self.node.graph
        assert graph is not None
        graph.insert_before(self.node, node)
        return node.outputs[0]


def at_strength(plan: Plan, factor: float) -> Plan:
    """The plan with every scale and every bias's shift times `factor`; at 0 only the whole tensors stay, if anything.

    They have no strength: where there is nothing else, 0 leaves the base.
    """
    if factor:
        return replace(plan, steps=tuple(_times(step, factor) for step in plan.steps))
    kept = [replace(step, terms=()) for step in plan.steps if step.replace is not None] if plan.low_rank else []
    return replace(plan, steps=tuple(kept))


def _times(step: Step, factor: float) -> Step:
    terms = tuple(replace(term, strength=term.strength * factor) for term in step.terms)
    shift = None if step.shift is None else step.shift * np.float32(factor)
    return replace(step, terms=terms, shift=shift)
