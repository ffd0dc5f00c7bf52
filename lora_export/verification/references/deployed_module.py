"""PyTorch as it would be deployed beside a candidate: in its precision, and with the weights that it should store.

Its runs show what the inputs reach, and how large its own error can be.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from lora_export import layers
from lora_export.errors import InputRefused, Undecided
from lora_export.layers.attachments import Branch
from lora_export.lora import Adapter
from lora_export.models.model import Model
from lora_export.models.pt2.program import Program
from lora_export.options.spelling import named
from lora_export.plan import Layout, Plan
from lora_export.runtime.runner import Arrays, Runner
from lora_export.runtime.torch_runners import ModuleRunner
from lora_export.verification import parity
from lora_export.verification.candidate_outputs import run_ahead
from lora_export.verification.inputs.coverage import RowCoverage
from lora_export.verification.module_copies import (
    converted_copy,
    is_large,
    parameters_and_buffers,
    shared_copy,
    to_packed_single,
    to_single,
)
from lora_export.verification.parity import DECIDES
from lora_export.verification.references import quantisation_error
from lora_export.verification.references.attached_module import AttachedModule
from lora_export.verification.references.quantised_weights import DequantisedWeight

TORCH_HALVES = frozenset({torch.float16, torch.bfloat16})


def deployed_module(attached: AttachedModule, quantised: Mapping[str, DequantisedWeight], device: str) -> nn.Module:
    """The module as it would be deployed: with weights as the reference rounds them, where a candidate's are rounded.

    The loss of a merge into low precision is separated from faults of the merge by that. On the CPU all tensors that
    are not rounded are shared.
    """
    if attached.rounding:
        own = {
            name: tensor.dtype
            for name, tensor in parameters_and_buffers(attached.module)
            if tensor.dtype in TORCH_HALVES
        }
        is_packed = device == "cpu" and not own and is_large(attached.module)
        rounded = attached.rounded_module()
        module = converted_copy(rounded, to_packed_single if is_packed else to_single)
        attached.ready = rounded if is_packed else None  # it shares its memory
        module = on_device(module, device)
        for name, tensor in parameters_and_buffers(module) if own else ():
            tensor.data = tensor.data.to(own.get(name, tensor.dtype))  # what the model has in half precision stays so
    else:
        module = on_device(shared_copy(attached.module), device)
    round_activations(module, quantised)
    return module


def on_device(module: nn.Module, device: str) -> nn.Module:
    """The module where it computes on the CPU; a copy on another device."""
    return module if device == "cpu" else converted_copy(module, lambda tensor: tensor.to(device))


def merged_module(module: nn.Module, changes: Plan) -> nn.Module:
    """A copy with the adapters merged: W + s·BA in fp64, rounded to fp32 once. Shares no arithmetic with a merge."""
    made = shared_copy(module)
    changed = {step.weight: "float32" for step in changes.steps if step.terms}
    layers.materialise(made, changed, {}, in_fp64=True)
    return converted_copy(made, to_single)


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


def in_candidate_dtype(module: nn.Module, candidate: Runner, model: Model) -> nn.Module:
    """The module; for a candidate in half precision a copy in the same precision.

    Each tensor of the copy has the dtype that it has in the candidate's file.
    Raises InputRefused for a .pt2 of another dtype: its graph names the dtype that it was exported in.
    """
    dtype = candidate_dtype(candidate)
    if dtype is torch.float32:
        return module
    if isinstance(module, Program) and module.file_dtype is not dtype:
        own = "no float" if module.file_dtype is None else dtype_name(module.file_dtype)
        raise InputRefused(
            f"the candidate computes in {dtype_name(dtype)}, and {model.source} was exported in {own}: PyTorch's error "
            f"in {dtype_name(dtype)} cannot be measured with it. Give {named('model')} as a Hugging Face folder, a "
            f"factory, or a .pt2 that was exported in {dtype_name(dtype)}"
        )
    made = converted_copy(module, torch.clone)
    in_file = candidate.stored_dtypes if isinstance(candidate, ModuleRunner) else {}
    stored = {name: kind for name, kind in in_file.items() if kind in parity.DEPLOYED_DTYPES}
    parameters = dict(made.named_parameters(remove_duplicate=False))
    for name, tensor in parameters_and_buffers(made):
        if tensor.is_floating_point():
            usual = dtype if name in parameters else torch.float32  # a buffer that no file has stays in fp32
            tensor.data = tensor.data.to(getattr(torch, stored.get(name, dtype_name(usual))))
    return made


def round_activations(module: nn.Module, weights: Mapping[str, DequantisedWeight]) -> None:
    """Give layers of the module the error of a product whose input is rounded to int8.

    The rounding is symmetric, with one scale for each block of the input, as onnxruntime does for `accuracy_level` 4.
    An adapter beside a weight takes the input unrounded. The hooks stay on the module. Raises Undecided for a weight
    of nn.MultiheadAttention, whose products no hook sees.
    """
    specs = {spec.name: spec for spec in layers.specs(module)}
    for name, weight in weights.items():
        if weight.activation_block:
            is_transposed = specs[name].layout is Layout.IN_OUT
            matrix = torch.from_numpy(weight.values.T if is_transposed else weight.values)  # (out, in)
            path = name.rpartition(".")[0]
            owners = [module.get_submodule(at) for at in (path, path.rpartition(".")[0])]
            if any(isinstance(owner, nn.MultiheadAttention) for owner in owners):  # it reads its output's weight, too
                raise Undecided(
                    f"{name} is multiplied in int8, and no hook sees the products of nn.MultiheadAttention: how far "
                    f"int8 is from fp64 there is unknown. {DECIDES}: the same graph of an accuracy_level below 4"
                )
            owners[0].register_forward_hook(functools.partial(_add_int8_error, matrix, weight.activation_block))


def _add_int8_error(weight: torch.Tensor, block_size: int, _: nn.Module, inputs: Any, output: torch.Tensor) -> Any:
    (values,) = inputs
    error = _rounded_to_int8(values, block_size) - values
    return output + nn.functional.linear(error, weight.to(error))


def _rounded_to_int8(values: torch.Tensor, block_size: int) -> torch.Tensor:
    features = values.shape[-1]
    blocks = nn.functional.pad(values, (0, -features % block_size)).unflatten(-1, (-1, block_size))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    levels = torch.where(scale > 0, blocks / scale, blocks).round()
    rounded: torch.Tensor = (levels * scale).flatten(-2)[..., :features]
    return rounded


# --- runs ---

MERGED_MODULE = (
    "PyTorch was measured with its adapters merged, too; the larger error counts: they are large beside the weights"
)


class ObservedRun(NamedTuple):
    """The outputs of PyTorch, and what these inputs could not show."""

    outputs: dict[str, Arrays]  # by case
    doubts: tuple[str, ...]  # rows that no input reaches
    not_judged: tuple[str, ...]
    computed: frozenset[Branch]  # the pairs that were computed; none where PyTorch ran with merged weights
    quantisation: quantisation_error.Findings  # what the quantised weights cost in these runs


def run_observed(
    deployed: ModuleRunner,
    cases: Mapping[str, Arrays],
    model: Model,
    adapters: Sequence[Adapter],
    quantised: Mapping[str, DequantisedWeight],
) -> ObservedRun:
    """Run all cases, and observe which pairs and rows of the adapters they reach, and what the quantisation costs."""
    rows = RowCoverage(deployed.module, model, adapters)
    errors = {name: weight.error for name, weight in quantised.items() if weight.error is not None}
    with layers.recorded_branches() as computed, quantisation_error.output_errors(deployed.module, errors) as layer:
        run = run_ahead(deployed, list(cases.values()))
        outputs = {name: run(arrays) for name, arrays in cases.items()}
    doubts, not_judged = rows.doubts, rows.not_judged  # read here: runs on other inputs would add to them
    found = quantisation_error.findings_on(errors, layer)
    return ObservedRun(outputs, tuple(doubts), tuple(not_judged), frozenset(computed), found)
