"""Who answers beside the candidate: references in fp64, and PyTorch as it would be deployed, in one place of memory.

The reference attaches the adapters as branches and never merges them, so that it shares no
arithmetic with what it judges.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_export import layers, plan
from lora_export.errors import InputRefused
from lora_export.lora import Adapter
from lora_export.models.model import Model
from lora_export.models.pt2.program import Program
from lora_export.plan import Plan
from lora_export.runtime.kv_cache import CacheRunner
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.runner import Arrays, Runner
from lora_export.runtime.torch_runners import NARROW_DTYPES, Fp64Runner, ModuleRunner
from lora_export.verification import parity
from lora_export.verification.references import quantised_weights
from lora_export.verification.references.quantised_weights import DequantisedWeight

FACTORS = {"base": 0.0, "scaled": parity.CONTROL_SCALE}  # on every scale, of roles other than the reference
HALVES = frozenset({torch.float16, torch.bfloat16})


def adapted(model: Model, adapters: Sequence[Adapter], strengths: Sequence[float] | None = None) -> nn.Module:
    """A copy of the model's module with the adapters attached; raises MatchError where they do not fit it."""
    return with_adapters(copy.deepcopy(model.module), adapters, strengths)


def with_adapters(module: nn.Module, adapters: Sequence[Adapter], strengths: Sequence[float] | None) -> nn.Module:
    if strengths and not adapters:
        raise InputRefused("there are strengths and no adapters that they could belong to")
    if adapters:
        layers.attach(module, plan.make(adapters, layers.specs(module), strengths=strengths))
    return module.eval()


def copied(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """A copy of which each parameter and buffer is what `change` makes of the original's: no more memory than that."""
    memo: dict[int, Any] = {}
    for tensor in _tensors(module):
        made = change(tensor.detach())
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(made, requires_grad=tensor.requires_grad) if is_parameter else made
    return copy.deepcopy(module, memo)


def shared(module: nn.Module) -> nn.Module:
    """A copy that holds the very same parameters and buffers: they go where those of the original go."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in _tensors(module)})


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    return itertools.chain(module.parameters(), module.buffers())


def _by_name(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor.clone()


def _single(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor.clone()


@contextlib.contextmanager
def widened(module: nn.Module) -> Iterator[None]:
    """Have the module's floats in fp64, where they lie, while active: never do both take memory.

    All who share them see it. Each number of a narrower float is one of fp64 too, so that nothing is lost on the
    way back.
    """
    narrow = [(tensor, tensor.dtype) for tensor in _tensors(module) if tensor.dtype in NARROW_DTYPES]

    def turn(wanted: Mapping[torch.dtype, torch.dtype]) -> None:
        made: dict[Any, torch.Tensor] = {}  # one that has several names keeps them
        for tensor, own in narrow:
            place = tensor.data_ptr(), tensor.shape, tensor.stride()
            if place not in made or not tensor.numel():
                made[place] = tensor.detach().to(wanted[own])
            tensor.data = made[place]

    try:
        turn(dict.fromkeys(NARROW_DTYPES, torch.float64))
        yield
    finally:
        turn({dtype: dtype for dtype in NARROW_DTYPES})


def quantised_weights_of(
    candidate: Runner, model: Model, changes: Plan | None, origin: Path | None, inputs: Mapping[str, Arrays]
) -> dict[str, DequantisedWeight]:
    """The quantised weights of an ONNX candidate."""
    runner = candidate.inner if isinstance(candidate, CacheRunner) else candidate
    quantised = {}
    if isinstance(runner, OnnxRunner):
        executed = functools.partial(_executed, candidate, runner, next(iter(inputs.values())))
        quantised = quantised_weights.find(runner.path, model, changes, origin, executed)
    if origin is not None and not quantised:
        raise InputRefused(
            f"{origin} is given as what the candidate was made of, and the candidate has no quantised weights"
        )
    return quantised


def _executed(candidate: Runner, graph: OnnxRunner, arrays: Arrays) -> frozenset[tuple[str, str]]:
    """(node, operator) of what onnxruntime makes of a graph."""

    def run(other: OnnxRunner) -> None:
        (replace(candidate, inner=other) if isinstance(candidate, CacheRunner) else other).run(arrays)

    return graph.executed_nodes(run)


def rounded_weights(
    candidate: Runner, module: nn.Module, quantised: Mapping[str, DequantisedWeight]
) -> tuple[dict[str, layers.Rounding], Mapping[str, torch.Tensor]]:
    """Which of the module's tensors the candidate stores in less than fp32, how, and what it made of them."""
    if not isinstance(candidate, ModuleRunner):
        merged = {name: weight for name, weight in quantised.items() if weight.merge is not None}
        return {name: weight.nearest for name, weight in merged.items()}, {
            name: torch.from_numpy(weight.values) for name, weight in merged.items()
        }
    stored = candidate.stored_dtypes
    low = {name: dtype for name, dtype in stored.items() if dtype in ("bfloat16", "float16")}
    # A checkpoint may lack the model's prefix, or have one that the module lacks.
    rounded: dict[str, layers.Rounding] = {
        spec.name: dtype
        for spec in layers.specs(module)
        for name, dtype in low.items()
        if spec.name == name or spec.name.endswith(f".{name}") or name.endswith(f".{spec.name}")
    }
    return rounded, candidate.module.state_dict()


@dataclass(frozen=True, eq=False)
class AttachedModule:
    """A module with adapters attached, run as the reference and as the controls.

    `rounded` are the weights that the candidate stores in less than fp32, and how; `preferred` its own values of them,
    which decide where two are as near. Each role has rounded weights of its own, the base too: beside a base in full
    precision, rounding alone would look like an adapter.
    """

    module: nn.Module
    rounded: Mapping[str, layers.Rounding] = field(default_factory=dict)
    preferred: Mapping[str, torch.Tensor] = field(default_factory=dict)
    has_pairs: bool = True  # else the adapters bring whole tensors alone

    @property
    def roles(self) -> tuple[str, ...]:
        """What `run` takes; `attached` has the adapters as they are, where the reference's weights are rounded."""
        return ("reference", "base", "scaled", *(["attached"] if self.rounded else []))

    def run(self, role: str, cases: Mapping[str, Arrays], narrow: set[str]) -> dict[str, Arrays]:
        """Case -> outputs in fp64, of a module that is `widened`; `narrow` collects the operators without fp64.

        Holds the rounded weights of one role at a time.
        """
        factor = FACTORS.get(role, 1.0)
        if self.rounded and role != "attached":
            runner = Fp64Runner(self.rounded_module(factor), narrow)
            return {name: runner.run(arrays) for name, arrays in cases.items()}
        runner = Fp64Runner(self.module, narrow)
        if factor == 1.0:
            return {name: runner.run(arrays) for name, arrays in cases.items()}
        # A head that an adapter brings whole stays where pairs can be disabled: the effect to be seen is theirs.
        with layers.scale_adapters(
            self.module, factor, keep_replaced=self.has_pairs, scale_replaced=not self.has_pairs
        ):
            return {name: runner.run(arrays) for name, arrays in cases.items()}

    def rounded_module(self, factor: float = 1.0) -> nn.Module:
        """The module, in fp64, with the weights as they should be stored; it shares all others."""
        made = shared(self.module)
        if factor == 1.0:
            layers.materialise(made, self.rounded, self.preferred)
        else:
            layers.materialise(made, self.rounded, {}, factor=factor, scale_replaced=not self.has_pairs)
        return made


def as_deployed(attached: AttachedModule, quantised: Mapping[str, DequantisedWeight], device: str) -> nn.Module:
    """PyTorch as it would be deployed: where weights are rounded, with those that the reference rounded itself.

    The loss that a merge into a low precision means is so separated from faults of the merge.
    """
    if attached.rounded:
        halves = {name: tensor.dtype for name, tensor in _by_name(attached.module) if tensor.dtype in HALVES}
        with widened(attached.module):
            module = copied(attached.rounded_module(), _single)
        module.to(device)
        for name, tensor in _by_name(module):
            tensor.data = tensor.data.to(halves.get(name, tensor.dtype))  # what the model has in a half stays so
    else:
        module = shared(attached.module) if device == "cpu" else copy.deepcopy(attached.module).to(device)
    quantised_weights.round_activations(module, quantised)
    return module


def merged(module: nn.Module, changes: Plan) -> nn.Module:
    """PyTorch with the adapters merged: W + s·BA in fp64, rounded to fp32 once. No merge of ours has a part in it."""
    wide = copied(module, double)
    layers.materialise(wide, {step.weight: "float32" for step in changes.steps if step.terms}, {})
    return copied(wide, _single)


def computes_in(candidate: Runner) -> torch.dtype:
    """The half in which a candidate was made to compute, where PyTorch runs it; float32 for everybody else."""
    return candidate.dtype if isinstance(candidate, ModuleRunner) and candidate.dtype in HALVES else torch.float32


def precision(candidate: Runner, module: nn.Module) -> torch.dtype:
    """The coarser of what a candidate computes in and what PyTorch does: the half that the model keeps, or fp32."""
    own = computes_in(candidate)
    kept = (tensor.dtype for tensor in module.parameters() if tensor.dtype in HALVES)
    return own if own in HALVES else next(kept, own)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def narrowed(module: nn.Module, candidate: Runner, model: Model) -> nn.Module:
    """The module, or beside a candidate that computes in a half a copy that does too.

    Each of the copy's tensors is in the dtype in which the candidate's file keeps it.

    Raises InputRefused for a program of another dtype: its graph names the one that it was exported in, and would
    compute neither in that nor in this.
    """
    dtype = computes_in(candidate)
    if dtype is torch.float32:
        return module
    if isinstance(module, Program) and module.file_dtype is not dtype:
        own = "no float" if module.file_dtype is None else name_of(module.file_dtype)
        raise InputRefused(
            f"the candidate computes in {name_of(dtype)} and {model.source} was exported in {own}, from which "
            f"PyTorch's own error in {name_of(dtype)} cannot be told. Give --model as a Hugging Face folder, a "
            f"factory, or a .pt2 that was exported in {name_of(dtype)}"
        )
    made = copied(module, torch.clone)
    told = candidate.stored_dtypes if isinstance(candidate, ModuleRunner) else {}
    stored = {name: kind for name, kind in told.items() if kind in parity.DEPLOYED}
    parameters = dict(made.named_parameters(remove_duplicate=False))
    for name, tensor in _by_name(made):
        if tensor.is_floating_point():
            usual = dtype if name in parameters else torch.float32  # a buffer that no file keeps stays as it is
            tensor.data = tensor.data.to(getattr(torch, stored.get(name, name_of(usual))))
    return made
