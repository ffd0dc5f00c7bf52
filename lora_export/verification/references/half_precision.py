"""Candidates in half precision: as a graph declares it, as its weights show, and where that was not stated.

Converters with `keep_io_types` make graphs that compute in half precision and return fp32. The dtype of the outputs
does not show in which precision such a graph computes. Its weights do.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np

from lora_export.graph.find_sites import find_sites
from lora_export.graph.onnx_file.reading import open_graph
from lora_export.graph.values import stored_dtype
from lora_export.options.spelling import named
from lora_export.runtime.runner import Runner
from lora_export.verification.candidate_outputs import OutputsByCase
from lora_export.verification.compare_outputs import aligned
from lora_export.verification.inputs.model_inputs import HALVES, graph_of

HALF_TYPES = frozenset({"tensor(float16)", "tensor(bfloat16)"})
EXPECTS_HALF = "expected: (tensor(float16))"  # onnxruntime's error for an input in float32


def is_half_inside(candidate: Runner) -> bool:
    """Whether a graph has outputs in fp32, and most of its products with weights have these in half precision.

    False for everything but a graph. Reads no tensor data.
    """
    graph = graph_of(candidate)
    if graph is None or any(output.type in HALF_TYPES for output in graph.session.get_outputs()):
        return False
    model = open_graph(graph.path).model
    if not any(stored_dtype(value) in HALVES for value in model.graph.initializers.values()):
        return False
    sites = find_sites(model)
    entries: Counter[bool] = Counter()
    for site in (*sites.linear, *sites.unnamed):
        is_half = site.dtype in HALVES or (site.quantised is None and stored_dtype(site.value) in HALVES)
        entries[is_half] += math.prod(site.shape)
    return entries[True] > entries[False]


def returns_halves(outputs: OutputsByCase, deployed: OutputsByCase, *, names_known: bool) -> bool:
    """Whether a candidate returns float16 for an output that PyTorch has."""
    for case, own in outputs.items():
        named_alike = aligned(own, deployed[case], names_known=names_known)
        if any(value.dtype == np.float16 and name in deployed[case] for name, value in named_alike.items()):
            return True
    return False


def note_on_half() -> str:
    """The note on a candidate in half precision of a model in float32."""
    precision = named("dtype", "float16")
    return f"the candidate is in half precision: {precision} compares it with the model in the same precision"


def explain_half(refusal: str) -> str:
    """The refusal, with what to do where the candidate takes float16 and the model float32."""
    if EXPECTS_HALF not in refusal:
        return refusal
    note = note_on_half()
    return f"{refusal}. {note[0].upper()}{note[1:]}"
