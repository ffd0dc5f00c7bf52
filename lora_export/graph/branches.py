"""A plan beside a graph's weights: x·Aᵀ·(s·B)ᵀ as nodes of their own, added to what the layer computes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.graph.fold import change_weight, new_initializer, refuse_overflow, refuse_what_a_graph_cannot_take
from lora_export.graph.sites import Site, Sites, unused, value_names
from lora_export.ledger import StepResult
from lora_export.plan import Plan, Step, Term


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


class _Weaver:
    """Adds nodes and initializers to a graph under names that are free."""

    def __init__(self, model: ir.Model, *, several: bool):
        self.model, self.several = model, several
        self.values = value_names(model)
        self.nodes = {node.name for node in ir.traversal.RecursiveGraphIterator(model.graph) if node.name}
        self.old = frozenset(self.values)

    def weave(self, step: Step, sites: tuple[Site, ...]) -> None:
        """Put the step's branches beside each place that reads its weight."""
        strangers = sorted({site.node.op_type for site in sites if not site.is_linear})
        if strangers:
            raise InputRefused(
                f"{step.weight} is also read by {', '.join(strangers)}, beside which no branch can stand. Merge the "
                "adapter into the weights instead"
            )
        module = re.sub(r"(^|\.)(in_proj_)?weight$", "", step.weight)
        pairs = [self._factors(module, term, sites[0]) for term in step.terms]
        for site in sites:
            self._stand_beside(site, pairs)

    def _factors(self, module: str, term: Term, site: Site) -> tuple[ir.Value, ir.Value]:
        """A (in, r) and s·B (r, out) as initializers in the weight's dtype."""
        dtype = site.array.dtype
        with np.errstate(over="ignore"):
            scaled = term.pair.b.T * np.float32(term.strength * term.pair.scale)
        label = f".{term.adapter}" if self.several else ""
        prefix = f"{module}." if module else ""
        return (
            self._initializer(f"{prefix}lora_A{label}.weight", term.pair.a.T, dtype),
            self._initializer(f"{prefix}lora_B{label}.weight", scaled, dtype),
        )

    def _initializer(self, name: str, wide: NDArray[np.float32], dtype: np.dtype[Any]) -> ir.Value:
        if name in self.old:
            raise InputRefused(
                f"the graph holds {name} already: an adapter stands beside its weights. Start from the graph without it"
            )
        with np.errstate(over="ignore"):  # looked for on the next line
            array = np.ascontiguousarray(wide.astype(dtype))
        refuse_overflow(name, wide, array)
        return new_initializer(self.model, unused(name, self.values), array)

    def _stand_beside(self, site: Site, pairs: list[tuple[ir.Value, ir.Value]]) -> None:
        product = site.node.outputs[0]
        uses = product.uses()
        total = product
        added: list[ir.Node] = []
        for a, b in pairs:
            down = self._multiply(site, site.node.inputs[0], a, first=True)
            up = self._multiply(site, down.outputs[0], b, first=False)
            add = self._node("Add", [total, up.outputs[0]], f"{_path(b)}/Add", product.shape)
            added += [down, up, add]
            total = add.outputs[0]
        assert site.node.graph is not None
        site.node.graph.insert_after(site.node, added)
        for node, index in uses:
            node.replace_input_with(index, total)
        for graph in self.model.graphs():
            for index, output in enumerate(graph.outputs):
                if output is product:  # the graph's output keeps its name
                    total.name, product.name = product.name, total.name
                    graph.outputs[index] = total

    def _multiply(self, site: Site, x: ir.Value | None, factor: ir.Value, *, first: bool) -> ir.Node:
        """x · factor; a Gemm's transposed x is turned on the way in, its alpha multiplied on the way out."""
        assert x is not None and factor.shape is not None
        attributes: dict[str, int | float] = {}
        if site.node.op_type == "Gemm" and first and site.node.attributes.get_int("transA", 0) == 1:
            attributes = {"transA": 1}
        elif site.node.op_type == "Gemm" and not first and site.node.attributes.get_float("alpha", 1.0) != 1.0:
            attributes = {"alpha": site.node.attributes.get_float("alpha", 1.0)}
        op_type = "Gemm" if attributes else "MatMul"
        shape = None
        if x.shape is not None and "transA" not in attributes:
            shape = ir.Shape([*x.shape[:-1], factor.shape[-1]])
        return self._node(op_type, [x, factor], f"{_path(factor)}/{op_type}", shape, attributes)

    def _node(
        self,
        op_type: str,
        inputs: list[ir.Value],
        name: str,
        shape: ir.Shape | None,
        attributes: Mapping[str, int | float] | None = None,
    ) -> ir.Node:
        name = unused(name, self.nodes)
        output = ir.Value(name=unused(f"{name}_output_0", self.values), type=inputs[0].type, shape=shape)
        return ir.node(op_type, inputs, attributes, outputs=[output], name=name)


def _path(factor: ir.Value) -> str:
    """The beginning of a node's name: `/X/lora_A` for the factor `X.lora_A.weight`."""
    module, _, part = (factor.name or "").rpartition("lora_")
    return "/".join(["", *filter(None, [module.rstrip("."), f"lora_{part.removesuffix('.weight')}"])])
