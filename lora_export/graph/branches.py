"""A plan beside a graph's weights: x·Aᵀ·(s·B)ᵀ as nodes of their own, added to what the layer computes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.graph.fold import change_weight, new_initializer, refuse_overflow, refuse_what_no_branch_can_do
from lora_export.graph.sites import Site, Sites, unused, value_names
from lora_export.ledger import StepResult
from lora_export.plan import Plan, Term

Attributes = Mapping[str, int | float | Sequence[int]]
NONE: Attributes = MappingProxyType({})


def branch(model: ir.Model, sites: Sites, plan: Plan) -> list[StepResult]:
    """Put every pair of the plan beside its layer, in memory; returns what became of the biases that changed.

    A layer gains MatMul by A (in, r), MatMul by B (r, out) and an Add to its product, before anything
    reads it. The scale lies in B; A and B have the weight's dtype and are called `X.lora_A.weight` and
    `X.lora_B.weight`, X being the module, or `X.lora_A.NAME.weight` where there are several adapters.
    The base's weights keep their bytes. Whole tensors and bias shifts are folded in. `sites` does not
    describe the graph any more then.

    Raises InputRefused where a weight is also read by something that is no linear layer, where the
    graph holds such branches already, and as `fold` does; throw the graph away then.
    """
    refuse_what_no_branch_can_do(plan)
    weaver, several = Weaver(model), len(plan.adapters) > 1
    results = []
    for step in plan.steps:
        if step.terms:
            there = weaver.places(step.weight, sites)
            dtype = np.dtype(there[0].dtype)
            pairs = [_pair(weaver, module_of(step.weight), term, dtype, several=several) for term in step.terms]
            for site in there:
                weaver.stand_beside(site, [weaver.low_rank(site, a, b) for a, b in pairs])
        elif (result := change_weight(model, sites, step)) is not None:
            results.append(result)
    return results


def _pair(weaver: Weaver, module: str, term: Term, dtype: np.dtype[Any], *, several: bool) -> tuple[Factor, Factor]:
    """A (in, r) and s·B (r, out) as initializers in the weight's dtype."""
    label = f".{term.adapter}" if several else ""
    scale = np.float32(term.strength * term.pair.scale)
    with np.errstate(over="ignore"):  # looked for where it is stored
        a, b = term.pair.a.T.astype(dtype), (term.pair.b.T * scale).astype(dtype)
    return weaver.factor(module, f"lora_A{label}", a), weaver.factor(module, f"lora_B{label}", b)


def module_of(weight: str) -> str:
    """The module whose weight this is; empty where the weight is the whole model's."""
    return re.sub(r"(^|\.)(in_proj_)?weight$", "", weight)


class Factor(NamedTuple):
    """One side of a low-rank pair in a graph, and where it says it is."""

    value: ir.Value
    path: str  # the beginning of its nodes' names


class Branch(NamedTuple):
    """What will be added to a layer's product."""

    nodes: list[ir.Node]  # in the order in which they run
    product: ir.Value
    path: str


class Weaver:
    """Adds nodes and initializers to a graph under names that are free."""

    def __init__(self, model: ir.Model):
        self.model = model
        self.values = value_names(model)
        self.nodes = {node.name for node in ir.traversal.RecursiveGraphIterator(model.graph) if node.name}
        self.old = frozenset(self.values)

    def places(self, weight: str, sites: Sites) -> tuple[Site, ...]:
        """Where a weight is read. Raises InputRefused where no branch can stand beside one of its readers."""
        there = sites.by_name[weight]
        strangers = sorted({site.obstacle for site in there if site.obstacle})
        if strangers:
            raise InputRefused(
                f"{weight} is read by {', '.join(strangers)}, beside which no branch can stand. Merge the "
                "adapter into the weights instead"
            )
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

    def low_rank(self, site: Site, a: Factor, b: Factor) -> Branch:
        """x·A·B, as a site's own node would have it."""
        x = site.node.inputs[0]
        assert x is not None
        turned, amplified = _attributes(site.node)
        down = self._multiply(x, a, turned)
        up = self._multiply(down.outputs[0], b, amplified)
        return Branch([down, up], up.outputs[0], b.path)

    def stand_beside(self, site: Site, branches: Sequence[Branch]) -> None:
        """Add the branches to what a site's node computes, before anything reads it."""
        product = site.node.outputs[0]
        assert site.node.graph is not None
        uses = product.uses()
        added: list[ir.Node] = []
        total = product
        for branch in branches:
            add = self.node("Add", [total, branch.product], branch.path, product.shape)
            added += [*branch.nodes, add]
            total = add.outputs[0]
        site.node.graph.insert_after(site.node, added)
        for node, index in uses:
            node.replace_input_with(index, total)
        for graph in self.model.graphs():
            for index, output in enumerate(graph.outputs):
                if output is product:  # the graph's output keeps its name
                    total.name, product.name = product.name, total.name
                    graph.outputs[index] = total

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


def _attributes(node: ir.Node) -> tuple[Attributes, Attributes]:
    """What a Gemm does to its input and its product: its branch turns x on the way in, and has alpha on the way out."""
    if node.op_type != "Gemm":
        return NONE, NONE
    alpha = node.attributes.get_float("alpha", 1.0)
    turned = node.attributes.get_int("transA", 0) == 1
    return {"transA": 1} if turned else NONE, {"alpha": alpha} if alpha != 1 else NONE
