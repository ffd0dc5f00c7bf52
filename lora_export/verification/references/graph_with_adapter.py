"""Reference graphs: a plan carried out in a graph in another way than the candidate's.

`sum_at_weights` computes W + ΔW in the graph itself, between each weight and its reader. `fold_graph` computes the sum
in NumPy, and `insert_nodes` computes x·ΔW beside it. The reference uses neither's arithmetic, and none of the code that
moves or copies weights there.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.errors import Undecided, count, first_of
from lora_export.graph.find_sites import Sites
from lora_export.graph.insert.adapter_names import module_of
from lora_export.graph.insert.adapter_nodes import insert_nodes
from lora_export.graph.insert.branches import BranchNodes, Inserter, branch_obstacle
from lora_export.graph.insert.node_factory import MIN_OPSET, NodeFactory
from lora_export.graph.operators import transposed_layout
from lora_export.graph.refusals import refuse_unsupported_steps
from lora_export.graph.site import Site
from lora_export.graph.values import new_initializer, unused_name
from lora_export.options.spelling import named
from lora_export.pairs.exact_transforms import exact_change
from lora_export.pairs.transforms import WeightTransform
from lora_export.plan import Layout, Plan, Step, Term
from lora_export.verification.parity import Wide
from lora_export.verification.references.graph_fp64 import KEEPS_ROUNDING, dequantise

TRANSFORMED = "transformed"
PAIR_PARTS = ("A", "B", "magnitude", TRANSFORMED)
HALF_PRECISION = frozenset({"float16", "bfloat16"})


class RecordedConstant(NamedTuple):
    """A tensor of the adapters in a graph, and where it is used."""

    step: Step
    site: Site
    part: str  # one of PAIR_PARTS
    value: ir.Value  # the initializer
    array: NDArray[Any]
    is_transposed: bool  # the factors are A (in, rank) and B (rank, out)
    base: NDArray[Any] | None = None  # of a weight that was changed as a whole: without the change


def sum_at_weights(
    model: ir.Model, sites: Sites, plan: Plan, *, rounded: bool = False, record: list[RecordedConstant] | None = None
) -> list[str]:
    """Let every reader of a planned weight read W + ΔW, computed by nodes of the graph. Changes `model` in memory.

    ΔW = Σ strength·scale·B·A, as products of the adapter's own factors. DoRA's norms are computed from the sum by nodes
    too. Weights in half precision are summed in fp32 and rounded once. With `rounded`, `graph_fp64.widen` keeps that
    rounding. A MatMulNBits becomes a MatMul by its dequantised weight. `record` receives the tensors of the pairs.
    `sites` is invalid afterwards. Returns no notes.
    """
    refuse_unsupported_steps(plan)
    factory, products = NodeFactory(model), _DequantisedProducts(model)
    for step in plan.steps:
        for site in sites.by_name[step.weight]:
            _WeightSum(factory, step, site, products.of(site), rounded=rounded, record=record).insert()
    return []


def branches_where_possible(model: ir.Model, sites: Sites, plan: Plan) -> list[str]:
    """As `insert_nodes` where that is possible, `sum_at_weights` elsewhere. Returns a note on the weights elsewhere."""
    steps = [step for step in plan.steps if not _can_have_branch(model, step, sites)]
    sum_at_weights(model, sites, replace(plan, steps=tuple(steps)))
    insert_nodes(model, sites, replace(plan, steps=tuple(step for step in plan.steps if step not in steps)))
    if not steps:
        return []
    return [f"{count(len(steps), 'weight')} cannot have a branch: W + ΔW is computed where it is read"]


def branches_at_quantised_weights(model: ir.Model, sites: Sites, plan: Plan) -> list[str]:
    """x·ΔW beside weights that stay quantised, and W + ΔW at all others. Shows how exactly such a graph can compute.

    A quantised product has an error of its own (it may round x to 8 bits), which a graph with float weights lacks. ΔW
    is one matrix, computed from the factors when the graph runs. With DoRA it is computed here. Returns no notes.
    """
    quantised = [step for step in plan.steps if any(site.quantised for site in sites.by_name[step.weight])]
    others = tuple(step for step in plan.steps if step not in quantised)
    sum_at_weights(model, sites, replace(plan, steps=others))
    inserter = Inserter(model)
    for step in quantised:
        for site in inserter.sites_of(step.weight, sites):
            inserter.add_to_product(site, [_delta_branch(inserter.factory, step, site)])
    return []


def refuse_parts(plan: Plan) -> None:
    """Raise Undecided for parts of stacked weights that no node reads by themselves: experts in one operator."""
    parts = [step.weight for step in plan.steps if step.spec.region is not None]
    if parts:
        raise Undecided(
            "the graph by itself shows no reference for parts of weights that one node reads as a whole: "
            f"{first_of(parts, 1)}. Prove it against PyTorch ({named('model')})"
        )


def at_strength(plan: Plan, factor: float) -> Plan:
    """The plan with every scale and every change of a bias times `factor`.

    Whole tensors have no strength. At 0 only they stay, and where a plan has nothing else, the base stays.
    """
    if factor:
        return replace(plan, steps=tuple(_scaled(step, factor) for step in plan.steps))
    whole = [step for step in plan.steps if step.has_own_values] if plan.low_rank else []
    return replace(plan, steps=tuple(replace(step, terms=(), shift=None) for step in whole))


def _scaled(step: Step, factor: float) -> Step:
    terms = tuple(replace(term, strength=term.strength * factor) for term in step.terms)
    shift = None if step.shift is None else step.shift * np.float32(factor)
    return replace(step, terms=terms, shift=shift)


def _can_have_branch(model: ir.Model, step: Step, sites: Sites) -> bool:
    if not step.terms or step.needs_weight or step.replace is not None or model.opset_imports.get("", 0) < MIN_OPSET:
        return False
    is_embedding, own_sites = step.terms[0].pair.embedding, sites.by_name[step.weight]
    is_grouped = any(site.is_convolution and site.node.attributes.get_int("group", 1) > 1 for site in own_sites)
    return not is_grouped and not any(branch_obstacle(site, is_embedding=is_embedding) for site in own_sites)


# --- x·ΔW beside a quantised weight ---


def _delta_branch(factory: NodeFactory, step: Step, site: Site) -> BranchNodes:
    """x·ΔW with ΔW as one matrix."""
    path = f"/{module_of(step.weight)}"
    nodes, delta = _delta(factory, step, site)  # (in, out), or the rows of a table
    if step.terms[0].pair.embedding:
        ids = site.node.inputs[1]
        assert ids is not None
        product = factory.node("Gather", [delta, ids], path)
    else:
        x = site.node.inputs[0]
        assert x is not None
        operator = site.node.op_type if site.node.op_type == "Gemm" else "MatMul"
        product = factory.node(operator, [x, delta], path, None, _gemm_attributes(site.node))
    return BranchNodes([*nodes, product], product.outputs[0], path)


def _delta(factory: NodeFactory, step: Step, site: Site) -> tuple[list[ir.Node], ir.Value]:
    """ΔW as (in, out), in the dtype in which the site computes, and the nodes that compute it."""
    dtype = np.dtype(site.dtype)
    if step.magnitude is not None:
        before = (site.array.T if site.layout is Layout.EMBEDDING else site.matrix).astype(np.float64)
        delta = _with_neighbours(site, _dora_sum(step, before) - before)
        return [], _initializer(factory, step, "change", delta.T.astype(dtype))
    b, a = _factors(step)
    b = _with_neighbours(site, b)
    factors = [_initializer(factory, step, part, array.T.astype(dtype)) for part, array in (("A", a), ("B", b))]
    node = factory.node("MatMul", factors, f"/{step.weight}", ir.Shape([a.shape[1], b.shape[0]]))
    return [node], node.outputs[0]


def _dora_sum(step: Step, before: Wide) -> Wide:
    """m / ‖W + ΔW‖ · (W + ΔW) of a weight (out, in)."""
    assert step.magnitude is not None
    b, a = _factors(step)
    total: Wide = before + b @ a
    total *= step.magnitude[:, None] / np.linalg.norm(total, axis=1, keepdims=True)
    return total


def _gemm_attributes(node: ir.Node) -> dict[str, int | float]:
    """The attributes of a Gemm that change its input and its product."""
    if node.op_type != "Gemm":
        return {}
    return {"transA": node.attributes.get_int("transA", 0), "alpha": node.attributes.get_float("alpha", 1.0)}


# --- factors ---


def _factors(step: Step) -> tuple[Wide, Wide]:
    """All pairs of a step as one, exactly: B (out, ranks) times the scales, and A (ranks, in * kernel)."""
    scaled = [(term.pair, np.float64(term.scale)) for term in step.terms]
    b = [pair.b.reshape(-1, pair.rank).astype(np.float64) * scale for pair, scale in scaled]
    a = [pair.a.reshape(pair.rank, -1).astype(np.float64) for pair, _ in scaled]
    return np.concatenate(b, axis=1), np.concatenate(a)


def _with_neighbours(site: Site, rows: Wide) -> Wide:
    """One row for each output of the stored matrix: `rows` for the site's block, zeros for its neighbours."""
    if (block := site.block) is None:
        return rows
    wide = np.zeros((_stored_outputs(site), rows.shape[1]))
    wide[block.start : block.stop] = rows
    return wide


def _stored_outputs(site: Site) -> int:
    """Output features of the stored matrix, neighbouring blocks included."""
    shape = site.quantised.shape if site.quantised is not None else tuple(map(int, site.tensor.shape.numpy()))
    return shape[1 if site.layout is Layout.IN_OUT else 0]


def _initializer(factory: NodeFactory, step: Step, part: str, array: NDArray[Any]) -> ir.Value:
    name = unused_name(f"{step.weight}.reference.{part}", factory.value_names)
    return new_initializer(factory.model, name, ir.Tensor(np.ascontiguousarray(array)))


# --- W + ΔW at a weight ---


class _DequantisedProducts:
    """The MatMuls that replace MatMulNBits nodes. All weights that are packed in one node share one MatMul."""

    def __init__(self, model: ir.Model):
        self.model = model
        self.by_node: dict[ir.Node, ir.Node | None] = {}

    def of(self, site: Site) -> ir.Node | None:
        """The MatMul that replaces a site's node. None where the node stays."""
        if site.quantised is not None and site.node not in self.by_node:
            self.by_node[site.node] = dequantise(self.model, site.node)
        return self.by_node.get(site.node)


class _WeightSum:
    """W + ΔW for one reader of a weight, as nodes before the reader."""

    def __init__(
        self,
        factory: NodeFactory,
        step: Step,
        site: Site,
        product: ir.Node | None,
        *,
        rounded: bool,
        record: list[RecordedConstant] | None,
    ):
        self.factory, self.step, self.site, self.rounded, self.record = factory, step, site, rounded, record
        self.node = product or site.node
        self.index, self.layout = (1, Layout.IN_OUT) if product is not None else self._input_and_layout()

    def _input_and_layout(self) -> tuple[int, Layout]:
        """The node's input that reads the weight, and the layout of the weight there."""
        layout = self._stored_layout
        return self.site.index, transposed_layout(layout) if self.site.behind_transpose else layout

    @property
    def _stored_layout(self) -> Layout:
        return self.step.spec.layout if self.site.layout is Layout.OTHER else self.site.layout

    @property
    def is_transposed(self) -> bool:
        return self.layout.is_transposed

    def insert(self) -> None:
        """Insert the nodes, and let the reader read their sum."""
        before = self.node.inputs[self.index]
        assert before is not None
        dtype = ir.DataType.from_numpy(np.dtype(self.site.dtype))
        is_half = self.site.dtype in HALF_PRECISION
        value = self._whole() if self.step.has_own_values else before
        value = self._cast(value, ir.DataType.FLOAT) if is_half else value
        if self.step.needs_weight:
            value = self._transformed(self.step.terms[0])
        elif self.step.terms:
            value = self._with_pairs(value)
        elif self.step.shift is not None:
            value = self._add("Add", value, self._constant("shift", self.step.shift))
        if is_half:
            value = self._cast(value, dtype)
            if self.rounded:
                producer = value.producer()
                assert producer is not None
                producer.metadata_props[KEEPS_ROUNDING] = "once"
        value.shape = value.shape or before.shape
        self.node.replace_input_with(self.index, value)

    def _whole(self) -> ir.Value:
        """The tensor that replaces the weight, or the weight with rows of the adapter, in the layout at the reader."""
        stored, _ = self._with_own_values(np.dtype(self.site.dtype))
        return self._constant("whole", self._at_reader(stored))

    def _transformed(self, term: Term) -> ir.Value:
        """The weight that follows from the graph's own, or from what replaces it, computed in fp64 beside the graph."""
        assert isinstance(term.pair, WeightTransform)
        stored, own = self._with_own_values(np.dtype(np.float64))
        before, view = stored.copy(), own.T if self.step.spec.layout.is_transposed else own
        view += term.strength * exact_change(term.pair, view)[0]
        value = self._constant(TRANSFORMED, self._at_reader(stored))
        if self.record is not None:
            self.record[-1] = self.record[-1]._replace(base=self._at_reader(before))
        return value

    def _with_own_values(self, dtype: np.dtype[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """A copy of the stored array with what the adapter has in place of it, and the weight's entries as a view.

        The view has the layout of the step.
        """
        step, stored = self.step, np.array(self.site.stored_array, dtype)
        own = stored if self.site.block is None else stored[self.site.block_slices]
        own = own.T if self._stored_layout.is_transposed != step.spec.layout.is_transposed else own
        if step.replace is not None:
            own[...] = step.replace
        if step.token_rows is not None:
            step.token_rows.write_into(own)
        return stored, own

    def _at_reader(self, stored: NDArray[Any]) -> NDArray[Any]:
        return stored.T if self._stored_layout.is_transposed != self.is_transposed else stored

    def _with_pairs(self, weight: ir.Value) -> ir.Value:
        b, a = _factors(self.step)
        b = _with_neighbours(self.site, b)
        factors = {"A": a.T, "B": b.T} if self.is_transposed else {"B": b, "A": a}
        delta = self._add("MatMul", *(self._constant(part, factor) for part, factor in factors.items()))
        kernel = self.step.terms[0].pair.a.shape[2:]
        if not kernel:
            return self._with_dora(self._add("Add", weight, delta))
        shape = self._constant("shape", np.array(self.step.terms[0].pair.shape, np.int64))
        flat = self._constant("flat", np.array([b.shape[0], -1], np.int64))
        total = self._add("Add", self._add("Reshape", weight, flat), delta)
        return self._add("Reshape", self._with_dora(total), shape)

    def _with_dora(self, total: ir.Value) -> ir.Value:
        """The sum with each output scaled to the norm m. A product with ones is a sum in every opset."""
        magnitude = self.step.magnitude
        if magnitude is None:
            return total
        inner = math.prod(self.step.terms[0].pair.shape[1:])
        squares = self._add("Mul", total, total)
        ones = self._constant("ones", np.ones((1, inner) if self.is_transposed else (inner, 1), np.float32))
        sums = self._add("MatMul", *((ones, squares) if self.is_transposed else (squares, ones)))
        if self.site.block is None:
            norms = self._constant("magnitude", self._by_output(magnitude))
            return self._add("Mul", total, self._add("Div", norms, self._add("Sqrt", sums)))
        return self._add("Mul", total, self._block_factors(sums, magnitude, self.site.block))

    def _block_factors(self, sums: ir.Value, magnitude: NDArray[np.float32], block: range) -> ir.Value:
        """m / √sums for the outputs of the block, 1 for its neighbours."""
        outputs = _stored_outputs(self.site)
        own, neighbours = np.zeros(outputs, np.float32), np.ones(outputs, np.float32)
        own[block.start : block.stop], neighbours[block.start : block.stop] = magnitude, 0
        norms = self._constant("magnitude", self._by_output(own))
        is_neighbour = self._constant("kept", self._by_output(neighbours))
        factors = self._add("Div", norms, self._add("Sqrt", self._add("Add", sums, is_neighbour)))
        return self._add("Add", factors, is_neighbour)

    def _by_output(self, numbers: NDArray[np.float32]) -> NDArray[np.float32]:
        """One number for each output, in a shape that broadcasts over the weight."""
        return numbers.reshape((1, -1) if self.is_transposed else (-1, 1))

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        cast = self._add("Cast", value, to=int(dtype))
        cast.type = ir.TensorType(dtype)
        return cast

    def _constant(self, part: str, array: NDArray[Any]) -> ir.Value:
        """An initializer. fp64 numbers are rounded to fp32 when the graph runs, and not at all in a widened graph."""
        value = _initializer(self.factory, self.step, part, array)
        if self.record is not None and part in PAIR_PARTS:
            self.record.append(RecordedConstant(self.step, self.site, part, value, array, self.is_transposed))
        return self._cast(value, ir.DataType.FLOAT) if array.dtype == np.float64 else value

    def _add(self, op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        """Add a node before the reader. Returns its output."""
        node = self.factory.node(op_type, inputs, f"/{self.step.weight}/reference", None, attributes)
        graph = self.node.graph
        assert graph is not None
        graph.insert_before(self.node, node)
        return node.outputs[0]
