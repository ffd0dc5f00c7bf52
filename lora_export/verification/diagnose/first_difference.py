"""How far candidate and PyTorch are from the reference at each call of a module; the first that differs, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from torch import Tensor

from lora_export.errors import count, escaped_lines
from lora_export.graph.insert.adapter_names import module_of
from lora_export.options.spelling import named
from lora_export.verification import parity
from lora_export.verification.diagnose.diagnosis import LayerError, LayerObservation
from lora_export.verification.diagnose.module_calls import (
    CallValues,
    ModuleCall,
    bias_of,
    observing_calls,
    product_rows,
    to_wide_numpy,
    weight_matrix,
)
from lora_export.verification.diagnose.root_cause import NOT_EXPLAINED, Cause, OtherModules, find_root_cause
from lora_export.verification.diagnose.traced_candidate import DiagnosisCase, TracedCandidate, TracedGraph
from lora_export.verification.parity import Array, Wide

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
    deployed_errors = parity.Magnitudes(deployed.astype(np.float64) - reference)
    allowed = parity.allowance(
        parity.Magnitudes(reference.astype(np.float64, copy=False)),
        deployed_errors,
        ratio_limit=MODULE_FACTOR * parity.ratio_limit(reference.size, "float32"),
        eps=parity.FEW_EPS * parity.EPS["float32"],
    )
    difference = _in_shape_of(reference, candidate.astype(np.float64)) - reference
    error = parity.rms(difference) if np.isfinite(difference).all() else math.inf
    return ErrorFigures(error, deployed_errors.rms, allowed.rmse)


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


# --- the first call that differs, and why ---

ValuesByCall = Mapping[ModuleCall, CallValues]
Compared = Mapping[ModuleCall, ComparedCall]


class FirstDifference(NamedTuple):
    """The first call that differs, and why."""

    call: ModuleCall
    why: str


def find_first_difference(
    case: DiagnosisCase, traced: TracedCandidate, compared: Compared, values: ValuesByCall
) -> FirstDifference | None:
    """The first of the calls in `values` whose input or output differs; None where all agree."""
    previous: ModuleCall | None = None
    for call, figures in compared.items():
        if call in values and not figures.input_agrees:
            return FirstDifference(call, _why_input_differs(case, previous, call, figures, values[call]))
        if call in values and not figures.output_agrees:
            return FirstDifference(call, _why_output_differs(case, traced, call, compared, values))
        previous = call
    return None


def _relative_error(error: float, deployed_error: float) -> str:
    if not deployed_error or not math.isfinite(error):
        return f"{error:.3g}, PyTorch's is {deployed_error:.3g}"
    return f"{error / deployed_error:.3g} x PyTorch's own error"


# --- the input differs --------------------------------------------------------------------------


def _why_input_differs(
    case: DiagnosisCase, previous: ModuleCall | None, call: ModuleCall, figures: ComparedCall, values: CallValues
) -> str:
    """Why the input of a call differs, where the output of the call before it agrees."""
    assert figures.input is not None
    before = f"{previous}, which runs before it, agrees" if previous else "it is the first module that was compared"
    error = _relative_error(figures.input.error, figures.input.deployed_error)
    if values.x is not None and values.x.dtype.kind in INTEGERS:
        error = f"{figures.input.error:.0f} of {values.x.size} numbers"
    lines = [f"its input differs already ({error}); {before}"]
    reason = next(_ignored_inputs(case, call, values.x), "") if values.x is not None else ""
    lines.append(reason or "the fault is between the two, in no such layer: attention, mask, norm or activation")
    return escaped_lines(*lines)


def _ignored_inputs(case: DiagnosisCase, call: ModuleCall, x: Array) -> Iterator[str]:
    """The model's inputs that the candidate seems to replace by ones or zeros."""
    for name, array in case.inputs.items():
        if array.dtype.kind not in INTEGERS:
            continue
        for number, constant in ((1, "ones"), (0, "zeros")):
            changed = {name: np.full_like(array, number)}
            if np.array_equal(changed[name], array):
                continue
            reference = case.reference_values([call], **changed).get(call)
            deployed = case.deployed_values([call], **changed).get(call)
            if reference is None or reference.x is None or reference.x.size != x.size:
                continue
            if deployed is None or deployed.x is None:
                continue
            figures = figures_of(x, reference.x, deployed.x)
            if figures.error <= figures.allowed:
                yield f"it is as if the input {name} were all {constant}"


# --- the output differs -------------------------------------------------------------------------


def _why_output_differs(
    case: DiagnosisCase, traced: TracedCandidate, call: ModuleCall, compared: Compared, values: ValuesByCall
) -> str:
    """Why the output of a call differs, where its input agrees or could not be compared."""
    layer = compared[call].layer
    error = f"its output is off by {_relative_error(layer.error, layer.deployed_error)}"
    lines = [f"{error}; {_about_input(compared[call].input, values[call].x)}"]
    observed = observe_layer(case, traced, call, values[call], compared[call].allowed, with_stored_weight=True)
    if observed is None:
        return escaped_lines(*lines, f"{NOT_EXPLAINED}: this kind of layer is not analysed")
    if observed.agrees:
        return escaped_lines(*lines, "its output is correct for its own input: the difference grew before it")
    cause = find_root_cause(observed, _other_modules(case, values, call, observed))
    lines.append(str(cause) if cause else NOT_EXPLAINED)
    if cause and cause.kind == "missing" and isinstance(traced, TracedGraph) and traced.lacks_adapter:
        lines.append(f"the graph takes an adapter's file, and ran without one ({named('onnx_adapter')})")
    lines += _correct_with_other_adapters(case, traced, call)
    lines.append(_about_other_calls(case, traced, call, cause, compared, values))
    return escaped_lines(*lines)


def _about_input(figures: ErrorFigures | None, x: Array | None) -> str:
    if figures is None:
        return "its input could not be compared"
    if x is not None and x.dtype.kind in INTEGERS:
        return "its input agrees"
    return f"its input agrees ({_relative_error(figures.error, figures.deployed_error)})"


def observe_layer(
    case: DiagnosisCase,
    traced: TracedCandidate,
    call: ModuleCall,
    values: CallValues,
    tolerance: float,
    *,
    with_stored_weight: bool = False,
) -> LayerObservation | None:
    """The candidate's layer on its own input; None where the layer is not x Wᵀ."""
    attached, base = case.attached_weights[call.weight], case.base_weights[call.weight]
    rows = product_rows(values, base)
    if rows is None:
        return None
    step = case.plan.by_weight.get(call.weight) if case.plan else None
    bias, base_bias = bias_of(attached), bias_of(base)
    shift = bias - base_bias if bias is not None and base_bias is not None else None
    rounded = case.rounded_weights.get(call.weight)
    return LayerObservation(
        name=str(call),
        x=rows[0],
        y=rows[1],
        weight=weight_matrix(attached),
        bias=bias if traced.has_bias(call) else None,
        step=step if step and step.terms else None,
        shift=shift if shift is not None and shift.any() else None,
        original_weight=weight_matrix(base) if step is not None and step.replace is not None else None,
        candidate_weight=traced.stored_weight(call) if with_stored_weight else None,
        tolerance=tolerance,
        rounded_weight=None if rounded is None else weight_matrix(rounded),
    )


def _other_modules(
    case: DiagnosisCase, values: ValuesByCall, call: ModuleCall, observed: LayerObservation
) -> OtherModules:
    """What the candidate may have used in place of the module's own weights and input."""
    base_weights = case.base_weights

    def weights(shape: tuple[int, ...]) -> Iterator[tuple[str, Wide]]:
        for name, weight in base_weights.items():
            if name != call.weight and weight.matrix_shape == shape:
                yield module_of(name), weight_matrix(weight)

    steps = {module_of(step.weight): step for step in case.plan.low_rank} if case.plan else {}
    inputs = {}
    for other, other_values in values.items():
        rows = product_rows(other_values, base_weights[other.weight]) if other != call else None
        if rows is not None and rows[0].shape == observed.x.shape:
            inputs[str(other)] = rows[0]
    return OtherModules(steps, inputs, weights)


def _correct_with_other_adapters(case: DiagnosisCase, traced: TracedCandidate, call: ModuleCall) -> Iterator[str]:
    """The graph's other adapters with which the output of a call is correct."""
    others = dict(traced.with_other_adapters()) if isinstance(traced, TracedGraph) else {}
    if not others:
        return
    expected, deployed = case.reference_values([call]), case.deployed_values([call])
    for name, other in others.items():
        figures = figures_of(other.run(case.inputs, [call])[call].y, expected[call].y, deployed[call].y)
        if figures.error <= figures.allowed:
            yield f"with {name} its output would be correct"


def _about_other_calls(
    case: DiagnosisCase,
    traced: TracedCandidate,
    first: ModuleCall,
    cause: Cause | None,
    compared: Compared,
    values: ValuesByCall,
) -> str:
    """How many other modules are wrong by themselves, and how many of them in the same way."""
    others = [
        observe_layer(case, traced, call, call_values, compared[call].allowed)
        for call, call_values in values.items()
        if call != first and call in compared
    ]
    observed = [layer for layer in others if layer is not None]
    wrong = [layer for layer in observed if not layer.agrees]
    checked = f"of {count(len(observed), 'other module')}, each checked on its own input,"
    if not wrong:
        return f"{checked} none is wrong"
    causes = [find_root_cause(layer) for layer in wrong]
    alike = sum(other is not None and cause is not None and other.kind == cause.kind for other in causes)
    return f"{checked} {len(wrong)} {'is' if len(wrong) == 1 else 'are'} wrong, {alike} in the same way"
