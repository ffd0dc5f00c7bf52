"""How far candidate and PyTorch are from the reference at each call of a module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from torch import Tensor

from lora_export.verification import parity
from lora_export.verification.diagnose.diagnosis import LayerError
from lora_export.verification.diagnose.diagnosis_case import DiagnosisCase
from lora_export.verification.diagnose.layer_products import bias_of
from lora_export.verification.diagnose.module_calls import CallValues, ModuleCall, observing_calls, to_wide_numpy
from lora_export.verification.diagnose.traced_candidate import TracedCandidate
from lora_export.verification.parity import Array

# A module may be off by this many times the verdict's own k. Inside a model a few outliers make an rmse a matter of
# chance: in correct graphs of MiniLM, modules were off by up to 6.5 times PyTorch's own error.
MODULE_FACTOR = 8.0
INTEGERS = "iub"


class ErrorFigures(NamedTuple):
    """rmse from the reference; for integers the number of wrong ones."""

    error: float  # the candidate's
    deployed_error: float  # PyTorch's
    allowed: float


class ComparedCall(NamedTuple):
    """One call: the errors of its output and of its input."""

    layer: LayerError
    allowed: float
    input: ErrorFigures | None  # None where the input could not be compared

    @property
    def input_agrees(self) -> bool:
        return self.input is None or self.input.error <= self.input.allowed

    @property
    def output_agrees(self) -> bool:
        return self.layer.error <= self.allowed


def compare_calls(
    case: DiagnosisCase, traced: TracedCandidate, values: Mapping[ModuleCall, CallValues]
) -> dict[ModuleCall, ComparedCall]:
    """Compare each call with the reference, in the order in which they run.

    `values` are the candidate's. The reference's values are not stored: each is compared while the reference runs.
    """
    deployed, base = case.deployed_values(values), case.base_values(values)
    compared: dict[ModuleCall, ComparedCall] = {}

    def on_call(call: ModuleCall, x: Tensor | None, y: Tensor) -> None:
        if call not in values or call not in deployed:
            return
        candidate = values[call]
        output = figures_of(_with_bias(case, traced, call, candidate.y), to_wide_numpy(y), deployed[call].y)
        effect = parity.rms(to_wide_numpy(y) - base[call].y) if call in base else None
        compared[call] = ComparedCall(
            LayerError(str(call), output.error, output.deployed_error, effect),
            output.allowed,
            _input_figures(candidate.x, x, deployed[call].x),
        )

    with observing_calls(case.reference.module, {call.weight for call in values}, on_call):
        case.reference.run(case.inputs)
    return compared


def _with_bias(case: DiagnosisCase, traced: TracedCandidate, call: ModuleCall, y: Array) -> Array:
    """The output of a call with its bias, where the graph adds the bias later."""
    if traced.has_bias(call):
        return y
    bias = bias_of((case.rounded_weights or case.attached_weights)[call.weight])
    return y if bias is None else y + bias.astype(y.dtype)


def _input_figures(candidate: Array | None, reference: Tensor | None, deployed: Array | None) -> ErrorFigures | None:
    if candidate is None or reference is None or deployed is None or candidate.size != reference.numel():
        return None
    return figures_of(candidate, to_wide_numpy(reference), deployed)


def figures_of(candidate: Array, reference: Array, deployed: Array) -> ErrorFigures:
    """The errors of candidate and PyTorch, and the error that PyTorch's allows the candidate."""
    if reference.dtype.kind in INTEGERS:
        wrong = _in_shape_of(reference, candidate) != reference
        return ErrorFigures(float(np.count_nonzero(wrong)), 0.0, 0.0)
    deployed_errors = deployed.astype(np.float64) - reference
    allowed = parity.allowance(
        reference,
        deployed_errors,
        ratio_limit=MODULE_FACTOR * parity.ratio_limit(reference.size, "float32"),
        eps=parity.FEW_EPS * parity.EPS["float32"],
    )
    difference = _in_shape_of(reference, candidate.astype(np.float64)) - reference
    error = parity.rms(difference) if np.isfinite(difference).all() else math.inf
    return ErrorFigures(error, parity.rms(deployed_errors), allowed.rmse)


def _in_shape_of(reference: Array, values: Array) -> Array:
    """The candidate's values in the reference's shape; one of them may have batch and length swapped.

    Of the two ways to read the values, the one nearer to the reference. Neither makes wrong values correct.
    """
    if values.shape == reference.shape:
        return values
    if values.size != reference.size:
        return np.full(reference.shape, np.nan)
    ways = [values.reshape(reference.shape)]
    if reference.ndim > 2:
        first, second, *rest = reference.shape
        ways.append(values.reshape(second, first, *rest).swapaxes(0, 1))
    return min(ways, key=lambda way: float(np.sum(np.abs(way.astype(np.float64) - reference))))
