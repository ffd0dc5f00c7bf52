"""Mode `nodes`: the adapters as nodes of the graph. x·Aᵀ·(s·B)ᵀ is added to the product of the layer.

LoKr's two factors, and factors of a layer's inputs, are branches of their own forms.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.graph.find_sites import Sites
from lora_export.graph.insert.activation import ActiveTokens
from lora_export.graph.insert.adapter_names import DORA_FACTOR, LOKR_W1, LOKR_W2, LORA_A, LORA_B, SCALE, module_of
from lora_export.graph.insert.adapter_strengths import StrengthInput, refuse_steps_without_strength
from lora_export.graph.insert.branches import (
    BranchNodes,
    Inserter,
    Rescaling,
    common_rescaling,
    gemm_attributes,
    low_rank_branch,
    site_dora_factors,
)
from lora_export.graph.insert.node_factory import (
    MIN_OPSET,
    Factor,
    NodeFactory,
    NodeList,
    fixed_sizes,
    layer_input,
    sizes_of,
)
from lora_export.graph.merge.fold import change_weights
from lora_export.graph.refusals import refuse_steps_without_branch
from lora_export.graph.site import Site, common_dtype
from lora_export.lora import Scaling
from lora_export.pairs.structured import KroneckerPair
from lora_export.plan import Plan, Step, Term
from lora_export.weights.merge_report import StepResult


def kronecker_branch(factory: NodeFactory, site: Site, w1: Factor, w2: Factor) -> BranchNodes:
    """x·kron(w1, w2)ᵀ, for w1 (a, b) and the transpose of w2 (d, c): x (..., b d) as (..., b, d) by both.

    Raises InputRefused where x is transposed, or where its number of dimensions is unknown.
    """
    nodes, x = NodeList(factory, w2.path), layer_input(site)
    w1, w2 = (nodes.cast_to_site(site, each) for each in (w1, w2))
    (a, b), (d, c) = (fixed_sizes(each.value, 0, 1) for each in (w1, w2))
    if x.shape is None or site.block is not None or gemm_attributes(site.node)[0]:
        raise InputRefused(
            f"{site.name}: LoKr's factors cannot be beside {site.node.op_type}: its input has an unknown shape, or is "
            "transposed, or the weight is stored beside others. Merge the adapter into the weights instead"
        )
    others = sizes_of(x)[:-1]
    kept = [0] * len(others)  # for Reshape: as in x

    def shape(name: str, *last: int) -> ir.Value:
        return factory.constant(nodes.path, name, np.array([*kept, *last], np.int64))

    split = nodes.add("Reshape", [x, shape("split", b, d)], [*others, b, d])
    half = nodes.add("MatMul", [split, w2.value], [*others, b, c])
    nodes.path = w1.path
    whole = nodes.add("MatMul", [w1.value, half], [*others, a, c])
    joined = nodes.add("Reshape", [whole, shape("joined", -1)], [*others, site.node_outputs])
    for_b = gemm_attributes(site.node)[1]
    if for_b:
        alpha = factory.constant(w1.path, "alpha", np.array(for_b["alpha"], np.dtype(site.dtype)))
        joined = nodes.add("Mul", [joined, alpha], joined.shape)
    return BranchNodes(nodes.nodes, joined, w1.path)


def kronecker_convolution(factory: NodeFactory, site: Site, w1: Factor, w2: Factor) -> BranchNodes:
    """A convolution by kron(w1, w2), for w1 (a, b) and w2 (c, d, kernel).

    x (batch, b d, ...) is (batch b, d, ...) for w2, and what comes of it (batch, b, c ...) for w1.
    """
    factory.require_opset(MIN_OPSET, "LoKr beside a convolution")
    nodes, x = NodeList(factory, w2.path), layer_input(site)
    w1, w2 = (nodes.cast_to_site(site, each) for each in (w1, w2))
    (a, b), (c, d) = (fixed_sizes(each.value, 0, 1) for each in (w1, w2))
    dimensions = len(site.shape)

    def reshaped(value: ir.Value, name: str, *sizes: int | ir.Value) -> ir.Value:
        parts = [
            factory.constant(nodes.path, name, np.array([size], np.int64)) if isinstance(size, int) else size
            for size in sizes
        ]
        return nodes.add("Reshape", [value, nodes.add("Concat", parts, None, ir.DataType.INT64, axis=0)], None)

    def sizes_from(value: ir.Value, first: int, last: int) -> ir.Value:
        shape = nodes.add("Shape", [value], [dimensions], ir.DataType.INT64)
        ends = (factory.constant(nodes.path, "sizes", np.array([end], np.int64)) for end in (first, last))
        return nodes.add("Slice", [shape, *ends], [last - first])

    batch, places = sizes_from(x, 0, 1), sizes_from(x, 2, dimensions)
    split = reshaped(x, "split", -1, d, places)
    half = nodes.add("Conv", [split, w2.value], None, None, site.node.attributes)
    new_places = sizes_from(half, 2, dimensions)
    grouped = reshaped(half, "grouped", batch, b, -1)
    nodes.path = w1.path
    whole = nodes.add("MatMul", [w1.value, grouped], None)
    joined = reshaped(whole, "joined", batch, a * c, new_places)
    joined.shape = site.node.outputs[0].shape
    return BranchNodes(nodes.nodes, joined, w1.path)


def scaled_input(factory: NodeFactory, site: Site, factor: Factor) -> tuple[NodeList, ir.Value]:
    """x times one factor (in,) of all rows; of a convolution, (in, 1...)."""
    nodes = NodeList(factory, factor.path)
    value, x = nodes.cast_to_site(site, factor).value, layer_input(site)
    if gemm_attributes(site.node)[0]:  # x is transposed
        value = nodes.add("Unsqueeze", [value, factory.constant(factor.path, "axis", np.array([1]))], None)
    return nodes, nodes.add("Mul", [x, value], x.shape)


def insert_nodes(model: ir.Model, sites: Sites, plan: Plan, *, strength_input: bool = False) -> list[StepResult]:
    """Insert every pair of the plan beside its layer, in memory. Returns statistics of the biases that changed.

    A linear layer gains a MatMul by A (in, r), a MatMul by B (r, out) and an Add to its product, before any other node
    reads it. B contains the scale. A and B have the weight's dtype. They are named `X.lora_A.weight` and
    `X.lora_B.weight`, where X is the module; with several adapters `X.lora_A.NAME.weight`.

    - An embedding's branch looks up rows of A (num, r), as the layer does in its own table.
    - A convolution's branch is a convolution by A (r, in, kernel) and one by B (out, r, 1...).
    - With DoRA, the sum is multiplied by `X.lora_magnitude_vector.weight`, m / ‖W + sBA‖ (out,), before the bias is
      added. It is computed here once.
    - Where several weights are packed side by side in one matrix, each has its own A and B. Their products are
      concatenated and added once. Outputs of a weight without an adapter gain zeros.
    - Several adapters of one weight are one product, with their ranks concatenated.
    - A fused operator (onnxruntime's Attention) reads W + A·B.
    - A change that only scales the layer's outputs or inputs (IA3) multiplies the product or the input by
      `X.ia3_l.weight`, (out,) or (in,).
    - LoKr's kron(w1, w2) is a product by w2ᵀ and one by w1, where these cost less than the weight: `X.lokr_w1.weight`
      (a, b) and `X.lokr_w2.weight` (d, c); of a convolution (c, d, kernel).
    - x·A of an adapter that acts on some tokens only (aLoRA) is multiplied by 0 at all others: see `ActiveTokens`.
    - The base's weights keep their bytes, quantised ones too. Whole tensors and bias changes are merged.
    - With `strength_input`, each change is multiplied by the strength of its adapter, which is an input of the graph
      (see `StrengthInput`).

    `sites` is invalid afterwards. Raises InputRefused where a weight has a reader beside which no branch can be
    inserted, where the graph contains such branches already, where DoRA or a packed weight needs opset 11, and as
    `fold_graph` does. The graph is then partly changed and must not be used.
    """
    refuse_steps_without_branch(plan)
    if strength_input:
        refuse_steps_without_strength(plan)
    # First, because the insertion of branches moves biases.
    merged = change_weights(model, sites, [step for step in plan.steps if not step.terms or step.is_vector])
    change_weights(model, sites, [replace(step, terms=()) for step in plan.low_rank if step.replace is not None])
    inserter, names = Inserter(model), [adapter.name for adapter in plan.adapters]
    strengths = StrengthInput(model, inserter.factory, names) if strength_input else None
    active = ActiveTokens(inserter.factory, plan)
    for step in (step for step in plan.low_rank if not step.is_vector):
        _NodesOfStep(inserter, step, strengths, active, is_alone=len(names) == 1).insert(sites)
    inserter.finish()
    return merged


class _NodesOfStep:
    """The nodes of one step: its pairs, or the factors of its inputs or outputs."""

    def __init__(
        self, inserter: Inserter, step: Step, strengths: StrengthInput | None, active: ActiveTokens, *, is_alone: bool
    ):
        self.inserter, self.step, self.strengths, self.is_alone = inserter, step, strengths, is_alone
        self.active = active
        self.factory, self.module = inserter.factory, module_of(step.weight)
        self.dora_by_content: dict[bytes, Factor] = {}
        self.dora_by_holder: dict[tuple[ir.Value | ir.Node, range | None], Factor] = {}

    def insert(self, sites: Sites) -> None:
        step = self.step
        if step.scaling is not None:
            self._scale(step.scaling, self.inserter.sites_of(step.weight, sites))
            return
        is_embedding = step.terms[0].pair.embedding
        products = [term for term in step.terms if isinstance(term.pair, KroneckerPair) and term.pair.is_cheap]
        activated = [term for term in step.terms if self.active.acts_on_some(term.adapter)]
        own_sites = self.inserter.sites_of(
            step.weight, sites, is_embedding=is_embedding, allow_changed_weight=not (products or activated)
        )
        for term in products:
            self._insert_kronecker(term, own_sites)
        for term in activated:
            self._insert_activated(term, own_sites)
        terms = [term for term in step.terms if term not in (*products, *activated)]
        dtype = common_dtype(own_sites)
        pairs = [self._pair(term, dtype) for term in terms]
        for site in own_sites if terms else ():
            self.inserter.insert(site, pairs, self._rescaling(site, dtype))

    def _factor(self, part: str, adapter: str, array: NDArray[Any]) -> Factor:
        """A factor as an initializer, with the name of its adapter where there are several."""
        label = "" if self.is_alone else f".{adapter}"
        return self.factory.factor(self.module, f"{part}{label}", array)

    def _scale(self, scaling: Scaling, sites: Sequence[Site]) -> None:
        """Multiply the inputs or the products of a layer by factors."""
        kernel, adapter = [1] * (len(sites[0].shape) - 2), self.step.terms[0].adapter
        factor = self._factor(SCALE, adapter, scaling.factors.reshape(-1, *kernel).astype(common_dtype(sites)))
        factor = self.strengths.blended(factor, adapter) if self.strengths else factor
        for site in sites:
            if scaling.of_inputs:
                self.inserter.scale_input(site, *scaled_input(self.factory, site, factor))
            else:
                self.inserter.insert_beside(site, None, common_rescaling(self.factory, site, factor))

    def _insert_kronecker(self, term: Term, sites: Sequence[Site]) -> None:
        """Insert the two factors of LoKr, the scale in the second one, which is stored transposed beside a matrix."""
        pair, dtype = term.pair, np.dtype(common_dtype(sites))
        assert isinstance(pair, KroneckerPair)
        kernel = pair.shape[2:]
        own = pair.w2.reshape(len(pair.w2), -1, *kernel) if kernel else pair.w2.T
        with np.errstate(over="ignore"):  # NodeFactory.factor checks the result
            arrays = {LOKR_W1: pair.w1.astype(dtype), LOKR_W2: (own * np.float32(term.scale)).astype(dtype)}
        w1, w2 = (self._factor(name, term.adapter, array) for name, array in arrays.items())
        w2 = self.strengths.times(w2, term.adapter) if self.strengths else w2
        for site in sites:
            inserted = kronecker_convolution if site.is_convolution else kronecker_branch
            branch = inserted(self.factory, site, w1, w2)
            self.inserter.insert_beside(site, lambda _, branch=branch: branch)  # type: ignore[misc]

    def _insert_activated(self, term: Term, sites: Sequence[Site]) -> None:
        """Insert a pair that acts on some tokens only."""
        pair = self._pair(term, common_dtype(sites))
        for site in sites:
            if site.block is not None and len(self.step.terms) > 1:
                raise InputRefused(
                    f"{site.name} is stored beside other weights in one matrix, and an activated LoRA is the only "
                    "adapter that such a weight can have"
                )
            gate = self.active.gate(site, term.adapter)
            branch = functools.partial(low_rank_branch, self.factory, site, [pair], gate=gate)
            self.inserter.insert_beside(site, branch)

    def _pair(self, term: Term, dtype: str) -> tuple[Factor, Factor]:
        """A and s·B as initializers, in the common dtype of the weight's readers; B times its strength, if any."""
        with np.errstate(over="ignore"):  # NodeFactory.factor checks the result
            arrays = [factor.astype(dtype) for factor in term.factors]
        parts = zip((LORA_A, LORA_B), arrays, strict=True)
        a, b = (self._factor(part, term.adapter, array) for part, array in parts)
        return a, self.strengths.times(b, term.adapter) if self.strengths else b

    def _rescaling(self, site: Site, dtype: str) -> Rescaling | None:
        """The multiplication by m / ‖W + sBA‖ of the site's weight, one factor for each that differs. None without."""
        if self.step.magnitude is None:
            return None
        holder = site.holder, site.block
        if holder not in self.dora_by_holder:
            with np.errstate(over="ignore"):  # NodeFactory.factor checks the result
                array = site_dora_factors(self.step, site).astype(dtype)
            if (content := array.tobytes()) not in self.dora_by_content:
                adapter = self.step.terms[0].adapter
                self.dora_by_content[content] = self._factor(DORA_FACTOR, adapter, array)
            self.dora_by_holder[holder] = self.dora_by_content[content]
        return common_rescaling(self.factory, site, self.dora_by_holder[holder])
