"""A plan beside a graph's weights: x·Aᵀ·(s·B)ᵀ as nodes of their own, added to what the layer computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.graph.fold import change_weight, refuse_what_no_branch_can_do
from lora_export.graph.insert.dora import length_factor
from lora_export.graph.insert.inserter import Factor, Inserter, Rescaling, module_of
from lora_export.graph.readers import common_dtype
from lora_export.graph.sites import Site, Sites
from lora_export.plan import Plan, Step, Term
from lora_export.weights.merge_report import StepResult


def branch(model: ir.Model, sites: Sites, plan: Plan) -> list[StepResult]:
    """Put every pair of the plan beside its layer, in memory; returns what became of the biases that changed.

    A layer gains MatMul by A (in, r), MatMul by B (r, out) and an Add to its product, before anything
    reads it. The scale lies in B; A and B have the weight's dtype and are called `X.lora_A.weight` and
    `X.lora_B.weight`, X being the module, or `X.lora_A.NAME.weight` where there are several adapters.
    An embedding's branch looks up rows of A (num, r) as the layer looks up its own; a convolution's is
    a convolution by A (r, in, kernel) and one by B (out, r, 1...). DoRA's sum is multiplied by
    `X.lora_magnitude_vector.weight`, m / ‖W + sBA‖ (out,), computed here once, before the bias is
    added. Where several weights lie side by side in one matrix, each has its own A and B, whose products
    are laid side by side (Concat) and added once; outputs of a weight without an adapter gain zeros. Several
    adapters of one weight are one product, their ranks side by side. What multiplies and does more in one
    (onnxruntime's Attention) reads W + A·B. The base's weights keep their bytes, quantised ones too. Whole
    tensors and bias shifts are folded in. `sites` does not describe the graph any more then.

    Raises InputRefused where a weight is also read by something that is no layer of its kind, where the
    graph holds such branches already, where its opset is below 11 for DoRA or a block, and as `fold`
    does; throw the graph away then.
    """
    refuse_what_no_branch_can_do(plan)
    # First, while every bias is still where `sites` says.
    folded = [change_weight(model, sites, step) for step in plan.steps if not step.terms]
    inserter, several = Inserter(model), len(plan.adapters) > 1
    for step in plan.low_rank:
        there = inserter.places(step.weight, sites, embedding=step.terms[0].pair.embedding, in_place=True)
        pairs = [_pair(inserter, step, term, there, _label(term, several=several)) for term in step.terms]
        lengths = _Lengths(inserter, step, common_dtype(there), _label(step.terms[0], several=several))
        for site in there:
            inserter.put(site, pairs, lengths.of(site))
    inserter.finish()
    return [result for result in folded if result is not None]


def _label(term: Term, *, several: bool) -> str:
    return f".{term.adapter}" if several else ""


def _pair(inserter: Inserter, step: Step, term: Term, there: Sequence[Site], label: str) -> tuple[Factor, Factor]:
    """A and s·B, as `Term.factors` has them, as initializers in the dtype of the weight's readers."""
    module, dtype = module_of(step.weight), np.dtype(common_dtype(there))
    with np.errstate(over="ignore"):  # looked for where it is stored
        a, b = (side.astype(dtype) for side in term.factors)
    return inserter.factor(module, f"lora_A{label}", a), inserter.factor(module, f"lora_B{label}", b)


class _Lengths:
    """What DoRA multiplies each output of a step's weight by, as initializers: one for each weight that differs."""

    def __init__(self, inserter: Inserter, step: Step, dtype: str, label: str):
        self.inserter, self.step, self.dtype, self.label = inserter, step, dtype, label
        self.made: list[tuple[NDArray[Any], Factor]] = []
        self.by_holder: dict[tuple[ir.Value | ir.Node, range | None], Factor] = {}

    def of(self, site: Site) -> Rescaling | None:
        """The multiplication by m / ‖W + sBA‖, for the weight that is read there; None without DoRA."""
        if self.step.magnitude is None:
            return None
        holder = site.holder, site.block
        if holder not in self.by_holder:
            with np.errstate(over="ignore"):  # looked for where it is stored
                self.by_holder[holder] = self._stored(length_factor(self.step, site).astype(self.dtype))
        return self.inserter.rescaling(site, self.by_holder[holder])

    def _stored(self, array: NDArray[Any]) -> Factor:
        for other, factor in self.made:
            if np.array_equal(other, array):
                return factor
        factor = self.inserter.factor(module_of(self.step.weight), f"lora_magnitude_vector{self.label}", array)
        self.made.append((array, factor))
        return factor
