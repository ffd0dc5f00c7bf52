"""The length of a past, read from the mask: a runtime may then pass a longer buffer as the past.

onnxruntime-genai keeps past and present in one buffer of the maximum length (`past_present_share_buffer`), so that no
token copies the cache. GroupQueryAttention reads and writes as much of it as its `total_sequence_length` states. The
shape of the past is then no length of what it contains.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from lora_export.graph.cache_names import IDS, MASK, PAST
from lora_export.graph.operators import MICROSOFT, operator_id

ATTENTION = (MICROSOFT, "GroupQueryAttention")
PASTS, PRESENTS = (3, 4), (1, 2)  # places of the cache among its inputs, and among its outputs
RANK, LENGTH_AXIS = 4, 2  # of [batch, heads, length, features]


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
