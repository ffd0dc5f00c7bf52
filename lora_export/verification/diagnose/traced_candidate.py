"""One case of a proof, with everything that ran it, and the inner values of its candidate, module by module."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import nn

from lora_export import layers
from lora_export.errors import InputRefused
from lora_export.graph.content_match import Spellings
from lora_export.graph.find_sites import find_sites
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.layers import MatrixWeight
from lora_export.plan import Layout, Plan
from lora_export.runtime.kv_cache import CacheRunner, graph_of
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.runner import Arrays, Runner
from lora_export.runtime.torch_runners import Fp64Runner, ModuleRunner
from lora_export.runtime.torchscript.runner import ScriptRunner
from lora_export.verification import parity
from lora_export.verification.compare_outputs import aligned
from lora_export.verification.diagnose.graph_taps import Tap, expose, find_taps
from lora_export.verification.diagnose.module_calls import (
    CallValues,
    ModuleCall,
    matrix_weights,
    record_calls,
    weight_matrix,
)
from lora_export.verification.module_copies import converted_copy
from lora_export.verification.parity import Array, Wide


@dataclass(frozen=True, eq=False)
class DiagnosisCase:
    """One case of a proof, with the candidate, the references and PyTorch."""

    candidate: Runner
    reference: Fp64Runner
    attached: Fp64Runner  # with the adapters unrounded; the reference itself where nothing is rounded
    deployed: ModuleRunner
    base: nn.Module  # without adapters
    plan: Plan | None
    inputs: Arrays
    outputs: parity.Case  # of all of them
    keep_replaced: bool = False  # the base without adapters keeps the tensors that an adapter replaces whole

    @cached_property
    def base_weights(self) -> dict[str, MatrixWeight]:
        return matrix_weights(self.base)

    @cached_property
    def attached_weights(self) -> dict[str, MatrixWeight]:
        return matrix_weights(self.attached.module)

    @cached_property
    def rounded_weights(self) -> dict[str, MatrixWeight]:
        """The weights of the reference, where it rounds some; else an empty dict."""
        return {} if self.reference is self.attached else matrix_weights(self.reference.module)

    def reference_values(self, calls: Collection[ModuleCall], **inputs: Array) -> dict[ModuleCall, CallValues]:
        """The values of calls in the reference, with some inputs changed."""
        return record_calls(self.reference.module, lambda: self.reference.run({**self.inputs, **inputs}), calls)

    def deployed_values(self, calls: Collection[ModuleCall], **inputs: Array) -> dict[ModuleCall, CallValues]:
        """The values of calls in PyTorch as deployed, with some inputs changed."""
        return record_calls(self.deployed.module, lambda: self.deployed.run({**self.inputs, **inputs}), calls)

    def base_values(self, calls: Collection[ModuleCall]) -> dict[ModuleCall, CallValues]:
        """The values of calls without adapters; an empty dict where there are none."""
        if self.plan is None:
            return {}
        with layers.scale_adapters(self.attached.module, 0.0, keep_replaced=self.keep_replaced, in_fp64=True):
            return record_calls(self.attached.module, lambda: self.attached.run(self.inputs), calls)


def outputs_renamed(outputs: Arrays, others: Mapping[str, Array]) -> Arrays:
    """Outputs under the names of others, by order; unchanged where their numbers differ."""
    return aligned(outputs, others, names_known=outputs.keys() == others.keys())


# --- the candidate: outputs added to a graph, or hooks on a module ---

SCRIPT_RTOL, SCRIPT_ATOL = 1e-4, 1e-5  # within which a script must compute what a module with its weights does


class TracedCandidate(Protocol):
    """A candidate whose inner values can be read."""

    @property
    def calls(self) -> Sequence[ModuleCall]:  # in the order in which they run; empty where any may be traced
        return []

    def run(self, inputs: Arrays, calls: Sequence[ModuleCall]) -> dict[ModuleCall, CallValues]: ...

    def outputs(self, inputs: Arrays) -> Arrays: ...

    def stored_weight(self, call: ModuleCall) -> Wide | None: ...

    def has_bias(self, call: ModuleCall) -> bool:  # noqa: ARG002
        """Whether the call's output contains the bias."""
        return True


def trace(case: DiagnosisCase) -> TracedCandidate:
    """The candidate of a case with readable inner values. Raises InputRefused where they cannot be read."""
    candidate = case.candidate
    if isinstance(candidate, OnnxRunner):
        return TracedGraph(candidate, case.base_weights, tuple(case.inputs))
    if isinstance(candidate, CacheRunner) and graph_of(candidate) is not None:
        return TracedGraph(candidate.inner, case.base_weights, tuple(case.inputs), candidate)
    if isinstance(candidate, ModuleRunner):
        return TracedModule(candidate)
    if isinstance(candidate, ScriptRunner):
        return TracedModule(ModuleRunner(_module_with_weights_of(candidate, case)))
    raise InputRefused("what runs the candidate gives its outputs alone")


class TracedGraph(TracedCandidate):
    """A graph with inner values as further outputs, in memory; its weights are read from their files.

    A graph with a `cache` takes a prompt, with an empty cache.
    """

    def __init__(
        self,
        runner: OnnxRunner,
        weights: Mapping[str, MatrixWeight],
        inputs: Sequence[str],
        cache: CacheRunner | None = None,
    ):
        self.cache = cache
        model = load_graph(runner.path)
        sites = find_sites(model)
        of_model = Spellings(weights).of  # either name may have a prefix that the other lacks
        names = {name: own for name in sites.by_name if (own := of_model(name))}
        names = {name: own for name, own in names.items() if own == name or own not in names}
        biased = {name: weights[model_name].has_bias for name, model_name in names.items()}
        self.taps: dict[ModuleCall, Tap] = {}
        for tap in find_taps(model, sites, inputs, biased):
            name = names[tap.name]
            number = sum(call.weight == name for call in self.taps)
            self.taps[ModuleCall(name, number)] = tap
        if not self.taps:
            raise InputRefused("no weight of the graph has the name of a weight of the model")
        exposed = expose(model, list(self.taps.values()))
        self.added_outputs = set(exposed.outputs)
        self.runner = runner.with_graph(exposed.message, exposed.folder)

    @property
    def calls(self) -> Sequence[ModuleCall]:
        return [call for call, tap in self.taps.items() if tap.y is not None]

    def run(self, inputs: Arrays, calls: Sequence[ModuleCall]) -> dict[ModuleCall, CallValues]:
        names = {name for call in calls for name in (self.taps[call].x, self.taps[call].y) if name}
        feeds = self._feeds(inputs)
        values = {**feeds, **self.runner.run(feeds, sorted(names - feeds.keys()))}
        found = {}
        for call in calls:
            tap = self.taps[call]
            found[call] = CallValues(values[tap.x] if tap.x else None, values[tap.y or ""])
        return found

    def with_other_adapters(self) -> Iterator[tuple[str, TracedGraph]]:
        """The same graph with each other adapter that it contains, where all rows have one adapter id."""
        names, ids = self.runner.adapters_by_row, self.runner.adapter_ids
        if ids is None or len(ids) != 1 or names is None:
            return
        for number, name in enumerate(["the base", *names]):
            if number != ids[0]:
                other = copy.copy(self)
                other.runner = self.runner.with_rows([number])
                yield f"adapter id {number} ({name})", other

    @property
    def lacks_adapter(self) -> bool:
        return self.runner.lacks_adapter

    def outputs(self, inputs: Arrays) -> Arrays:
        others = self.added_outputs | ({tensor.present for tensor in self.cache.cache} if self.cache else set())
        names = [value.name for value in self.runner.session.get_outputs() if value.name not in others]
        return self.runner.run(self._feeds(inputs), names)

    def stored_weight(self, call: ModuleCall) -> Wide | None:
        site = self.taps[call].site
        matrix = site.array.T if site.layout is Layout.EMBEDDING else site.matrix
        return matrix.reshape(len(matrix), -1).astype(np.float64)

    def has_bias(self, call: ModuleCall) -> bool:
        return self.taps[call].has_bias

    def _feeds(self, inputs: Arrays) -> Arrays:
        return inputs if self.cache is None else self.cache.prompt_feeds(inputs)


class TracedModule(TracedCandidate):
    """A module whose calls are recorded by hooks."""

    def __init__(self, runner: ModuleRunner):
        self.runner = runner
        self.weights = matrix_weights(runner.module)
        if not self.weights:
            raise InputRefused("the module has no layer whose calls can be recorded")

    def run(self, inputs: Arrays, calls: Sequence[ModuleCall]) -> dict[ModuleCall, CallValues]:
        return record_calls(self.runner.module, lambda: self.runner.run(inputs), calls)

    def outputs(self, inputs: Arrays) -> Arrays:
        return self.runner.run(inputs)

    def stored_weight(self, call: ModuleCall) -> Wide | None:
        return weight_matrix(self.weights[call.weight])


def _module_with_weights_of(candidate: ScriptRunner, case: DiagnosisCase) -> nn.Module:
    """The model with a TorchScript file's weights, A and B included: hooks do not see the script's own modules."""
    state = {name: torch.from_numpy(array) for name, array in candidate.state().items()}
    for own in (case.base, case.deployed.module):
        module = converted_copy(own, lambda tensor: tensor.detach().clone())
        names = module.state_dict().keys()
        if names <= state.keys() <= names | dict(module.named_buffers()).keys():  # a script stores every buffer
            break
    else:
        raise InputRefused("the TorchScript file has other tensors than the model, so its modules cannot be traced")
    module.load_state_dict({name: state[name] for name in names})
    outputs = outputs_renamed(ModuleRunner(module).run(case.inputs), case.outputs.candidate)
    for name, value in case.outputs.candidate.items():
        if name not in outputs or not np.allclose(outputs[name], value, rtol=SCRIPT_RTOL, atol=SCRIPT_ATOL):
            raise InputRefused(f"the model with the TorchScript file's weights computes another {name} than the file")
    return module
