"""Onnxruntime's own operators in an exported graph, such as GroupQueryAttention and SkipSimplifiedLayerNormalization.

transformers has the rewrites. They pack q, k and v into one matrix, so that adapters are put into the graph before.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir

from lora_export.errors import RuntimeRefused
from lora_export.models.cached_decoder import BATCH_SYMBOL
from lora_export.models.export import silence
from lora_export.models.failures import innermost_cause
from lora_export.models.past_length import read_past_length_from_mask
from lora_export.models.simplify import is_nearly_neutral
from lora_export.options.spelling import named


def fuse_operators(graph: ir.Model, provider: str) -> None:
    """Rewrite a graph for a provider of onnxruntime: "cpu", "cuda" or "webgpu". It then runs in onnxruntime only.

    Behind a past, GroupQueryAttention takes one token of each row at once, or several of a single row. For "cpu", the
    past may be a buffer that is longer than what it contains, where this operator alone reads it: the mask then has the
    length of the past and the new tokens.

    Raises RuntimeRefused where the rewrites fail on the graph.
    """
    fusions: Any = importlib.import_module("transformers.exporters.onnxruntime_fusions")
    try:
        with silence(), _without_values(graph):
            for step, providers in fusions._STEPS:
                if providers is not None and provider not in providers:
                    continue
                is_attention = getattr(step, "func", step) is fusions._fuse_group_query_attention
                # transformers fuses a graph for any batch only where it takes one token at once. Decoders are given a
                # prompt, and then one token at once: what the operator computes for a single row is right for each.
                for_any_batch = is_attention and _runs_on(provider, graph)
                with _batch_of_one(graph) if for_any_batch else contextlib.nullcontext():
                    step(graph)
            if provider == "cpu":
                read_past_length_from_mask(graph)
    except Exception as error:
        raise RuntimeRefused(
            f"the graph's operators cannot be fused for {provider}: {innermost_cause(error)}",
            f"Without {named('fuse')} the graph keeps ONNX's own operators.",
        ) from error


def _runs_on(provider: str, graph: ir.Model) -> bool:
    """Whether the provider has a kernel of GroupQueryAttention for the graph's cache: CUDA has none for float32."""
    dtypes = {value.dtype for value in graph.graph.inputs}
    return provider != "cuda" or ir.DataType.FLOAT not in dtypes


@contextlib.contextmanager
def _without_values(graph: ir.Model) -> Iterator[None]:
    """Take the values of optional inputs, and of numbers that are nearly 0 or 1, away while active.

    The rewrites would take the former for constants, and the latter for 0 and 1 (see `models.simplify`).
    """
    hidden = {
        value: value.const_value
        for value in graph.graph.initializers.values()
        if value.is_graph_input() or (value.const_value is not None and is_nearly_neutral(value.const_value))
    }
    numbers = [value for value in hidden if not value.is_graph_input()]
    for value in hidden:
        del graph.graph.initializers[value.name or ""]
        value.const_value = None
    count = len(graph.graph.inputs)
    graph.graph.inputs.extend(numbers)
    try:
        yield
    finally:
        del graph.graph.inputs[count:]
        for value, tensor in hidden.items():
            value.const_value = tensor
            if value.is_graph_input() or value.uses():
                graph.graph.register_initializer(value)


@contextlib.contextmanager
def _batch_of_one(graph: ir.Model) -> Iterator[None]:
    """Declare the batch to be 1 in all shapes while active. Shapes of values that are made meanwhile are forgotten."""
    before = {value: value.shape for value in _values(graph)}
    outputs = [value.shape for value in graph.graph.outputs]
    for value, shape in before.items():
        if shape is not None:
            value.shape = ir.Shape([1 if _is_batch(size) else size for size in shape])
    try:
        yield
    finally:
        for value in _values(graph):
            value.shape = before.get(value)
        for value, shape in zip(graph.graph.outputs, outputs, strict=True):
            value.shape = shape


def _values(graph: ir.Model) -> Iterator[ir.Value]:
    """The inputs and what the nodes make: all values whose shape may contain the batch."""
    yield from graph.graph.inputs
    for node in ir.traversal.RecursiveGraphIterator(graph.graph):
        yield from node.outputs


def _is_batch(size: int | ir.SymbolicDim) -> bool:
    return isinstance(size, ir.SymbolicDim) and size.value == BATCH_SYMBOL
