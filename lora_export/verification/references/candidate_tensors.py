"""The float tensors of a candidate, of whatever kind it is, compared with those of the model."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lora_export import layers
from lora_export.graph.site import NameSource
from lora_export.layers.module_tensors import named_tensors, tensor_name
from lora_export.models.pt2.program import Program
from lora_export.models.stored_parameter import StoredParameter, state_of
from lora_export.plan import FLOATS, Plan
from lora_export.runtime.runner import Runner
from lora_export.runtime.several_graphs import graphs_of
from lora_export.runtime.torch_runners import ModuleRunner, to_numpy
from lora_export.runtime.torchscript.runner import ScriptRunner
from lora_export.verification.parity import Array, Findings, Wide
from lora_export.verification.references.compare_tensors import CandidateTensor, compare_expected, tensors_of_graph
from lora_export.verification.references.expected_weight import ExpectedWeight
from lora_export.verification.references.folded_norms import BatchNorm

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
            if _is_compared(tensor):
                load = functools.partial(_values, tensor)
                yield CandidateTensor(name.replace(UNMERGED, "."), source, tuple(tensor.shape), load)
    elif isinstance(candidate, ScriptRunner):
        for name, array in candidate.state().items():
            if array.dtype.name in FLOATS and array.size and array.ndim:
                load = functools.partial(np.asarray, array)
                yield CandidateTensor(name.replace(UNMERGED, "."), NameSource.INITIALIZER, array.shape, load)
    for graph in graphs_of(candidate):
        if isinstance(graph.source, Path):
            yield from tensors_of_graph(graph.file().model)


def _is_compared(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.numel() and tensor.ndim)


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
        if own is not None and spec.dtype in FLOATS and _is_compared(own):
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
