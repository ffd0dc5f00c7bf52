"""The nodes of a branch: x·A·B, computed beside a linear layer, an embedding or a convolution; and DoRA's factors.

With DoRA, each output is multiplied by m / ‖W + sBA‖, from the weights that the graph stores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export import sums
from lora_export.errors import InputRefused
from lora_export.graph.insert.node_factory import (
    MIN_OPSET,
    NO_ATTRIBUTES,
    Attributes,
    Factor,
    NodeFactory,
    NodeList,
    sizes_of,
)
from lora_export.graph.site import Site
from lora_export.plan import Layout, Step

OUTPUTS_AT_ONCE = 512  # outputs of a weight whose norms are computed in fp64 at a time

Pairs = Sequence[tuple[Factor, Factor]]  # A and B


class BranchNodes(NamedTuple):
    """The nodes that compute what is added to a layer's product."""

    nodes: list[ir.Node]  # in the order in which they run
    product: ir.Value
    path: str  # the prefix of their names


class Rescaling(NamedTuple):
    """The multiplication of a layer's product, branches included, by the factor of DoRA."""

    nodes: Callable[[ir.Value], list[ir.Node]]  # makes the nodes for a product; the last one has the result
    path: str


def low_rank_branch(factory: NodeFactory, site: Site, pairs: Pairs, outputs: range) -> BranchNodes:
    """x·A·B for these outputs of the site's node. For an embedding, x·A are the rows that it looks up in A."""
    nodes = NodeList(factory, pairs[0][0].path)
    a, b = concatenated(nodes, site, pairs)
    b = nodes.padded_to(site, b, outputs, 0.0)
    x, result = site.node.inputs[1 if site.is_lookup else 0], site.node.outputs[0]
    assert x is not None
    nodes.path = a.path
    if site.is_lookup:
        shape = None if x.shape is None else [*x.shape, sizes_of(a.value)[-1]]
        product = nodes.product(nodes.add("Gather", [a.value, x], shape), b)
    elif site.is_convolution:
        inner = result.shape and [result.shape[0], sizes_of(a.value)[0], *result.shape[2:]]
        down = nodes.add("Conv", [x, a.value], inner, None, site.node.attributes)
        nodes.path = b.path
        product = nodes.add("Conv", [down, b.value], result.shape)
    else:
        for_a, for_b = _gemm_attributes(site.node)
        product = nodes.product(nodes.product(x, a, for_a), b, for_b)
    return BranchNodes(nodes.nodes, product, b.path)


def concatenated(nodes: NodeList, site: Site, pairs: Pairs) -> tuple[Factor, Factor]:
    """All pairs as one pair in the site's dtype, their ranks concatenated."""
    rank_axes = (0, 1) if site.is_convolution else (1, 0)
    a, b = (
        _concatenated(nodes, [nodes.cast_to_site(site, factor) for factor in factors], axis)
        for factors, axis in zip(zip(*pairs, strict=True), rank_axes, strict=True)
    )
    return a, b


def _concatenated(nodes: NodeList, factors: Sequence[Factor], axis: int) -> Factor:
    if len(factors) == 1:
        return factors[0]
    shape = sizes_of(factors[0].value)
    shape[axis] = sum(factor.value.shape[axis] for factor in factors if factor.value.shape is not None)
    nodes.path = factors[0].path
    return factors[0]._replace(value=nodes.add("Concat", [each.value for each in factors], shape, axis=axis))


def common_rescaling(factory: NodeFactory, site: Site, factor: Factor) -> Rescaling:
    """The multiplication of all rows by one factor (out,); of a convolution, (out, 1...)."""
    factory.require_opset(MIN_OPSET, "DoRA beside its weights")
    before = NodeList(factory, factor.path)
    last = before.padded_to(site, factor, range(site.node_outputs), 1.0).value

    def nodes(total: ir.Value) -> list[ir.Node]:
        return [*before.nodes, factory.node("Mul", [total, last], factor.path, total.shape)]

    return Rescaling(nodes, factor.path)


def _gemm_attributes(node: ir.Node) -> tuple[Attributes, Attributes]:
    """The attributes of a branch beside a Gemm: its product by A transposes x, its product by B has alpha."""
    if node.op_type != "Gemm":
        return NO_ATTRIBUTES, NO_ATTRIBUTES
    alpha = node.attributes.get_float("alpha", 1.0)
    is_transposed = node.attributes.get_int("transA", 0) == 1
    for_a: Attributes = {"transA": 1} if is_transposed else NO_ATTRIBUTES
    for_b: Attributes = {"alpha": alpha} if alpha != 1 else NO_ATTRIBUTES
    return for_a, for_b


# --- The factors of DoRA ---


def site_dora_factors(step: Step, site: Site) -> NDArray[np.float64]:
    """m / ‖W + sBA‖ of each output, in fp64: (out,); of a convolution, (out, 1...).

    Reads the whole weight of the site. Raises InputRefused where an output of W + sBA is zero.
    """
    (term,) = step.terms  # a plan allows no second adapter where one has DoRA
    matrix = site.array.T if site.layout is Layout.EMBEDDING else site.matrix
    weight = matrix.reshape(term.pair.shape[0], -1)
    a = term.pair.a.reshape(term.pair.rank, -1).astype(np.float64)
    b = term.pair.b.reshape(-1, term.pair.rank).astype(np.float64) * term.scale
    parts = [slice(begin, begin + OUTPUTS_AT_ONCE) for begin in range(0, len(weight), OUTPUTS_AT_ONCE)]
    squares = np.concatenate([sums.squared_norms(weight[part].astype(np.float64) + b[part] @ a) for part in parts])
    return sums.dora_factors(step, squares).reshape(-1, *[1] * (term.pair.a.ndim - 2))


def dora_factors_by_weight(
    steps: Iterable[Step], adapter: str, sites_of: Callable[[str], Sequence[Site]]
) -> dict[str, NDArray[np.float64]]:
    """The factors of all weights that one adapter changes by DoRA, by weight. All readers of a weight share a factor.

    `sites_of` returns the sites of a weight. Raises InputRefused where they store different numbers, and as
    `site_dora_factors` does.
    """
    owns = {step.weight: step.for_adapter(adapter) for step in steps}
    return {
        weight: _common_factor(own, sites_of(weight))
        for weight, own in owns.items()
        if own is not None and own.magnitude is not None
    }


def _common_factor(step: Step, sites: Sequence[Site]) -> NDArray[np.float64]:
    first, *others = {(site.holder, site.block): site for site in sites}.values()
    factor = site_dora_factors(step, first)
    if all(np.array_equal(site_dora_factors(step, site), factor) for site in others):
        return factor
    raise InputRefused(
        f"{step.weight} is stored more than once in the graph, with different numbers: DoRA would need a factor for "
        "each. Merge the adapter into the weights instead"
    )
