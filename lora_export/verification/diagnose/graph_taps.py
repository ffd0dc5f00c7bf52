"""What a graph computes module by module: where a module's input and output are to be had in it."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lora_export.errors import RuntimeRefused
from lora_export.graph.insert.inserter import BIASES
from lora_export.graph.onnx_file import LIMIT, message_of
from lora_export.graph.readers import ATTENTIONS, CONVOLUTIONS, MICROSOFT, PRODUCTS, Site, identity, tensor_of
from lora_export.graph.sites import Sites
from lora_export.plan import Layout

MOST_NODES = 60  # of a branch, that are looked through


@dataclass(frozen=True, eq=False)
class Watched:
    """One place where a named weight is read, and the graph's values that enter and leave its module."""

    name: str  # of the weight
    site: Site
    x: str | None  # None where what enters is not computed, or is several things
    y: str | None  # None where a fused node holds more than the module
    has_bias: bool  # whether the bias is added already where `y` is read


def watch(model: ir.Model, sites: Sites, inputs: Collection[str], biased: Mapping[str, bool]) -> list[Watched]:
    """Find the values of these linear layers, convolutions and embeddings in the main graph, in its order.

    `inputs` are those that the model has, as against those for adapters; `biased` says of each weight
    that is looked for whether its module adds a bias. What an adapter's branch adds belongs to the
    module; a sum with anything else does not. Reads no data.
    """
    order = {node: number for number, node in enumerate(model.graph)}
    places = [
        (name, site)
        for name in biased
        for site in sites.by_name.get(name, ())
        if site.layout is not Layout.OTHER and site.node in order and site.inner is None and site.block is None
    ]
    follower = _Follower(set(inputs), {site.node for _, site in places})
    places.sort(key=lambda place: order[place[1].node])
    return [watched for name, site in places if (watched := follower.watch(name, site, has_bias=biased[name]))]


class _Follower:
    """Goes from the node that reads a weight to where its module ends."""

    def __init__(self, inputs: set[str], named: set[ir.Node]):
        self.inputs, self.named = inputs, named

    def watch(self, name: str, site: Site, *, has_bias: bool) -> Watched | None:
        node = site.node
        position = 1 if site.layout is Layout.EMBEDDING else 0
        if site.index == position or node.attributes.get_int("transA", 0) == 1:
            return None
        x = node.inputs[position]
        entering = None if x is None or tensor_of(x) is not None else x.name
        operator = identity(node)
        if operator in ATTENTIONS or "activation" in node.attributes:  # FusedGemm's, FusedConv's
            return Watched(name, site, entering, None, False)
        if operator not in PRODUCTS | CONVOLUTIONS and site.layout is not Layout.EMBEDDING and site.quantised is None:
            return None
        y, added = node.outputs[0], self._adds_bias(node)
        while (after := self._next(y, x, wants_bias=has_bias and not added)) is not None:
            y, is_bias = after
            added = added or is_bias
        return Watched(name, site, entering, y.name, added or not self._is_fused(y))

    def _adds_bias(self, node: ir.Node) -> bool:
        index = BIASES.get(node.op_type, len(node.inputs))
        return index < len(node.inputs) and node.inputs[index] is not None

    def _next(self, y: ir.Value, x: ir.Value | None, *, wants_bias: bool) -> tuple[ir.Value, bool] | None:
        """What a module makes of its product next, and whether that adds its bias; None where it ends."""
        for node, index in y.uses():
            if len(node.inputs) != 2 or not (node.outputs[0].uses() or node.outputs[0].is_graph_output()):
                continue
            other = node.inputs[1 - index]
            if other is None or other is y:
                continue
            if node.op_type == "Add" and self._is_constant(other):
                if wants_bias:
                    return node.outputs[0], True
            elif self._is_branch(other, x) if node.op_type == "Add" else _is_length(node, other):
                return node.outputs[0], False
        return None

    def _is_fused(self, y: ir.Value) -> bool:
        """Whether the one who reads a product adds the bias to it: onnxruntime's BiasGelu and the like."""
        return any(identity(node)[0] == MICROSOFT for node, _ in y.uses())

    def _is_constant(self, value: ir.Value) -> bool:
        return all(tensor_of(root) is not None for root in _roots(value))

    def _is_branch(self, value: ir.Value, x: ir.Value | None) -> bool:
        """Whether a value is low-rank: out of x alone, by factors that are nobody's weight; or an adapter's by name."""
        products = False
        seen: set[ir.Node] = set()
        waiting = [value]
        strange = names = False
        while waiting:
            at = waiting.pop()
            names = names or "lora_" in (at.name or "")
            node = at.producer()
            if at is x or node is None:
                strange = strange or (at is not x and at.name in self.inputs)
                continue
            if node in seen or node.op_type == "Shape":
                continue
            seen.add(node)
            if node in self.named:
                strange = True
                continue
            if len(seen) > MOST_NODES:
                return False
            products = products or identity(node) in PRODUCTS | CONVOLUTIONS
            waiting += [entering for entering in node.inputs if entering is not None]
            for attribute in node.attributes.values():  # an If's two ways
                if attribute.type is ir.AttributeType.GRAPH and not attribute.is_ref():
                    waiting += list(attribute.as_graph().outputs)
        return products and (names or not strange)


def _is_length(node: ir.Node, other: ir.Value) -> bool:
    """Whether a node gives each output the length that DoRA wants."""
    return node.op_type == "Mul" and any("lora_magnitude" in (value.name or "") for value in _behind(other))


def _behind(value: ir.Value) -> Iterator[ir.Value]:
    """A value, and what it is made of where that is a constant that was only reshaped."""
    yield value
    node = value.producer()
    if node is not None and node.op_type in ("Reshape", "Cast", "Identity", "Unsqueeze") and node.inputs[0] is not None:
        yield from _behind(node.inputs[0])


def _roots(value: ir.Value) -> Iterator[ir.Value]:
    """Where a value comes from, followed through nodes that take one thing or two; itself where it is not that."""
    node = value.producer()
    if tensor_of(value) is None and node is not None and node.op_type in ("Reshape", "Cast", "Identity", "Mul"):
        for entering in node.inputs:
            if entering is not None:
                yield from _roots(entering)
    else:
        yield value


@dataclass(frozen=True, eq=False)
class Exposed:
    """A graph that hands out values from its middle, as a message; its large weights stay where they are."""

    message: bytes
    folder: Path  # that the places of its weights are told from
    outputs: tuple[str, ...]  # that were added


def expose(model: ir.Model, watched: Collection[Watched]) -> Exposed:
    """Make outputs of the values that are watched, in memory. The graph is another one then.

    Weights that lie in files stay there; where they lie in several folders, they are read. Raises
    RuntimeRefused where ONNX cannot hold the graph.
    """
    there = {output.name for output in (*model.graph.outputs, *model.graph.inputs)}
    values = {value.name: value for node in model.graph for value in (*node.inputs, *node.outputs) if value is not None}
    added = []
    for place in watched:
        for name in (place.x, place.y):
            if name is None or name in there:
                continue
            value = values[name]
            if value.type is None and (name == place.y or place.site.layout is not Layout.EMBEDDING):
                value.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(place.site.dtype)))
            model.graph.outputs.append(value)
            there.add(name)
            added.append(name)
    folder = _only_folder(model)
    return Exposed(message_of(model, check=False), folder, tuple(added))


def _only_folder(model: ir.Model) -> Path:
    values = [value for graph in model.graphs() for value in graph.initializers.values()]
    there = [(value, tensor) for value in values if isinstance(tensor := value.const_value, ir.ExternalTensor)]
    folders = {Path(os.fspath(tensor.base_dir)) for _, tensor in there}
    if len(folders) < 2:
        return folders.pop() if folders else Path()
    size = sum(tensor.nbytes for _, tensor in there)
    if size >= LIMIT:
        raise RuntimeRefused(f"its weights lie in {len(folders)} folders, and {size:,} bytes cannot be held as one")
    for value, tensor in there:
        value.const_value = ir.Tensor(tensor.numpy(), name=value.name)
    return Path()
