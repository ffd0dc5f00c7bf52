"""Finding the weights of a graph and their names.

Names come from the exporter's records (`exporter_names`) and, where a base checkpoint is available, from the content of
the weights (`names_in_base`). Each site records which source named it. An ambiguous weight is listed as
unnamed, and no adapter is applied to it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from lora_export.errors import brief, count, escaped_lines
from lora_export.graph.exporter_names import (
    is_stored_transposed,
    looks_like_parameter,
    module_of_node,
    name_before_quantisation,
    name_sites,
    naming_attempts,
    remove_contradictory_names,
)
from lora_export.graph.operators import FUSED_EXPERTS, MATRIX_PRODUCTS, QUANTISED_INPUTS, operator_id, transposed_layout
from lora_export.graph.site import Site, find_readers
from lora_export.graph.values import initializers, is_stored, stored_dtype, tensor_of
from lora_export.plan import FLOATS, Layout, TensorSpec

if TYPE_CHECKING:
    from lora_export.weights.checkpoint import Checkpoint

# Operators between an output head and the graph's output that do not mix its features.
OPERATORS_AFTER_HEAD = frozenset(
    {"Add", "Cast", "Identity", "Mul", "Div", "Tanh", "Reshape", "Squeeze", "Unsqueeze", "Transpose"}
)
ADAPTER_NAME = re.compile(r"(^|\.)lora_([AB]|zeros)\b")  # in the name of an adapter's tensor beside a layer
PRODUCT_NAMES = frozenset(name for _, name in MATRIX_PRODUCTS)


@dataclass(frozen=True, eq=False, repr=False)
class Sites:
    """Every place where a graph reads a weight. Invalid after any change of the graph: find the sites again then."""

    by_name: Mapping[str, tuple[Site, ...]]  # several sites may read one parameter
    unnamed: tuple[Site, ...]  # linear layers whose weight has no certain name
    notes: tuple[str, ...]  # what was not read
    unsupported: tuple[TensorSpec, ...] = ()  # quantised weights in unsupported formats
    fused_experts: tuple[str, ...] = ()  # operators that compute all experts of a layer, in a layout of their own

    def __repr__(self) -> str:
        return brief(self, str(self).split("\n", 1)[0])

    @property
    def specs(self) -> list[TensorSpec]:
        """One spec per parameter, in the shape and layout of the model, before any transposition by an exporter."""
        return [*(_spec(name, sites) for name, sites in self.by_name.items()), *self.unsupported]

    @property
    def linear(self) -> tuple[Site, ...]:
        """The named sites of linear layers and convolutions."""
        return tuple(site for sites in self.by_name.values() for site in sites if site.is_linear)

    def name_of(self, site: Site) -> str:
        """The name of the site at the same node and input. Empty where it has none."""
        for name, sites in self.by_name.items():
            if site.node_input in {other.node_input for other in sites}:
                return name
        return ""

    def __str__(self) -> str:
        counts = Counter(site.named_by for site in self.linear)
        sources = ", ".join(f"{number} named by {source.replace('_', ' ')}" for source, number in counts.items())
        lines = [f"{count(len(self.linear) + len(self.unnamed), 'linear layer')}: {sources or 'none with a name'}"]
        for site in self.unnamed:
            lines.append(f"  {site.location}: no certain name (tried {', '.join(naming_attempts(site))})")
        lines += [f"note: {note}" for note in self.notes]
        return escaped_lines(*lines)


def find_sites(model: ir.Model, base: Checkpoint | None = None) -> Sites:
    """Find and name every place where a float or quantised weight is read, subgraphs included.

    Without a base, tensor data is read only where two initializers have one name: they must be equal, or both lose
    it. `base` is the checkpoint that the graph was made from. Its content names the weights that have lost their names,
    block by block in packed weights, and confirms all other names. Names are then spelled as in the base.

    Raises InputRefused where the base has another tensor under the name of a weight.
    """
    sites = list(_weight_sites(model))
    named, unnamed = name_sites(sites)
    notes = list(unread_notes(model, sites))
    if base is not None:
        with_names = [site for group in named.values() for site in group]
        from lora_export.graph.names_in_base import name_by_base  # few graphs have lost their names

        named, unnamed, missing = name_by_base([*with_names, *unnamed], base)
        remove_contradictory_names(named, unnamed)
        notes += [f"{name}: {base.path.name} has neither this name nor this content" for name in missing]
    return Sites(
        by_name={name: tuple(group) for name, group in named.items()},
        unnamed=tuple(site for site in unnamed if site.is_linear),
        notes=tuple(notes),
        fused_experts=tuple(
            node.op_type
            for node in ir.traversal.RecursiveGraphIterator(model.graph)
            if operator_id(node) in FUSED_EXPERTS
        ),
        unsupported=tuple(spec for spec in unsupported_specs(model, sites) if spec.name not in named),
    )


def is_output_head(site: Site) -> bool:
    """Whether an output of the graph is the product of this linear layer, up to elementwise and shape operators."""
    waiting, seen = list(site.node.outputs), set(site.node.outputs)
    while waiting:
        value = waiting.pop()
        if value.is_graph_output():
            return True
        for node, _ in value.uses():
            if node.op_type in OPERATORS_AFTER_HEAD:
                new = [output for output in node.outputs if output not in seen]
                seen.update(new)
                waiting += new
    return False


def _weight_sites(model: ir.Model) -> Iterator[Site]:
    """Every reader of a weight: first of initializers, in their order, then of Constant nodes."""
    values = list(initializers(model))
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type == "Constant" and len(node.outputs) == 1:
            tensor = tensor_of(node.outputs[0])
            values += node.outputs if tensor is not None and len(tensor.shape) > 1 else ()
    for value in values:
        dtype = stored_dtype(value)
        for site in find_readers(value, model.functions) if dtype and dtype != "string" else ():
            is_scale = site.node.op_type in QUANTISED_INPUTS and site.index > 0
            if site.quantised is not None or (dtype in FLOATS and not is_scale):
                yield site


def _spec(name: str, sites: tuple[Site, ...]) -> TensorSpec:
    site = min(sites, key=lambda site: not site.is_linear)
    shape, layout = site.shape, site.layout
    if is_stored_transposed(site):
        shape, layout = shape[::-1], transposed_layout(layout)
    dtype = site.dtype if site.quantised is not None else stored_dtype(site.value)
    return TensorSpec(name, shape, dtype, layout, nbytes=math.prod(shape) * np.dtype(dtype).itemsize)


# --- What is not read: matrices in other operators, and unsupported quantisation ---


def unread_notes(model: ir.Model, sites: Iterable[Site]) -> Iterator[str]:
    """One note for each kind of node that holds weights and is not read."""
    sites = list(sites)
    for op_type, number in Counter(node.op_type for node, _ in _unsupported(model, sites)).items():
        nodes = count(number, f"{op_type} node holds", f"{op_type} nodes hold")
        yield f"{nodes} quantised weights in an unsupported format"
    for reader, number in Counter(_other_readers(model, sites)).items():
        matrices = count(number, "matrix is", "matrices are")
        yield f"{matrices} read by {reader}, which is not searched for linear layers"


def unsupported_specs(model: ir.Model, sites: Iterable[Site]) -> Iterator[TensorSpec]:
    """Quantised weights in unsupported formats, by name. The error for an adapter of such a weight shows its dtype."""
    seen = set()
    for node, value in _unsupported(model, sites):
        name, module = name_before_quantisation(value), module_of_node(node)[0]
        name = name if looks_like_parameter(name) else f"{module}.weight" if module else ""
        if name and name not in seen:
            seen.add(name)
            yield TensorSpec(name, (), f"{stored_dtype(value)} of {node.op_type}")


def _other_readers(model: ir.Model, sites: Iterable[Site]) -> Iterator[str]:
    """The readers of matrices that are no linear layers, one for each matrix."""
    for site in sites:
        if site.layout is not Layout.OTHER or len(site.shape) != 2 or site.node.op_type in QUANTISED_INPUTS:
            continue
        if ADAPTER_NAME.search(site.value.name or ""):
            continue
        is_call = site.inner_node is not None or site.node.op_identifier() in model.functions
        operand = " as its first operand" if site.node.op_type in PRODUCT_NAMES and site.index == 0 else ""
        yield f"the function {site.node.op_type}" if is_call else f"{site.node.op_type}{operand}"


def _unsupported(model: ir.Model, sites: Iterable[Site]) -> Iterator[tuple[ir.Node, ir.Value]]:
    """Nodes that read a stored quantised weight in an unsupported format, and the value that they read."""
    supported = {site.quantised.node for site in sites if site.quantised is not None}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        index = QUANTISED_INPUTS.get(node.op_type, len(node.inputs))
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is not None and node not in supported and is_stored(value):
            yield node, value
