"""Which values of a graph are the input and output of a module, and how to make them outputs of the graph."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lora_export.errors import RuntimeRefused
from lora_export.graph.find_sites import Sites
from lora_export.graph.onnx_file.protobuf_wire import MAX_MESSAGE_BYTES
from lora_export.graph.onnx_file.writing import message_of
from lora_export.graph.operators import ATTENTIONS, CONVOLUTIONS, MATRIX_PRODUCTS, MICROSOFT, node_bias, operator_id
from lora_export.graph.site import Site
from lora_export.graph.values import before_reshapes, tensor_of
from lora_export.plan import Layout

MAX_BRANCH_NODES = 60  # a value that more nodes compute is not taken for an adapter's branch


@dataclass(frozen=True, eq=False)
class Tap:
    """One site of a named weight, and the graph's values that are the input and output of its module."""

    name: str  # of the weight
    site: Site
    x: str | None  # None where the input is not computed, or is several values
    y: str | None  # None where a fused node computes more than the module
    has_bias: bool  # whether `y` contains the module's bias


def find_taps(model: ir.Model, sites: Sites, inputs: Collection[str], biased: Mapping[str, bool]) -> list[Tap]:
    """The taps of linear layers, convolutions and embeddings in the main graph, in its order.

    `inputs` are the model's own, without those for adapters. `biased` maps each weight to whether its module adds a
    bias. What an adapter's branch adds belongs to the module; any other sum does not. Reads no tensor data.
    """
    positions = {node: number for number, node in enumerate(model.graph)}
    candidates = [
        (name, site)
        for name in biased
        for site in sites.by_name.get(name, ())
        if site.layout is not Layout.OTHER and site.node in positions and site.inner_node is None and site.block is None
    ]
    finder = _TapFinder(set(inputs), {site.node for _, site in candidates})
    candidates.sort(key=lambda candidate: positions[candidate[1].node])
    # Twice: the ends of all modules, which the first pass finds, keep the second from taking a residual for a branch.
    both = [[finder.find(name, site, has_bias=biased[name]) for name, site in candidates] for _ in range(2)]
    return [tap for tap in both[-1] if tap is not None]


class _TapFinder:
    """Follows the graph from the node that reads a weight to the output of its module.

    `of_modules` are the nodes that read a named weight. Those that complete the modules found so far join them: a
    residual that an adapter's branch was added to is no branch.
    """

    def __init__(self, inputs: set[str], of_modules: set[ir.Node]):
        self.inputs, self.of_modules = inputs, of_modules

    def find(self, name: str, site: Site, *, has_bias: bool) -> Tap | None:
        node = site.node
        position = 1 if site.layout is Layout.EMBEDDING else 0
        if site.index == position or node.attributes.get_int("transA", 0) == 1:
            return None
        x = node.inputs[position]
        x_name = None if x is None or tensor_of(x) is not None else x.name
        operator = operator_id(node)
        if operator in ATTENTIONS or "activation" in node.attributes:  # FusedGemm's, FusedConv's
            return Tap(name, site, x_name, None, False)
        if (
            operator not in MATRIX_PRODUCTS | CONVOLUTIONS
            and site.layout is not Layout.EMBEDDING
            and site.quantised is None
        ):
            return None
        y, is_added = node.outputs[0], node_bias(node) is not None
        while (following := self._next(y, x, needs_bias=has_bias and not is_added)) is not None:
            last, is_bias = following
            y, is_added = last.outputs[0], is_added or is_bias
            self.of_modules.add(last)
        return Tap(name, site, x_name, y.name, is_added or not _is_read_by_fused_node(y))

    def _next(self, y: ir.Value, x: ir.Value | None, *, needs_bias: bool) -> tuple[ir.Node, bool] | None:
        """The node of the module after `y`, and whether it adds the bias; None where the module ends."""
        for node, index in y.uses():
            if len(node.inputs) != 2 or not (node.outputs[0].uses() or node.outputs[0].is_graph_output()):
                continue
            other = node.inputs[1 - index]
            if other is None or other is y:
                continue
            if node.op_type == "Add" and _is_constant(other):
                if needs_bias:
                    return node, True
            elif self._is_branch(other, x) if node.op_type == "Add" else _is_dora_factor(node, other):
                return node, False
        return None

    def _is_branch(self, value: ir.Value, x: ir.Value | None) -> bool:
        """Whether an adapter's branch computes a value.

        It does where it has an adapter's names, or is computed from `x` alone and reads no named weight. The
        search ends at the outputs of other modules.
        """
        has_product = has_adapter_name = has_other_source = False
        seen: set[ir.Node] = set()
        waiting = [value]
        while waiting:
            at = waiting.pop()
            has_adapter_name = has_adapter_name or "lora_" in (at.name or "")
            node = at.producer()
            if at is x or node is None:
                has_other_source = has_other_source or (at is not x and at.name in self.inputs)
                continue
            if node in seen or node.op_type == "Shape":
                continue
            seen.add(node)
            if node in self.of_modules:
                has_other_source = True
                continue
            if len(seen) > MAX_BRANCH_NODES:
                return False
            has_product = has_product or operator_id(node) in MATRIX_PRODUCTS | CONVOLUTIONS
            waiting += _sources(node)
        return has_product and (has_adapter_name or not has_other_source)


def _sources(node: ir.Node) -> list[ir.Value]:
    """The values that a node's outputs are computed from, those of an If's branches included."""
    sources = [value for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH and not attribute.is_ref():
            sources += list(attribute.as_graph().outputs)
    return sources


def _is_read_by_fused_node(y: ir.Value) -> bool:
    """Whether the node that reads a product may add the bias to it: onnxruntime's BiasGelu and the like."""
    return any(operator_id(node)[0] == MICROSOFT for node, _ in y.uses())


def _is_constant(value: ir.Value) -> bool:
    return all(tensor_of(root) is not None for root in _roots(value))


def _is_dora_factor(node: ir.Node, other: ir.Value) -> bool:
    """Whether a node multiplies each output with DoRA's factor."""
    return node.op_type == "Mul" and any("lora_magnitude" in (value.name or "") for value in before_reshapes(other))


def _roots(value: ir.Value) -> Iterator[ir.Value]:
    """The values from which casts, reshapes and products compute a value; the value itself where there are none."""
    node = value.producer()
    if tensor_of(value) is None and node is not None and node.op_type in ("Reshape", "Cast", "Identity", "Mul"):
        for source in node.inputs:
            if source is not None:
                yield from _roots(source)
    else:
        yield value


@dataclass(frozen=True, eq=False)
class ExposedGraph:
    """A graph that returns inner values too, as a message; its large weights remain in their files."""

    message: bytes
    folder: Path  # to which the paths of its weights are relative
    outputs: tuple[str, ...]  # those that were added


def expose(model: ir.Model, taps: Collection[Tap]) -> ExposedGraph:
    """Make the values of the taps outputs. Changes `model`. Raises as `exposed`."""
    values = {value.name: value for node in model.graph for value in (*node.inputs, *node.outputs) if value is not None}
    found = []
    for tap in taps:
        for name in (tap.x, tap.y):
            if name is None:
                continue
            value = values[name]
            if value.type is None and (name == tap.y or tap.site.layout is not Layout.EMBEDDING):
                value.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(tap.site.dtype)))
            found.append(value)
    return exposed(model, found)


def exposed(model: ir.Model, values: Iterable[ir.Value]) -> ExposedGraph:
    """Make values outputs, those that are neither inputs nor outputs. Changes `model`.

    Weights in files remain there; where the files are in several folders, the weights are read into memory. Raises
    RuntimeRefused where ONNX cannot hold the graph.
    """
    returned = {output.name for output in (*model.graph.outputs, *model.graph.inputs)}
    added = {value.name: value for value in values if value.name not in returned}
    model.graph.outputs.extend(added.values())
    folder = _with_one_folder(model)
    return ExposedGraph(message_of(model, check=False), folder, tuple(str(name) for name in added))


def _with_one_folder(model: ir.Model) -> Path:
    """The folder of the weights' files. Where there are several, the weights are read into the model."""
    values = [value for graph in model.graphs() for value in graph.initializers.values()]
    external = [(value, tensor) for value in values if isinstance(tensor := value.const_value, ir.ExternalTensor)]
    folders = {Path(os.fspath(tensor.base_dir)) for _, tensor in external}
    if len(folders) < 2:
        return folders.pop() if folders else Path()
    size = sum(tensor.nbytes for _, tensor in external)
    if size >= MAX_MESSAGE_BYTES:
        raise RuntimeRefused(
            f"the graph's weights are in {len(folders)} folders, and their {size:,} bytes do not fit into one message"
        )
    for value, tensor in external:
        value.const_value = ir.Tensor(tensor.numpy(), name=value.name)
    return Path()
