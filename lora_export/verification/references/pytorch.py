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
from dataclasses import replace
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

CONTROL_SCALE = 1.1  # the control's factor on every scale
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


class _LazyReference(Fp64Runner):
    """A reference whose module is made when it is first asked: what it said may have been kept."""

    def __init__(self, make: Callable[[], nn.Module], stayed: set[str]):
        self.make, self.narrow_operators = make, stayed

    @functools.cached_property
    def module(self) -> nn.Module:  # type: ignore[override]
        return self.make()


def held_by(
    candidate: Runner, model: Model, changes: Plan | None, origin: Path | None, inputs: Mapping[str, Arrays]
) -> dict[str, quantised_weights.DequantisedWeight]:
    """The quantised weights of an ONNX candidate."""
    runner = candidate.inner if isinstance(candidate, CacheRunner) else candidate
    held = {}
    if isinstance(runner, OnnxRunner):
        executed = functools.partial(_executed, candidate, runner, next(iter(inputs.values())))
        held = quantised_weights.find(runner.path, model, changes, origin, executed)
    if origin is not None and not held:
        raise InputRefused(
            f"{origin} is given as what the candidate was made of, and the candidate has no quantised weights"
        )
    return held


def _executed(candidate: Runner, graph: OnnxRunner, arrays: Arrays) -> frozenset[tuple[str, str]]:
    """(node, operator) of what onnxruntime makes of a graph."""

    def run(other: OnnxRunner) -> None:
        (replace(candidate, inner=other) if isinstance(candidate, CacheRunner) else other).run(arrays)

    return graph.executed_nodes(run)


def rounded_weights(
    candidate: Runner, module: nn.Module, held: Mapping[str, quantised_weights.DequantisedWeight]
) -> tuple[dict[str, layers.Rounding], Mapping[str, torch.Tensor]]:
    """Which of the module's tensors the candidate stores in less than fp32, how, and what it made of them."""
    if not isinstance(candidate, ModuleRunner):
        merged = {name: weight for name, weight in held.items() if weight.merge is not None}
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


class Sides:
    """The reference and those that are wrong on purpose, one after the other: none is made before it is asked.

    Where weights are rounded, each has a copy of those that are: beside a base in full precision, rounding alone
    would look like an adapter.
    """

    def __init__(
        self,
        module: nn.Module,
        rounded: Mapping[str, layers.Rounding],
        chosen: Mapping[str, torch.Tensor],
        stack: contextlib.ExitStack,
        stayed: set[str],
        *,
        has_pairs: bool,
    ):
        self.source, self.rounded, self.chosen = module, rounded, chosen
        self.stack, self.stayed, self.has_pairs = stack, stayed, has_pairs
        # PyTorch as deployed keeps what the model keeps in a half.
        self.halves = {name: tensor.dtype for name, tensor in _by_name(module) if tensor.dtype in HALVES}
        self.roles = ("reference", "base", "scaled", *(["attached"] if rounded else []))

    @functools.cached_property
    def wide(self) -> nn.Module:
        """The adapters attached, in fp64."""
        self.stack.enter_context(widened(self.source))
        return self.source

    def of(self, role: str) -> Callable[[Arrays], Arrays]:
        """Who answers in a role."""
        factor = {"base": 0.0, "scaled": CONTROL_SCALE}.get(role)
        if self.rounded and role != "attached":
            return _LazyReference(functools.partial(self.settled, factor), self.stayed).run
        attached = _LazyReference(lambda: self.wide, self.stayed)
        if factor is None:
            return attached.run
        return functools.partial(_with_strength, attached, factor, self.has_pairs)

    def settled(self, factor: float | None = None) -> nn.Module:
        """With the weights as they should be stored, in fp64."""
        if factor is None:
            return settled(self.wide, self.rounded, self.chosen)
        return settled(self.wide, self.rounded, {}, factor=factor, scale_replaced=not self.has_pairs)


def settled(
    module: nn.Module, rounded: Mapping[str, layers.Rounding], chosen: Mapping[str, torch.Tensor], **how: Any
) -> nn.Module:
    made = shared(module)
    layers.materialise(made, rounded, chosen, **how)
    return made


def as_deployed(sides: Sides, held: Mapping[str, quantised_weights.DequantisedWeight], device: str) -> nn.Module:
    """PyTorch as it would be deployed: where weights are rounded, of those that the reference rounded itself.

    The loss that a merge into a low precision means is so told apart from faults of the merge.
    """
    if sides.rounded:
        module = copied(sides.settled(), _single).to(device)
        for name, tensor in _by_name(module):
            tensor.data = tensor.data.to(sides.halves.get(name, tensor.dtype))
    else:
        module = shared(sides.source) if device == "cpu" else copy.deepcopy(sides.source).to(device)
    quantised_weights.round_activations(module, held)
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


def _with_strength(reference: Fp64Runner, factor: float, has_pairs: bool, arrays: Arrays) -> Arrays:
    # A head that came whole stays where pairs can be switched off: the effect to be seen is theirs.
    with layers.scale_adapters(reference.module, factor, keep_replaced=has_pairs, scale_replaced=not has_pairs):
        return reference.run(arrays)
