"""Graphs that compute in half precision and return fp32, as converters with `keep_io_types` make them.

The dtype of the outputs does not show in which precision a graph computes. Its weights do.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np

from lora_export.graph.find_sites import find_sites
from lora_export.graph.onnx_file.reading import open_graph
from lora_export.graph.values import stored_dtype
from lora_export.runtime.kv_cache import CacheRunner
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.runner import Arrays, Runner

HALVES = frozenset({"float16", "bfloat16"})
HALF_TYPES = frozenset({"tensor(float16)", "tensor(bfloat16)"})


def _graph_of(candidate: Runner) -> OnnxRunner | None:
    runner = candidate.inner if isinstance(candidate, CacheRunner) else candidate
    return runner if isinstance(runner, OnnxRunner) else None


def is_half_inside(candidate: Runner) -> bool:
    """Whether a graph has outputs in fp32, and most of its products with weights have these in half precision.

    False for everything but a graph. Reads no tensor data.
    """
    graph = _graph_of(candidate)
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


def as_declared(candidate: Runner, inputs: Arrays) -> Arrays:
    """The inputs; those in half precision in fp32 where the graph declares that. No number changes."""
    graph = _graph_of(candidate)
    if graph is None:
        return inputs
    wide = {value.name for value in graph.session.get_inputs() if value.type == "tensor(float)"}
    is_narrow = {name for name, array in inputs.items() if name in wide and array.dtype.name in HALVES}
    return {name: array.astype(np.float32) if name in is_narrow else array for name, array in inputs.items()}
