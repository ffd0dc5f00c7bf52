"""Metadata that exporters leave in a graph: names, which are needed, and notes on their machine, which are removed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir

FOLDED_FROM = "pkg.onnxscript.optimizer.folded_from"  # on a value; onnxscript's key
NAME_SCOPES = "pkg.torch.onnx.name_scopes"  # on a node; this and the next are PyTorch's keys
INPUT_KIND = "pkg.torch.export.graph_signature.InputSpec.kind"  # on an initializer
NAME_KEYS = frozenset({FOLDED_FROM, INPUT_KIND, NAME_SCOPES})  # the next adapter needs these
EXPORTER_KEYS = re.compile(r"pkg\.(torch|onnxscript|transformers)\b|namespace$")
STACK_TRACE_MARK = 'File "'  # every Python stack trace contains it


def remove_exporter_notes(model: ir.Model) -> None:
    """Remove stack traces, source lines and paths of the exporter's machine. Keep the names of modules and weights."""
    for element in elements(model):
        for key in [key for key, text in element.metadata_props.items() if not _is_publishable(key, text)]:
            del element.metadata_props[key]
        if element.doc_string and STACK_TRACE_MARK in element.doc_string:
            element.doc_string = None


def _is_publishable(key: str, text: str) -> bool:
    return key in NAME_KEYS or not (EXPORTER_KEYS.match(key) or STACK_TRACE_MARK in text)


def elements(model: ir.Model) -> Iterator[Any]:
    """All graphs, functions, nodes and values. Each has a name, a doc string and metadata properties."""
    graphs: list[ir.Graph | ir.Function] = [*model.graphs(), *model.functions.values()]
    for graph in graphs:
        yield from (graph, *graph.inputs)
        yield from graph.initializers.values() if isinstance(graph, ir.Graph) else ()
        for node in graph:
            yield from (node, *node.outputs)


def texts(model: ir.Model) -> Iterator[Any]:
    """All texts in a model: names, operators, doc strings and properties."""
    yield from (model.producer_name, model.producer_version, model.domain, model.doc_string, *model.opset_imports)
    for identifier in model.functions:
        yield from identifier
    for element in [model, *elements(model)]:
        yield from (element.doc_string, *element.metadata_props, *element.metadata_props.values())
        if not isinstance(element, ir.Model):
            yield element.name
        if isinstance(element, ir.Node):
            yield from (*element.op_identifier(), *element.attributes)
