"""The weights of a candidate: quantised in a graph, or rounded to half precision; and all of them beside the model's.

Converters with `keep_io_types` make graphs that compute in half precision and return fp32. The dtype of the outputs
does not show in which precision such a graph computes. Its weights do.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lora_export import layers
from lora_export.errors import Different, InputRefused
from lora_export.graph.find_sites import find_sites
from lora_export.graph.onnx_file.reading import load_graph, open_graph
from lora_export.graph.site import NameSource
from lora_export.graph.values import stored_dtype
from lora_export.layers.module_tensors import named_tensors, tensor_name
from lora_export.models.model import Model
from lora_export.models.pt2.program import Program
from lora_export.models.stored_parameter import StoredParameter, state_of
from lora_export.options.spelling import named
from lora_export.plan import FLOATS, Plan
from lora_export.runtime.kv_cache import CacheRunner, graph_of
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.runner import Arrays, Runner
from lora_export.runtime.several_graphs import SeveralGraphs
from lora_export.runtime.torch_runners import ModuleRunner, to_numpy
from lora_export.runtime.torchscript.runner import ScriptRunner
from lora_export.verification.candidate_outputs import OutputsByCase
from lora_export.verification.compare_outputs import aligned
from lora_export.verification.inputs.model_inputs import HALVES
from lora_export.verification.parity import Array, Findings, Wide
from lora_export.verification.references import quantised_weights
from lora_export.verification.references.compare_tensors import (
    CandidateTensor,
    compare_expected,
    tensors_of_graph,
)
from lora_export.verification.references.expected_weight import ExpectedWeight
from lora_export.verification.references.folded_norms import BatchNorm
from lora_export.verification.references.quantised_weights import DequantisedWeight


def quantised_weights_of(
    candidate: Runner,
    model: Model,
    changes: Plan | None,
    origin: Path | None,
    inputs: Mapping[str, Arrays],
    *,
    has_own_heads: bool = False,
) -> dict[str, DequantisedWeight]:
    """The quantised weights of an ONNX candidate, of all graphs of a model; none of any other candidate.

    With `has_own_heads`, the whole tensors of adapters are not in the candidate's own weights, which are then left out.

    Raises InputRefused where `origin` names a quantised graph and the candidate has no quantised weights, and Different
    where two graphs store a weight with other numbers.
    """
    runner = candidate.inner if isinstance(candidate, CacheRunner) else candidate
    quantised = {}
    steps = changes.steps if changes is not None and has_own_heads else ()
    heads = [step.weight for step in steps if step.is_replacement]
    if isinstance(runner, OnnxRunner):
        executed = functools.partial(_executed_nodes, candidate, runner, next(iter(inputs.values())))
        quantised = quantised_weights.find(runner.path, model, changes, origin, executed, skip=heads)
    if isinstance(runner, SeveralGraphs):
        for graph in runner.graphs:
            own = quantised_weights.find(graph.path, model, changes)
            _refuse_other_numbers(quantised, own, graph.path)
            quantised |= own
    if origin is not None and not quantised:
        raise InputRefused(
            f"the candidate has no quantised weights, so it was not made from {origin}. Leave out {named('base')}, "
            "or name the graph that the candidate was made from"
        )
    return quantised


def _refuse_other_numbers(
    known: Mapping[str, DequantisedWeight], own: Mapping[str, DequantisedWeight], graph: Path
) -> None:
    """Raise Different for a weight whose numbers in a graph are not those of the graphs before it."""
    others = [name for name in own if name in known and not np.array_equal(own[name].values, known[name].values)]
    if others:
        raise Different(f"{graph.name} has other numbers in {', '.join(others)} than the graphs beside it")


def _executed_nodes(candidate: Runner, graph: OnnxRunner, arrays: Arrays) -> frozenset[tuple[str, str]]:
    """(node, operator) of the graph as onnxruntime optimises it."""

    def run(other: OnnxRunner) -> None:
        (replace(candidate, inner=other) if isinstance(candidate, CacheRunner) else other).run(arrays)

    return graph.executed_nodes(run)


def rounding_of(
    candidate: Runner, module: nn.Module, quantised: Mapping[str, DequantisedWeight]
) -> tuple[dict[str, layers.Rounding], Mapping[str, torch.Tensor]]:
    """The rounding of each of the module's tensors that a candidate stores rounded, and the candidate's values.

    These are the arguments `rounding` and `preferred` of `layers.materialise`.
    """
    if not isinstance(candidate, ModuleRunner):
        merged = {name: weight for name, weight in quantised.items() if weight.merge is not None}
        values = {name: torch.from_numpy(weight.values) for name, weight in merged.items()}
        return {name: weight.nearest for name, weight in merged.items()}, values
    stored = _with_tied_names(candidate.module, candidate.stored_dtypes)
    dtypes = {spec.name: _dtype_in_file(spec.name, stored) for spec in layers.specs(module)}
    rounding: dict[str, layers.Rounding] = {name: dtype for name, dtype in dtypes.items() if dtype in HALVES}
    return rounding, state_of(candidate.module)


def _with_tied_names(module: nn.Module, stored: Mapping[str, str]) -> dict[str, str]:
    """The dtypes of stored tensors, under all names of a tied tensor. A file may have one of them."""
    tensors = [(name, id(tensor)) for name, _, _, tensor in named_tensors(module)]
    found = {memory: dtype for name, memory in tensors if (dtype := _dtype_in_file(name, stored))}
    return {name: found[memory] for name, memory in tensors if memory in found} | dict(stored)


def _dtype_in_file(name: str, stored: Mapping[str, str]) -> str:
    """The dtype of a module's tensor in a file. Empty where the file has no tensor of this name."""
    if name in stored:
        return stored[name]
    # A checkpoint may lack the model's prefix, or have one that the module lacks.
    return next((dtype for own, dtype in stored.items() if name.endswith(f".{own}") or own.endswith(f".{name}")), "")


# --- half precision: as a graph declares it, as its weights show, and where that was not stated ---

TORCH_HALVES = frozenset({torch.float16, torch.bfloat16})
HALF_TYPES = frozenset({"tensor(float16)", "tensor(bfloat16)"})
EXPECTS_HALF = "expected: (tensor(float16))"  # onnxruntime's error for an input in float32


def candidate_dtype(candidate: Runner) -> torch.dtype:
    """The half precision of a candidate that PyTorch runs; float32 of every other candidate."""
    return candidate.dtype if isinstance(candidate, ModuleRunner) and candidate.dtype in TORCH_HALVES else torch.float32


def coarser_dtype(candidate: Runner, module: nn.Module) -> torch.dtype:
    """The coarser of the candidate's dtype and the module's: a half precision of either, or float32."""
    own = candidate_dtype(candidate)
    halves = (tensor.dtype for tensor in module.parameters() if tensor.dtype in TORCH_HALVES)
    return own if own in TORCH_HALVES else next(halves, own)


def dtype_name(dtype: torch.dtype) -> str:
    """The name as NumPy has it, such as `float16`."""
    return str(dtype).removeprefix("torch.")


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


# --- all weights, compared with the model's ---

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
UNMERGED = ".base_layer."  # in PEFT's names of the weights beside its adapters


def compare_tensors(
    tensors: Iterable[CandidateTensor], module: nn.Module, changes: Plan | None, elsewhere: Iterable[str] = ()
) -> Findings:
    """Compare each tensor of a candidate with that of the model, or with its sum with what adapters add to it.

    `elsewhere` are tensors of the model that are judged in another way. Reads one tensor of each at a time, in blocks.
    """
    return compare_expected(tensors, _expected(module, changes), elsewhere, norms=_batch_norms(module))


def candidate_tensors(candidate: Runner) -> Iterator[CandidateTensor]:
    if isinstance(candidate, ModuleRunner):
        source = NameSource.INITIALIZER if isinstance(candidate.module, Program) else None
        for name, tensor in state_of(candidate.module).items():
            if tensor.is_floating_point() and tensor.numel() and tensor.ndim:
                load = functools.partial(_values, tensor)
                yield CandidateTensor(name.replace(UNMERGED, "."), source, tuple(tensor.shape), load)
        return
    if isinstance(candidate, ScriptRunner):
        for name, array in candidate.state().items():
            if array.dtype.name in FLOATS and array.size and array.ndim:
                load = functools.partial(np.asarray, array)
                yield CandidateTensor(name.replace(UNMERGED, "."), NameSource.INITIALIZER, array.shape, load)
        return
    own = graph_of(candidate)
    graphs = candidate.graphs if isinstance(candidate, SeveralGraphs) else () if own is None else (own,)
    for graph in graphs:
        if isinstance(graph.source, Path):
            yield from tensors_of_graph(load_graph(graph.source))


def _values(tensor: torch.Tensor) -> Array:
    if isinstance(tensor, StoredParameter):
        stored = tensor.stored()
        tensor = stored.to(tensor.dtype) if tensor.dtype.itemsize < stored.dtype.itemsize else stored
    return to_numpy(tensor)


def _expected(module: nn.Module, changes: Plan | None) -> Iterator[tuple[int, ExpectedWeight]]:
    """The tensors of the model, each with the identity of its memory: tied ones have the same."""
    specs = {spec.name: spec for spec in layers.specs(module)}
    tensors = state_of(module)
    for name, _, _, tensor in named_tensors(module):
        spec, own = specs[name], tensors.get(name)
        if own is None or spec.dtype not in FLOATS or not own.is_floating_point() or not own.numel() or not own.ndim:
            continue
        steps = () if changes is None else changes.by_part.get(name, ())
        if changes is not None and name in changes.by_weight:
            steps = (changes.by_weight[name],)
        yield id(tensor), ExpectedWeight(spec, functools.partial(_values, own), steps)


def _batch_norms(module: nn.Module) -> Iterator[BatchNorm]:
    """The batch norms of a module that can be undone: a factor of 0 leaves nothing of a weight."""
    for path, norm in module.named_modules():
        if isinstance(norm, BATCH_NORMS) and norm.running_var is not None and norm.running_mean is not None:
            deviation = np.sqrt(_wide(norm.running_var) + norm.eps)
            factor = (np.ones_like(deviation) if norm.weight is None else _wide(norm.weight)) / deviation
            shift = np.zeros_like(deviation) if norm.bias is None else _wide(norm.bias)
            if np.isfinite(factor).all() and factor.all():
                yield BatchNorm(tensor_name(path, "running_var"), factor, _wide(norm.running_mean), shift)


def _wide(tensor: torch.Tensor) -> Wide:
    return _values(tensor).astype(np.float64)
