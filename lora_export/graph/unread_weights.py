"""Weights of a graph that are not read: matrices in other operators, and unsupported quantisation."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

import onnx_ir as ir

from lora_export.graph.names.exporter_names import looks_like_parameter, module_of_node, name_before_quantisation
from lora_export.graph.operators import MATRIX_PRODUCTS, QUANTISED_INPUTS
from lora_export.graph.site import Site
from lora_export.graph.values import is_stored, stored_dtype
from lora_export.plan import Layout, TensorSpec

ADAPTER_NAME = re.compile(r"(^|\.)lora_([AB]|zeros)\b")  # in the name of an adapter's tensor beside a layer
PRODUCT_NAMES = frozenset(name for _, name in MATRIX_PRODUCTS)


def unread_notes(model: ir.Model, sites: Iterable[Site]) -> Iterator[str]:
    """One note for each kind of node that holds weights and is not read."""
    sites = list(sites)
    for op_type, count in Counter(node.op_type for node, _ in _unsupported(model, sites)).items():
        yield f"{count} {op_type} nodes hold quantised weights in an unsupported format"
    for reader, count in Counter(_other_readers(model, sites)).items():
        yield f"{count} matrices are read by {reader}, which is not searched for linear layers"


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
