"""The weights of a candidate, compared with those of the model, all of them, before anything is run."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lora_export import layers
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.graph.site import NameSource
from lora_export.layers.module_tensors import named_tensors
from lora_export.models.model import Model
from lora_export.models.pt2.program import Program
from lora_export.models.stored_parameter import StoredParameter, state_of
from lora_export.plan import FLOATS, Plan
from lora_export.runtime.kv_cache import graph_of
from lora_export.runtime.runner import Runner
from lora_export.runtime.several_graphs import SeveralGraphs
from lora_export.runtime.torch_runners import ModuleRunner, to_numpy
from lora_export.runtime.torchscript.runner import ScriptRunner
from lora_export.verification.parity import Array
from lora_export.verification.references.compare_tensors import (
    CandidateTensor,
    ComparedWeights,
    compare_expected,
    tensors_of_graph,
)
from lora_export.verification.references.expected_weight import ExpectedWeight

UNMERGED = ".base_layer."  # in PEFT's names of the weights beside its adapters


def compare_weights(
    candidate: Runner, model: Model, changes: Plan | None, elsewhere: Iterable[str] = (), skip: Collection[str] = ()
) -> ComparedWeights:
    """Compare each tensor of the candidate with that of the model, or with its sum with what adapters add to it.

    `elsewhere` are tensors of the model that are judged in another way, and `skip` those of them that the candidate has
    as floats. Nothing is compared where the candidate gives no weights. Reads one tensor of each at a time, in blocks.
    """
    tensors = [tensor for tensor in candidate_tensors(candidate) if tensor.name not in skip]
    return compare_tensors(tensors, model.module, changes, elsewhere) if tensors else ComparedWeights()


def compare_tensors(
    tensors: Iterable[CandidateTensor], module: nn.Module, changes: Plan | None, elsewhere: Iterable[str] = ()
) -> ComparedWeights:
    """See `compare_weights`."""
    return compare_expected(tensors, _expected(module, changes), elsewhere)


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
