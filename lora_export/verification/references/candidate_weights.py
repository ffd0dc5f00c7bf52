"""How a candidate stores its weights: quantised in a graph, or rounded to half precision."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lora_export import layers
from lora_export.errors import Different, InputRefused
from lora_export.layers.module_tensors import named_tensors
from lora_export.models.model import Model
from lora_export.models.stored_parameter import state_of
from lora_export.options.spelling import named
from lora_export.plan import Plan
from lora_export.plan.match_names import endings
from lora_export.runtime.kv_cache import CacheRunner, graph_of
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.runner import Arrays, Runner
from lora_export.runtime.several_graphs import SeveralGraphs
from lora_export.runtime.torch_runners import ModuleRunner
from lora_export.verification.inputs.model_inputs import HALVES
from lora_export.verification.references import quantised_weights
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
    quantised: dict[str, DequantisedWeight] = {}
    heads = [step.weight for step in changes.steps if step.is_replacement] if changes and has_own_heads else ()
    if (whole := graph_of(candidate)) is not None:

        def run(other: OnnxRunner) -> None:
            runner = replace(candidate, inner=other) if isinstance(candidate, CacheRunner) else other
            runner.run(next(iter(inputs.values())))

        executed = functools.partial(whole.executed_nodes, run)
        quantised = quantised_weights.find(whole.file(), model, changes, origin, executed, skip=heads)
    for graph in candidate.graphs if isinstance(candidate, SeveralGraphs) else ():
        own = quantised_weights.find(graph.file(), model, changes)
        known = {name: weight.values for name, weight in own.items() if name in quantised}
        others = [name for name, values in known.items() if not np.array_equal(values, quantised[name].values)]
        if others:
            raise Different(f"{graph.path.name} has other numbers in {', '.join(others)} than the graphs beside it")
        quantised |= own
    if origin is not None and not quantised:
        raise InputRefused(
            f"the candidate has no quantised weights, so it was not made from {origin}. Leave out {named('base')}, "
            "or name the graph that the candidate was made from"
        )
    return quantised


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
    dtypes = _dtypes_in_file((spec.name for spec in layers.specs(module)), stored)
    return {name: dtype for name, dtype in dtypes.items() if dtype in HALVES}, state_of(candidate.module)


def _with_tied_names(module: nn.Module, stored: Mapping[str, str]) -> dict[str, str]:
    """The dtypes of stored tensors, under all names of a tied tensor. A file may have one of them."""
    memory = {name: id(tensor) for name, _, _, tensor in named_tensors(module)}
    found = {memory[name]: dtype for name, dtype in _dtypes_in_file(memory, stored).items()}
    return {name: found[own] for name, own in memory.items() if own in found} | dict(stored)


def _dtypes_in_file(names: Iterable[str], stored: Mapping[str, str]) -> dict[str, str]:
    """The dtypes of a module's tensors in a file, without those that it lacks.

    A checkpoint may lack the model's prefix, or have one that the module lacks.
    """
    longer: dict[str, str] = {}
    for own, dtype in stored.items():
        for ending in endings(own):
            longer.setdefault(ending, dtype)
    dtypes = {name: next((stored[own] for own in endings(name) if own in stored), longer.get(name)) for name in names}
    return {name: dtype for name, dtype in dtypes.items() if dtype}
