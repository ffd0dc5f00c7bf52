"""Half precision, as a candidate declares it or its weights show it, and what to do where it was not stated.

Converters with `keep_io_types` make graphs that compute in half precision and return fp32. The dtype of the outputs
does not show in which precision such a graph computes. Its weights do.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import torch
from torch import nn

from lora_export.graph.find_sites import find_sites
from lora_export.graph.values import stored_dtype
from lora_export.options.spelling import named
from lora_export.runtime.kv_cache import graph_of
from lora_export.runtime.runner import Runner
from lora_export.runtime.torch_runners import ModuleRunner
from lora_export.verification.candidate_outputs import OutputsByCase
from lora_export.verification.compare_outputs import aligned
from lora_export.verification.inputs.model_inputs import HALVES

TORCH_HALVES = frozenset({torch.float16, torch.bfloat16})
HALF_TYPES = frozenset({"tensor(float16)", "tensor(bfloat16)"})
EXPECTS_HALF = "expected: (tensor(float16))"  # onnxruntime's error for an input in float32 or bfloat16


def candidate_dtype(candidate: Runner) -> torch.dtype:
    """The half precision of a candidate that PyTorch runs; float32 of every other candidate."""
    return candidate.dtype if isinstance(candidate, ModuleRunner) and candidate.dtype in TORCH_HALVES else torch.float32


def coarser_dtype(candidate: Runner, module: nn.Module) -> torch.dtype:
    """The coarser of the candidate's dtype and the module's: a half precision of either, or float32."""
    own = candidate_dtype(candidate)
    halves = (tensor.dtype for tensor in module.parameters() if tensor.dtype in TORCH_HALVES)
    return own if own in TORCH_HALVES else next(halves, own)


def is_half_inside(candidate: Runner) -> bool:
    """Whether a graph has outputs in fp32, and most of its products with weights have these in half precision.

    False for everything but a graph. Reads no tensor data.
    """
    graph = graph_of(candidate)
    if graph is None or any(output.type in HALF_TYPES for output in graph.session.get_outputs()):
        return False
    model = graph.file().model
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
    return any(
        value.dtype == np.float16 and name in deployed[case]
        for case, own in outputs.items()
        for name, value in aligned(own, deployed[case], names_known=names_known).items()
    )


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
