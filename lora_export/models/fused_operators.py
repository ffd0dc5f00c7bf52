"""Onnxruntime's own operators in an exported graph, such as GroupQueryAttention and SkipSimplifiedLayerNormalization.

transformers has the rewrites. They pack q, k and v into one matrix, so that adapters are put into the graph before.

onnxruntime-genai keeps past and present in one buffer of the maximum length (`past_present_share_buffer`), so that no
token copies the cache. GroupQueryAttention reads and writes as much of it as its `total_sequence_length` states. The
shape of the past is then no length of what it contains, and the length is read from the mask.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import onnx_ir as ir

from lora_export.errors import RuntimeRefused
from lora_export.graph.cache_names import IDS, MASK, PAST
from lora_export.graph.operators import MICROSOFT, operator_id
from lora_export.layers.torch_internals import fusions_for
from lora_export.models.cached_decoder import BATCH_SYMBOL
from lora_export.models.export import is_nearly_neutral
from lora_export.models.refusals import innermost_cause
from lora_export.models.tracing import silence
from lora_export.options.spelling import named

ATTENTION = (MICROSOFT, "GroupQueryAttention")
PASTS, PRESENTS = (3, 4), (1, 2)  # places of the cache among its inputs, and among its outputs
RANK, LENGTH_AXIS = 4, 2  # of [batch, heads, length, features]


def fuse_operators(graph: ir.Model, provider: str) -> None:
    """Rewrite a graph for a provider of onnxruntime: "cpu", "cuda" or "webgpu". It then runs in onnxruntime only.

    Behind a past, GroupQueryAttention takes one token of each row at once, or several of a single row. For "cpu", the
    past may be a buffer that is longer than what it contains, where this operator alone reads it: the mask then has the
    length of the past and the new tokens.

    Raises RuntimeRefused where the rewrites fail on the graph, and EnvironmentLacking where transformers lacks them.
    """
    steps = list(fusions_for(provider))
    try:
        with silence(), _without_values(graph):
            for step, is_attention in steps:
                # transformers fuses a graph for any batch only where it takes one token at once. Decoders are given a
                # prompt, and then one token at once: what the operator computes for a single row is right for each.
                # CUDA has no kernel of it for float32.
                is_float = any(value.dtype is ir.DataType.FLOAT for value in graph.graph.inputs)
                for_any_batch = is_attention and not (provider == "cuda" and is_float)
                with _batch_of_one(graph) if for_any_batch else contextlib.nullcontext():
                    step(graph)
            if provider == "cpu":
                read_past_length_from_mask(graph)
    except Exception as error:
        raise RuntimeRefused(
            f"the graph's operators cannot be fused for {provider}: {innermost_cause(error)}",
            f"Without {named('fuse')} the graph keeps ONNX's own operators.",
        ) from error


@contextlib.contextmanager
def _without_values(graph: ir.Model) -> Iterator[None]:
    """Take the values of optional inputs, and of numbers that are nearly 0 or 1, away while active.

    The rewrites would take the former for constants, and the latter for 0 and 1 (see `models.export`).
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
            is_batch = [isinstance(size, ir.SymbolicDim) and size.value == BATCH_SYMBOL for size in shape]
            value.shape = ir.Shape([1 if batch else size for batch, size in zip(is_batch, shape, strict=True)])
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


# --- the length of a past ---


def read_past_length_from_mask(model: ir.Model) -> None:
    """Compute the length of the past as that of the mask minus that of the ids; in place.

    A graph in which more than GroupQueryAttention reads the cache stays as it is.
    """
    if not _only_attention_reads(model):
        return
    inputs = {value.name: value for value in model.graph.inputs}
    old = list(_lengths(model))
    if MASK not in inputs or not old:
        return
    total, new = (ir.node("Shape", [inputs[name]], {"start": 1, "end": 2}) for name in (MASK, IDS))
    past = ir.node("Sub", [total.outputs[0], new.outputs[0]])
    for node in (total, new, past):
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.INT64), ir.Shape([1])
    model.graph.insert_before(model.graph[0], [total, new, past])
    for node in old:
        ir.convenience.replace_all_uses_with(node.outputs[0], past.outputs[0])
        model.graph.remove(node, safe=True)


def takes_shared_buffer(model: ir.Model) -> bool:
    """Whether past and present may share a buffer that is longer than what it contains."""
    return _only_attention_reads(model) and not any(True for _ in _lengths(model))


def _only_attention_reads(model: ir.Model) -> bool:
    """Whether GroupQueryAttention alone reads each key and value of the past, and nothing reads those it returns."""
    pasts = list(_pasts(model))
    returned = set(model.graph.outputs)
    for past in pasts:
        readers = [(node, place) for node, place in past.uses() if not _is_shape(node)]
        if [(operator_id(node), place in PASTS) for node, place in readers] != [(ATTENTION, True)]:
            return False
        ((node, place),) = readers
        present = node.outputs[PRESENTS[PASTS.index(place)]]
        if present not in returned or present.uses():
            return False
    return bool(pasts)


def _lengths(model: ir.Model) -> Iterator[ir.Node]:
    """The nodes that read the length of the past from its shape."""
    for past in _pasts(model):
        yield from (node for node, _ in past.uses() if _is_shape(node) and LENGTH_AXIS in _axes(node))


def _pasts(model: ir.Model) -> Iterator[ir.Value]:
    return (value for value in model.graph.inputs if (value.name or "").startswith(f"{PAST}."))


def _is_shape(node: ir.Node) -> bool:
    """Whether a node reads single sizes of a shape, the length alone or any but the length."""
    return operator_id(node) == ("", "Shape") and (LENGTH_AXIS not in (axes := _axes(node)) or len(axes) == 1)


def _axes(node: ir.Node) -> range:
    return range(RANK)[node.attributes.get_int("start", 0) : node.attributes.get_int("end", RANK)]
