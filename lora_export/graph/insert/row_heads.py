"""Mode `rows`: linear layers that adapters save whole (a task head), selected for each row of a batch.

The base's own layer stays, with the branches of adapters that have a pair there. Where the adapter of a row brings the
layer, x·W + b by its own W and b takes the place of the layer's output. Heads may have different numbers of labels: the
output is as wide as the widest, and a label that a row's head does not have is ABSENT_LABEL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.errors import InputRefused, listed
from lora_export.formats.contract import ABSENT_LABEL
from lora_export.formats.onnx_adapter import cast_factor
from lora_export.graph.find_sites import Sites
from lora_export.graph.insert.adapter_names import dotted, module_of
from lora_export.graph.insert.batch_axis import BatchAxis, infer_shapes
from lora_export.graph.insert.branches import Inserter
from lora_export.graph.insert.node_factory import Factor, NodeList, last_size, layer_input, sizes_of
from lora_export.graph.insert.row_branches import RowBranches, transposed
from lora_export.graph.operators import bias_factor, node_bias, product_factor
from lora_export.graph.site import Site, common_dtype
from lora_export.options.spelling import named
from lora_export.plan.own_heads import Head

SAVED_WHOLE = "modules_to_save"  # part of the initializers' names, as in PEFT's own
# Operators that leave the labels of a head as they are.
LABEL_OPERATORS = frozenset(
    {"Identity", "Cast", "Gather", "GatherND", "GatherElements", "Slice", "Squeeze", "Unsqueeze", "Reshape", "Flatten"}
)


@dataclass(frozen=True, eq=False)
class HeadLayer:
    """A linear layer that adapters bring: its sites, the base's bias, and what each adapter has in its place."""

    module: str
    sites: tuple[Site, ...]
    bias: NDArray[Any] | None  # (out,) of the base
    weights: Sequence[NDArray[Any] | None]  # (out, in) by adapter
    biases: Sequence[NDArray[Any] | None]  # (out,) by adapter

    @property
    def width(self) -> int:
        """Labels of the widest head."""
        return max(self.labels)

    @property
    def base_labels(self) -> int:
        """Outputs of the base's own layer."""
        return self.sites[0].node_outputs

    @property
    def labels(self) -> list[int]:
        """How many outputs each id has, the base's first."""
        return [self.base_labels, *(self.base_labels if own is None else len(own) for own in self.weights)]

    def stacks(self) -> tuple[NDArray[np.float32], NDArray[np.float32] | None, NDArray[np.bool_]]:
        """W (adapters + 1, in, labels), b (adapters + 1, labels) and whether each id has them (adapters + 1, 1).

        There is no b where the layer has none and all have the same labels.
        """
        width, inner = self.width, self.sites[0].matrix.shape[1]
        weights = np.zeros((len(self.labels), inner, width), np.float32)
        biases = np.full((len(self.labels), width), ABSENT_LABEL, np.float32)
        owners = np.zeros((len(self.labels), 1), np.bool_)
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True), 1):
            if weight is not None:
                weights[number, :, : len(weight)] = weight.T
                biases[number, : len(weight)] = 0 if bias is None else bias
                owners[number] = True
        has_biases = self.bias is not None or len(set(self.labels)) > 1
        return weights, biases if has_biases else None, owners


def head_layers(inserter: Inserter, sites: Sites, heads: Sequence[Head]) -> list[HeadLayer]:
    """The layers that adapters bring, in the order of the graph.

    Raises InputRefused, with all of them, for whole tensors that are not the weight or bias of a linear layer.
    """
    modules = dict.fromkeys(module_of(name.removesuffix(".bias")) for head in heads for name in head)
    known = {dotted(module, part) for module in modules for part in ("weight", "bias")}
    problems = [name for name in dict.fromkeys(name for head in heads for name in head) if name not in known]
    layers = []
    for module in modules:
        weight, bias = dotted(module, "weight"), dotted(module, "bias")
        if why := _obstacle(weight, sites):
            problems.append(f"{weight}: {why}")
            continue
        own_sites = inserter.sites_of(weight, sites, apart=True)
        base_bias = sites.by_name[bias][0].array if bias in sites.by_name else None
        matrix = own_sites[0].matrix
        weights, biases = [], []
        for head in heads:
            has_own = weight in head or bias in head
            weights.append(head.get(weight, matrix) if has_own else None)
            biases.append(head.get(bias, base_bias) if has_own else None)
        if base_bias is None and any(own is not None for own in biases):
            problems.append(f"{bias}: the graph's layer has no bias of this name")
        layers.append(HeadLayer(module, own_sites, base_bias, weights, biases))
    if problems:
        raise InputRefused(
            "only linear layers can be chosen by row; these whole tensors cannot:",
            listed(problems),
            f"Merge such an adapter into a graph of its own ({named('lora', 'merged')})",
        )
    order = {
        node: number for number, node in enumerate(ir.traversal.RecursiveGraphIterator(inserter.factory.model.graph))
    }
    return sorted(layers, key=lambda layer: order[layer.sites[0].node])


def _obstacle(weight: str, sites: Sites) -> str:
    """Why the weight is not that of a linear layer; empty where it is."""
    own_sites = sites.by_name.get(weight, ())
    if not own_sites:
        return "no node of the graph reads it alone"
    kinds = sorted({site.node.op_type for site in own_sites if not site.is_linear or len(site.shape) != 2})
    if kinds:
        return f"read by {', '.join(kinds)}"
    if any(product_factor(site.node) != 1 for site in own_sites):
        return "its product is multiplied by a number"
    if any(bias_factor(site.node) != 1 for site in own_sites):
        return "its bias is multiplied by a number"
    return "one of several weights in one matrix" if any(site.block is not None for site in own_sites) else ""


class HeadStacks(NamedTuple):
    """W (adapters + 1, in, labels), b (adapters + 1, labels), and whether each id has them (adapters + 1, 1)."""

    weights: Factor
    biases: Factor | None
    owners: ir.Value


class HeadOutputs(NamedTuple):
    """The graph's outputs that have the labels of a layer."""

    layer: HeadLayer
    names: tuple[str, ...]
    is_clear: bool  # whether they are the layer's output, unchanged: heads may then have different numbers of labels


class RowHeads:
    """Inserts the layers that adapters bring, before `Inserter.finish` adds the branches beside them."""

    def __init__(self, inserter: Inserter, branches: RowBranches, axes: Mapping[tuple[ir.Node, int], BatchAxis]):
        self.inserter, self.branches, self.axes = inserter, branches, axes
        self.factory = inserter.factory
        self.chosen: list[tuple[HeadLayer, ir.Value]] = []

    def insert(self, layer: HeadLayer, stacks: HeadStacks) -> None:
        """Let each row have the output of its own layer."""
        for site in layer.sites:
            self.chosen.append((layer, self._choose(layer, site, *stacks)))

    def stored(self, layer: HeadLayer) -> HeadStacks:
        """The layers of all adapters as initializers. Raises InputRefused where a dtype cannot hold a value."""
        weights, biases, owners = layer.stacks()
        dtype = common_dtype(layer.sites)
        w = self._factor(layer.module, "weight", weights, dtype)
        b = None if biases is None else self._factor(layer.module, "bias", biases, dtype)
        return HeadStacks(w, b, self.factory.constant("/" + dotted(layer.module, SAVED_WHOLE), "rows", owners))

    def outputs(self) -> list[HeadOutputs]:
        """The graph's outputs of logits of each layer. Infers shapes that changed.

        Raises InputRefused where heads have different numbers of labels and these do not reach an output as they are.
        """
        model, changed = self.factory.model, False
        reached = []
        for layer, value in self.chosen:
            is_wider = len(set(layer.labels)) > 1
            outputs, others = _followed(value)
            if is_wider and (others or not outputs):
                way = f"pass {', '.join(sorted(others))} before they are an output" if others else "reach no output"
                raise InputRefused(
                    f"{layer.module}: the heads have {', '.join(map(str, sorted(set(layer.labels))))} labels, which "
                    f"{way}. Export a graph that returns the logits, or one graph for each adapter "
                    f"({named('lora', 'merged')})"
                )
            reached.append((layer, outputs, not others and bool(outputs)))
            if is_wider:
                changed = True
                for later in _later_values(value):
                    later.shape = None
        if changed:
            infer_shapes(model)
        found = []
        for layer, outputs, is_clear in reached:
            wide = [output for output in outputs if output.shape is not None and output.shape[-1] == layer.width]
            if len(set(layer.labels)) > 1 and len(wide) < len(outputs):
                raise InputRefused(f"{layer.module}: an output of the graph has no dimension of {layer.width} labels")
            found.append(HeadOutputs(layer, tuple(str(output.name) for output in wide), is_clear))
        return found

    def _factor(self, module: str, part: str, array: NDArray[Any], dtype: str) -> Factor:
        name = dotted(module, SAVED_WHOLE, part)
        return self.factory.factor(module, part, cast_factor(module, part, array, dtype), name=name)

    def _choose(self, layer: HeadLayer, site: Site, weights: Factor, biases: Factor | None, mask: ir.Value) -> ir.Value:
        """Insert the choice behind a layer; returns the layer's output as it is then."""
        output = _layer_output(site, layer)
        uses, axis, width = output.uses(), self.axes[site.node_input], layer.width
        branches = self.branches.of_layer(axis)
        nodes = NodeList(self.factory, "/" + dotted(layer.module, SAVED_WHOLE))
        own = self._own(branches, nodes, site, axis, weights, biases)
        base = branches.separate_batch(nodes, self._widened(nodes, output, axis, layer), axis, width)
        owns = branches.of_rows(nodes, mask, len(sizes_of(own)), batch_axis=axis.axis)
        chosen = nodes.add("Where", [owns, own, base], own.shape, own.dtype)
        shape = None if output.shape is None else [*output.shape[:-1], width]
        chosen = branches.as_layer(nodes, chosen, axis, shape)
        nodes.insert_behind(output)
        for node, index in uses:
            node.replace_input_with(index, chosen)
        self.factory.replace_graph_outputs(output, chosen)
        return chosen

    def _own(
        self,
        branches: RowBranches,
        nodes: NodeList,
        site: Site,
        axis: BatchAxis,
        weights: Factor,
        biases: Factor | None,
    ) -> ir.Value:
        """x·W + b by each row's own W and b, with a dimension for the batch."""
        weights = nodes.cast_to_site(site, weights)
        x = layer_input(site)
        x, back = branches.batch_first(nodes, branches.separate_batch(nodes, x, axis, last_size(x)), axis)
        own = branches.product_by_row(nodes, x, weights.value)
        if biases is not None:
            biases = nodes.cast_to_site(site, biases)
            bias = branches.of_rows(nodes, biases.value, len(sizes_of(own)), batch_axis=0)
            own = nodes.add("Add", [own, bias], own.shape)
        return transposed(nodes, own, back)

    def _widened(self, nodes: NodeList, output: ir.Value, axis: BatchAxis, layer: HeadLayer) -> ir.Value:
        """The base's own output with absent labels, where it has fewer than the widest head."""
        more = layer.width - layer.base_labels
        if not more:
            return output
        shape = None if output.shape is None else [*output.shape[:-1], layer.width]
        return nodes.pad(output, ("labels", "absent"), [0] * (2 * axis.rank - 1) + [more], ABSENT_LABEL, shape)


def _layer_output(site: Site, layer: HeadLayer) -> ir.Value:
    """The output of a layer with its bias. Raises InputRefused where the node that adds the bias is not found."""
    product = site.node.outputs[0]
    if layer.bias is None or node_bias(site.node) is not None:
        return product
    nodes = [node for node, _ in product.uses()]
    if len(nodes) != 1 or nodes[0].op_type != "Add":
        raise InputRefused(f"{layer.module}: no single node of the graph adds the bias to the product of this layer")
    return nodes[0].outputs[0]


def _followed(value: ir.Value) -> tuple[list[ir.Value], set[str]]:
    """The graph's outputs that a value reaches, and the operators on the way that change labels."""
    outputs: list[ir.Value] = []
    others: set[str] = set()
    for later in [value, *_later_values(value)]:
        outputs += [later] if later.is_graph_output() else []
        others |= {node.op_type for node, _ in later.uses() if node.op_type not in {*LABEL_OPERATORS, "Shape"}}
    return outputs, others


def _later_values(value: ir.Value) -> list[ir.Value]:
    """Every value that is computed from this one; what is computed from its shape alone is not."""
    found, waiting = dict.fromkeys([value]), [value]
    while waiting:
        for node, _ in waiting.pop().uses():
            new = [] if node.op_type == "Shape" else [each for each in node.outputs if each not in found]
            found |= dict.fromkeys(new)
            waiting += new
    return list(found)[1:]
