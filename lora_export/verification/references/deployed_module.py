"""PyTorch as it would be deployed beside a candidate: in its precision, and with the weights that it should store.

Its runs show what the inputs reach, and how large its own error can be.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from lora_export import layers
from lora_export.errors import InputRefused, Undecided
from lora_export.layers.attachments import Branch
from lora_export.layers.module_tensors import dtype_name
from lora_export.models.model import Model
from lora_export.models.pt2.program import Program
from lora_export.options.spelling import named
from lora_export.plan import Layout
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
from lora_export.verification.parity import DECIDES, Findings
from lora_export.verification.references import quantisation_error
from lora_export.verification.references.attached_module import AttachedModule
from lora_export.verification.references.half_precision import TORCH_HALVES, candidate_dtype
from lora_export.verification.references.proof_weights import ProofWeights
from lora_export.verification.references.quantised_weights import DequantisedWeight


def deployed_runner(weights: ProofWeights, device: str) -> ModuleRunner:
    """PyTorch as it would be deployed beside a candidate. Raises InputRefused as `in_candidate_dtype`."""
    module = deployed_module(weights.attached, weights.quantised, device)
    module = in_candidate_dtype(module, weights.candidate, weights.model)
    has_fp32_outputs = weights.is_half_inside and weights.dtype != "float32"
    return ModuleRunner(module, device, has_fp32_outputs=has_fp32_outputs)


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
            hook = functools.partial(_add_int8_error, matrix, weight.activation_block)
            owners[0].register_forward_hook(hook, with_kwargs=True)


def _add_int8_error(
    weight: torch.Tensor,
    block_size: int,
    _: nn.Module,
    inputs: tuple[Any, ...],
    named_inputs: dict[str, Any],
    output: torch.Tensor,
) -> Any:
    values = next(iter((*inputs, *named_inputs.values())))
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


class ObservedRun(NamedTuple):
    """The outputs of PyTorch as deployed, and what these inputs could not show."""

    outputs: dict[str, Arrays]  # by case
    computed: frozenset[Branch]  # the pairs that were computed; none where PyTorch ran with merged weights
    findings: Findings  # on rows that no input reaches, and on what the quantised weights cost in these runs


def run_observed(deployed: ModuleRunner, cases: Mapping[str, Arrays], weights: ProofWeights) -> ObservedRun:
    """Run all cases, and observe which pairs and rows of the adapters they reach, and what the quantisation costs."""
    rows = RowCoverage(deployed.module, weights.model, weights.adapters)
    errors = {name: weight.error for name, weight in weights.quantised.items() if weight.error is not None}
    with layers.recorded_branches() as computed, quantisation_error.output_errors(deployed.module, errors) as layer:
        run = run_ahead(deployed, list(cases.values()))
        outputs = {name: run(arrays) for name, arrays in cases.items()}
    # Read here: runs on other inputs would add to the rows.
    return ObservedRun(outputs, frozenset(computed), rows.findings + quantisation_error.findings_on(errors, layer))
