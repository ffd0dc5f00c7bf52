"""Branches in a graph: x·A·B beside a layer's product, or A·B in the weight that a fused operator reads.

With DoRA, each output is multiplied by m / ‖W + sBA‖, from the weights that the graph stores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export import sums
from lora_export.errors import InputRefused
from lora_export.graph.find_sites import Sites
from lora_export.graph.insert.fused_operators import take_apart, why_attention_stays
from lora_export.graph.insert.node_factory import (
    MIN_OPSET,
    NO_ATTRIBUTES,
    Attributes,
    Factor,
    NodeFactory,
    NodeList,
    layer_input,
    sizes_of,
)
from lora_export.graph.operators import (
    BIAS_INPUTS,
    MICROSOFT,
    node_bias,
    operator_id,
    product_factor,
    transposed_layout,
)
from lora_export.graph.site import CHANGES_WEIGHT, Site
from lora_export.lora import split_part
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


def low_rank_branch(
    factory: NodeFactory, site: Site, pairs: Pairs, outputs: range, gate: ir.Value | None = None
) -> BranchNodes:
    """x·A·B for these outputs of the site's node. For an embedding, x·A are the rows that it looks up in A.

    Of a linear layer, x·A is multiplied by `gate`, where there is one.
    """
    nodes = NodeList(factory, pairs[0][0].path)
    a, b = concatenated(nodes, site, pairs)
    b = nodes.padded_to(site, b, outputs, 0.0)
    x, result = layer_input(site), site.node.outputs[0]
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
        for_a, for_b = gemm_attributes(site.node)
        down = nodes.product(x, a, for_a)
        down = down if gate is None else nodes.add("Mul", [down, gate], down.shape)
        product = nodes.product(down, b, for_b)
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


def gemm_attributes(node: ir.Node) -> tuple[Attributes, Attributes]:
    """The attributes of a branch beside a Gemm: its product by A transposes x, its product by B has alpha."""
    if node.op_type != "Gemm":
        return NO_ATTRIBUTES, NO_ATTRIBUTES
    alpha = product_factor(node)
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


# --- Inserting branches ---


def branch_obstacle(site: Site, *, is_embedding: bool) -> str:
    """As `Site.obstacle`, for a pair of an embedding or of another layer."""
    is_whole = site.inner_node is None and site.block is None
    if is_embedding:
        return "" if is_whole and site.is_lookup else site.obstacle or site.node.op_type
    return "" if is_whole and site.is_convolution else site.obstacle


def _with_reason(site: Site, obstacle: str) -> str:
    """An obstacle, and what keeps an Attention from being taken apart."""
    why = why_attention_stays(site.node) if obstacle else ""
    return f"{obstacle} with {why}" if why else obstacle


class Insertion(NamedTuple):
    """What is added to the product of a site's node."""

    site: Site
    branch: Callable[[range], BranchNodes] | None  # for these outputs: the site's block, and neighbours that gain zeros
    rescaling: Rescaling | None


class Inserter:
    """Inserts branches into a graph. All insertions beside a node are made together, by `finish`.

    Several weights may be packed side by side in one matrix (q, k and v; gate and up). Their node then gets one
    addition, as wide as its product.
    """

    def __init__(self, model: ir.Model):
        self.factory = NodeFactory(model)
        self.insertions: dict[ir.Node, list[Insertion]] = {}

    def sites_of(
        self,
        weight: str,
        sites: Sites,
        *,
        is_embedding: bool = False,
        allow_changed_weight: bool = False,
        apart: bool = False,
    ) -> tuple[Site, ...]:
        """The sites of a weight. Raises InputRefused where no branch can be inserted beside one of its readers.

        `allow_changed_weight` accepts fused operators, which read W + A·B instead; `apart` takes these apart, too.
        """
        if weight not in sites.by_name:
            raise InputRefused(_unsplit(weight, sites))
        own_sites = sites.by_name[weight]
        for site in own_sites:
            take_apart(self.factory, site, reads_changed=not apart)
        changed = [site for site in own_sites if allow_changed_weight and site.accepts_changed_weight]
        beside = [site for site in own_sites if site not in changed and not (apart and _is_scaled_product(site))]
        obstacles = sorted(
            {_with_reason(site, branch_obstacle(site, is_embedding=is_embedding)) for site in beside} - {""}
        )
        if obstacles:
            raise InputRefused(
                f"{weight} is read by {', '.join(obstacles)}, beside which no branch can be inserted. Merge the "
                "adapter into the weights instead, or start from the graph before its nodes were fused"
            )
        groups = max(site.node.attributes.get_int("group", 1) if site.is_convolution else 1 for site in own_sites)
        if groups > 1:
            raise InputRefused(f"{weight}: a pair has no meaning beside a convolution of {groups} groups")
        return own_sites

    def insert(self, site: Site, pairs: Pairs, rescaling: Rescaling | None = None) -> None:
        """Insert pairs beside a site's node, or into the weight that it reads."""
        if site.accepts_changed_weight:
            self._change_weight_input(site, pairs, rescaling)
        else:
            self.insert_beside(site, lambda outputs: low_rank_branch(self.factory, site, pairs, outputs), rescaling)

    def insert_beside(
        self, site: Site, branch: Callable[[range], BranchNodes] | None, rescaling: Rescaling | None = None
    ) -> None:
        """Insert a branch beside a site's node when `finish` is called. See `Insertion`."""
        self.insertions.setdefault(site.node, []).append(Insertion(site, branch, rescaling))

    def scale_input(self, site: Site, nodes: NodeList, scaled: ir.Value) -> None:
        """Let a site's node read `scaled` as its input, which these nodes compute from the one that it has."""
        if site.block is not None:
            raise InputRefused(
                f"{site.name} is stored beside other weights that read one input: its inputs cannot be scaled alone. "
                "Merge the adapter into the weights instead"
            )
        assert site.node.graph is not None
        site.node.graph.insert_before(site.node, nodes.nodes)
        site.node.replace_input_with(0, scaled)

    def finish(self) -> None:
        """Add the branches to the products of their nodes."""
        for insertions in self.insertions.values():
            rescalings = [insertion.rescaling for insertion in insertions if insertion.rescaling is not None]
            self.add_to_product(insertions[0].site, self._branches(insertions), rescalings)
        self.insertions.clear()

    def add_to_product(self, site: Site, branches: Sequence[BranchNodes], rescalings: Sequence[Rescaling] = ()) -> None:
        """Add branches to the product of a site's node, before any other node reads it.

        The branches are as wide as the product. `rescalings` multiply the sum; the node's bias is added after them.
        """
        product = site.node.outputs[0]
        assert site.node.graph is not None
        uses = product.uses()
        nodes: list[ir.Node] = []
        total = product
        for branch in branches:
            add = self.factory.node("Add", [total, branch.product], branch.path, product.shape)
            nodes += [*branch.nodes, add]
            total = add.outputs[0]
        for rescaling in rescalings:
            nodes += rescaling.nodes(total)
            total = nodes[-1].outputs[0]
        if rescalings:
            nodes += self._move_bias_after(site, total, rescalings[-1].path)
            total = nodes[-1].outputs[0]
        site.node.graph.insert_after(site.node, nodes)
        for node, index in uses:
            node.replace_input_with(index, total)
        self.factory.replace_graph_outputs(product, total)

    def _branches(self, insertions: Sequence[Insertion]) -> list[BranchNodes]:
        """The branches of a node, as wide as its product. Branches of several blocks are concatenated to one.

        This takes two thirds of the time of a zero-padded branch per block, measured with onnxruntime
        (tests/benchmarks/README.md).
        """
        insertions = [insertion for insertion in insertions if insertion.branch is not None]
        ranges = _output_ranges(insertions) if insertions else ()
        branches = [insertion.branch(outputs) for insertion, outputs in ranges if insertion.branch is not None]
        if not insertions or insertions[0].site.block is None or len(branches) == 1:
            return branches
        path, shape = branches[0].path, insertions[0].site.node.outputs[0].shape
        concat = self.factory.node("Concat", [branch.product for branch in branches], path, shape, {"axis": -1})
        nodes = [node for branch in branches for node in branch.nodes]
        return [BranchNodes([*nodes, concat], concat.outputs[0], path)]

    def _change_weight_input(self, site: Site, pairs: Pairs, rescaling: Rescaling | None) -> None:
        """Let a site's node read W + A·B (in, out), which onnxruntime folds where A and B are constant.

        Where A·B is zero, W keeps its bits. Any other way would change the node and thereby its rounding.
        """
        total = site.node.inputs[site.index]
        assert total is not None and site.node.graph is not None
        layout = transposed_layout(site.layout) if site.behind_transpose else site.layout
        path, is_out_in = pairs[0][1].path, layout is Layout.OUT_IN
        nodes = NodeList(self.factory, path)
        total = _transposed(nodes, total) if is_out_in else total
        a, b = concatenated(nodes, site, pairs)
        product = nodes.product(a.value, nodes.padded_to(site, b, range(site.node_outputs), 0.0))
        nodes.path = path
        total = nodes.add("Add", [total, product], total.shape)
        nodes.nodes[-1].metadata_props[CHANGES_WEIGHT] = "sum"
        if rescaling is not None:
            nodes.nodes += rescaling.nodes(total)
            nodes.nodes[-1].metadata_props[CHANGES_WEIGHT] = "length"
            total = nodes.nodes[-1].outputs[0]
        total = _transposed(nodes, total) if is_out_in else total
        site.node.graph.insert_before(site.node, nodes.nodes)
        site.node.replace_input_with(site.index, total)

    def _move_bias_after(self, site: Site, total: ir.Value, path: str) -> list[ir.Node]:
        """Remove the bias from a site's node. Returns the nodes that add it to `total`, none where it has no bias."""
        bias = _detach_bias(site.node)
        if bias is None:
            return []
        before = self._bias_as_added(site, bias, path)
        last = before[-1].outputs[0] if before else bias
        return [*before, self.factory.node("Add", [total, last], path, site.node.outputs[0].shape)]

    def _bias_as_added(self, site: Site, bias: ir.Value, path: str) -> list[ir.Node]:
        """The nodes that make a bias what its node added: a Gemm's times beta, a convolution's reshaped."""
        if site.is_convolution:
            shape = np.array([-1, *[1] * (len(site.shape) - 2)], np.int64)
            return [self.factory.node("Reshape", [bias, self.factory.constant(path, "shape", shape)], path)]
        beta = site.node.attributes.get_float("beta", 1.0)
        if beta == 1:
            return []
        factor = self.factory.constant(path, "beta", np.array(beta, np.dtype(site.dtype)))
        return [self.factory.node("Mul", [bias, factor], path, bias.shape)]


def _transposed(nodes: NodeList, matrix: ir.Value) -> ir.Value:
    shape = None if matrix.shape is None else sizes_of(matrix)[::-1]
    return nodes.add("Transpose", [matrix], shape, perm=[1, 0])


def _is_scaled_product(site: Site) -> bool:
    """Whether the node computes a product times a number, beside which a branch is multiplied by the same number."""
    return site.accepts_changed_weight and operator_id(site.node) == (MICROSOFT, "FusedMatMul")


def _unsplit(weight: str, sites: Sites) -> str:
    """Why no branch can be inserted beside a part of a stacked weight: no node multiplies by this part alone."""
    stacked = split_part(weight)[0]
    readers = " and ".join(sorted({site.node.op_type for site in sites.by_name[stacked]}))
    return (
        f"{stacked} is read by {readers} with the weights of all experts, beside which no branch can be inserted. "
        "Merge the adapter into the weights instead, or export the model with one product for each expert"
    )


def _detach_bias(node: ir.Node) -> ir.Value | None:
    """Remove the bias input of a node. Returns the bias, None where the node has none."""
    bias = node_bias(node)
    if bias is not None:
        node.replace_input_with(BIAS_INPUTS[node.op_type], None)
        while node.inputs[-1] is None:
            node.resize_inputs(len(node.inputs) - 1)
    return bias


def _output_ranges(insertions: Sequence[Insertion]) -> Iterator[tuple[Insertion, range]]:
    """The insertions of a node in the order of their blocks, and the outputs that each covers.

    Outputs without an adapter belong to the insertion before them, or to the first one.
    """
    if insertions[0].site.block is None:
        yield from ((insertion, range(insertion.site.node_outputs)) for insertion in insertions)
        return
    by_start = {insertion.site.block.start: insertion for insertion in insertions if insertion.site.block is not None}
    assert len(by_start) == len(insertions)
    _, *starts = sorted(by_start)
    ends = [0, *starts, insertions[0].site.node_outputs]
    for (_, insertion), (start, stop) in zip(sorted(by_start.items()), pairwise(ends), strict=True):
        yield insertion, range(start, stop)
