"""A plan beside a graph's weights: x·Aᵀ·(s·B)ᵀ as nodes of their own, added to what the layer computes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.graph.fold import change_weight, new_initializer, refuse_overflow, refuse_what_a_graph_cannot_take
from lora_export.graph.sites import Site, Sites, unused, value_names
from lora_export.ledger import StepResult
from lora_export.plan import Plan, Step, Term

Attributes = Mapping[str, int | float]
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
    refuse_what_a_graph_cannot_take(plan)
    weaver = _Weaver(model, several=len(plan.adapters) > 1)
    results = []
    for step in plan.steps:
        if step.terms:
            weaver.weave(step, sites.by_name[step.weight])
        elif (result := change_weight(model, sites, step)) is not None:
            results.append(result)
    return results


class _Factor(NamedTuple):
    value: ir.Value
    path: str  # the beginning of its nodes' names


class _Weaver:
    """Adds nodes and initializers to a graph under names that are free."""

    def __init__(self, model: ir.Model, *, several: bool):
        self.model, self.several = model, several
        self.values = value_names(model)
        self.nodes = {node.name for node in ir.traversal.RecursiveGraphIterator(model.graph) if node.name}
        self.old = frozenset(self.values)

    def weave(self, step: Step, sites: tuple[Site, ...]) -> None:
        """Put the step's branches beside each place that reads its weight."""
        strangers = sorted({site.obstacle for site in sites if site.obstacle})
        if strangers:
            raise InputRefused(
                f"{step.weight} is read by {', '.join(strangers)}, beside which no branch can stand. Merge the "
                "adapter into the weights instead"
            )
        module = re.sub(r"(^|\.)(in_proj_)?weight$", "", step.weight)
        pairs = [self._pair(module, term, np.dtype(sites[0].dtype)) for term in step.terms]
        for site in sites:
            self._stand_beside(site, pairs)

    def _pair(self, module: str, term: Term, dtype: np.dtype[Any]) -> tuple[_Factor, _Factor]:
        """A (in, r) and s·B (r, out) as initializers in the weight's dtype."""
        label = f".{term.adapter}" if self.several else ""
        scale = np.float32(term.strength * term.pair.scale)
        with np.errstate(over="ignore"):  # looked for where it is stored
            a, b = term.pair.a.T.astype(dtype), (term.pair.b.T * scale).astype(dtype)
        return self._factor(module, f"lora_A{label}", a), self._factor(module, f"lora_B{label}", b)

    def _factor(self, module: str, part: str, array: NDArray[Any]) -> _Factor:
        parts = [part for part in (module, part) if part]
        name = ".".join([*parts, "weight"])
        if name in self.old:
            raise InputRefused(
                f"the graph holds {name} already: an adapter stands beside its weights. Start from the graph without it"
            )
        refuse_overflow(name, array)
        value = new_initializer(self.model, unused(name, self.values), np.ascontiguousarray(array))
        return _Factor(value, "/".join(["", *parts]))

    def _stand_beside(self, site: Site, pairs: list[tuple[_Factor, _Factor]]) -> None:
        x, product = site.node.inputs[0], site.node.outputs[0]
        assert x is not None and site.node.graph is not None
        turned, amplified = _attributes(site.node)
        uses = product.uses()
        added: list[ir.Node] = []
        total = product
        for a, b in pairs:
            down = self._multiply(x, a, turned)
            up = self._multiply(down.outputs[0], b, amplified)
            add = self._node("Add", [total, up.outputs[0]], b.path, product.shape)
            added += [down, up, add]
            total = add.outputs[0]
        site.node.graph.insert_after(site.node, added)
        for node, index in uses:
            node.replace_input_with(index, total)
        for graph in self.model.graphs():
            for index, output in enumerate(graph.outputs):
                if output is product:  # the graph's output keeps its name
                    total.name, product.name = product.name, total.name
                    graph.outputs[index] = total

    def _multiply(self, x: ir.Value, factor: _Factor, attributes: Attributes) -> ir.Node:
        assert factor.value.shape is not None
        known = x.shape is not None and "transA" not in attributes
        shape = ir.Shape([*x.shape[:-1], factor.value.shape[-1]]) if known and x.shape is not None else None
        return self._node("Gemm" if attributes else "MatMul", [x, factor.value], factor.path, shape, attributes)

    def _node(
        self, op_type: str, inputs: list[ir.Value], path: str, shape: ir.Shape | None, attributes: Attributes = NONE
    ) -> ir.Node:
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
