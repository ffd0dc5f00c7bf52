"""Why a layer's output is wrong: known mistakes predict its output, and the prediction that fits is the cause.

The output of a layer is linear in its weight, so every mistake with an adapter predicts an output: the base's alone
where the adapter is missing, f times the adapter's effect where the scale is wrong, another module's effect where
pairs were swapped. The predictions are computed from the candidate's own input. One is a cause only where it leaves
next to nothing of the difference unexplained. Arrays only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lora_export.errors import EscapedLines
from lora_export.plan import Step, Term
from lora_export.verification.diagnose.diagnosis import (
    LayerObservation,
    apply_matrix,
    expected_dora_factors,
    factors,
)
from lora_export.verification.parity import Array, Wide, rms

UNEXPLAINED = 0.02  # of the difference, that an explanation may leave
SAME_FACTOR = 2e-3  # relative difference up to which a fitted factor is a known one
ROUNDINGS = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
MAX_RANGES = 3  # of outputs, that are listed one by one
_GUESS = re.compile(r", as if [^;()\n]*[^;()\s]")  # as `describe_strength` ends
NOT_EXPLAINED = "none of the known mistakes explains it"


class Explanation(NamedTuple):
    """A mistake, and the output that it predicts."""

    kind: str  # equal for modules with the same mistake
    text: str
    predicted: Wide  # (n, out)


@dataclass(frozen=True)
class Cause:
    """An explanation that fits."""

    kind: str
    text: str
    unexplained: float  # part of the difference, from 0 to 1

    def __str__(self) -> str:
        if self.unexplained > UNEXPLAINED:
            return f"{self.text} (the rest of the difference is no more than rounding error)"
        return f"{self.text} (explains {_percent(1 - self.unexplained)} of the difference)"


@dataclass(frozen=True, eq=False)
class OtherModules:
    """What else is in the model, and may be where a module's own weights should be."""

    steps: Mapping[str, Step] = field(default_factory=dict)  # module -> what adapters do to it
    inputs: Mapping[str, Array] = field(default_factory=dict)  # module -> its input
    # shape (out, in) -> each module of that shape, and the base's weight there
    weights: Callable[[tuple[int, ...]], Iterable[tuple[str, Wide]]] = field(default=lambda _: ())


def find_root_cause(layer: LayerObservation, others: OtherModules | None = None) -> Cause | None:
    """The simplest explanation of a wrong output that fits it as well as any; None where none fits.

    Other modules are considered only where the module's own weights do not explain the whole difference.
    """
    if not np.isfinite(layer.y).all():
        count = layer.y.size - np.count_nonzero(np.isfinite(layer.y))
        return Cause("not finite", f"{count} of its {layer.y.size} values are not finite", 0.0)
    enough = max(layer.allowed_error, 2 * layer.rounding_error)
    limit = max(enough, UNEXPLAINED * layer.error)
    fitting: list[tuple[float, Cause]] = []
    for explanations in (_own_mistakes(layer), _mixed_up_modules(layer, others or OtherModules())):
        for explanation in explanations:
            left = rms(layer.y - explanation.predicted)
            if left <= limit:
                fitting.append((left, Cause(explanation.kind, explanation.text, left / layer.error)))
        best = min((left for left, _ in fitting), default=math.inf)
        if best <= enough:
            break
    return next((cause for left, cause in fitting if left <= max(enough, 2 * best)), None)


def _own_mistakes(layer: LayerObservation) -> Iterator[Explanation]:
    """Mistakes with the module's own weights, the simplest first."""
    if layer.magnitude is not None:
        yield from _wrong_dora(layer, layer.magnitude)
    elif layer.terms:
        yield from _wrong_strength(layer)
        if layer.has_factors:
            yield from _partly_missing(layer)
            yield from _transposed_factors(layer)
    yield from _wrong_bias(layer)
    yield from _missing_tensor(layer)
    yield from _rounded_weights(layer)


def _mixed_up_modules(layer: LayerObservation, others: OtherModules) -> Iterator[Explanation]:
    if layer.terms and layer.magnitude is None and layer.has_factors:
        yield from _adapter_of_another(layer, others)
    yield from _another_weight(layer, others)


# --- strength -----------------------------------------------------------------------------------


def _wrong_strength(layer: LayerObservation) -> Iterator[Explanation]:
    """Each pair with the strength that fits best."""
    observed = (layer.y - layer.base_output).ravel()
    effects = np.stack([output.ravel() for output in layer.pair_outputs], axis=1)  # (n * out, terms)
    if not effects.any():
        return
    yield Explanation("missing", "its adapter is missing", layer.base_output)
    fitted = np.linalg.lstsq(effects, observed, rcond=None)[0]
    rounded = [_nearest_known(factor, term) for factor, term in zip(fitted, layer.terms, strict=True)]
    for chosen in (rounded, fitted):
        texts = [
            describe_strength(float(factor), term, several=len(layer.terms) > 1)
            for factor, term in zip(chosen, layer.terms, strict=True)
            if abs(factor - 1) > SAME_FACTOR
        ]
        if texts:
            kind = " ".join(["scale", *(f"{factor:.4g}" for factor in chosen)])
            predicted = layer.base_output + (effects @ chosen).reshape(layer.y.shape)
            yield Explanation(kind, "; ".join(texts), predicted)


def without_guesses(text: str) -> EscapedLines:
    """A diagnosis without what a wrong strength may come from: where the cause is known, that would be another one."""
    return EscapedLines(_GUESS.sub("", text))


def _nearest_known(factor: float, term: Term) -> float:
    known = [0.0, 1.0, round(factor, 2), *(value for value, _ in known_factors(term))]
    nearest = min(known, key=lambda value: abs(value - factor))
    return nearest if abs(nearest - factor) <= SAME_FACTOR * max(abs(nearest), 1.0) else factor


def describe_strength(factor: float, term: Term, *, several: bool) -> str:
    adapter = f"its adapter {term.adapter}" if several else "its adapter"
    if factor == 0:
        return f"{adapter} is missing"
    if factor == -1:
        return f"{adapter} has the wrong sign: it is subtracted where it should be added"
    close = [text for value, text in known_factors(term) if abs(factor / value - 1) <= SAME_FACTOR]
    as_if = f", as if {' or '.join(close)}" if close else ""
    return f"{adapter} has {factor:.4g} times the correct strength (scale {term.pair.scale:.4g}){as_if}"


def known_factors(term: Term) -> list[tuple[float, str]]:
    """The factors by which mistakes that are possible with a pair change its scale, each with its description."""
    rank, scale, root = float(term.pair.rank), term.pair.scale, math.sqrt(term.pair.rank)
    known = [
        (2.0, "it were added twice"),
        (-1.0, "it were subtracted"),
        (1.1, "it were a tenth too strong"),
        (1 / rank, f"it were divided by the rank, {rank:g}, once more"),
    ]
    if term.rslora:
        known += [
            (root, f"alpha were not divided by the root of the rank, {rank:g}"),
            (1 / root, f"alpha were divided by the rank, {rank:g}, and not by its root, as in rsLoRA"),
        ]
    else:
        known += [
            (rank, f"alpha were not divided by the rank, {rank:g}"),
            (root, f"alpha were divided by the root of the rank, as in rsLoRA, and not by the rank, {rank:g}"),
        ]
    if scale:
        known += [
            (scale, f"the scale, {scale:g}, were applied twice"),
            (1 / scale, f"the scale, {scale:g}, were left out"),
            (1 / scale**2, f"the scale were inverted, {1 / scale:g} for {scale:g}"),
        ]
    if term.strength:
        known += [
            (1 / term.strength, f"its weight, {term.strength:g}, were left out"),
            (term.strength, f"its weight, {term.strength:g}, were applied twice"),
        ]
    return [(value, text) for value, text in known if abs(value - 1) > SAME_FACTOR]


# --- parts and layout ---------------------------------------------------------------------------


def _partly_missing(layer: LayerObservation) -> Iterator[Explanation]:
    """The whole effect in some outputs or some rows, and none in the others."""
    observed, expected = layer.y - layer.base_output, sum(layer.pair_outputs, np.zeros_like(layer.y))
    for axis, what in ((0, "outputs"), (1, "rows of its input")):
        energy = np.square(expected).sum(axis)
        affected = energy > 0
        if not affected.any():
            continue
        fraction = (observed * expected).sum(axis)[affected] / energy[affected]
        has = np.ones(len(energy), bool)
        has[affected] = fraction > 0.5
        if has.all() or not has[affected].any():
            continue
        mask = has if axis == 0 else has[:, None]
        text = f"its adapter is missing in {_ranges(~has, what)}"
        yield Explanation(f"part of the {what}", text, layer.base_output + expected * mask)


def _ranges(chosen: NDArray[np.bool_], what: str) -> str:
    """Such as `outputs 16 to 31 of 64`."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8)))
    runs = [(int(start), int(stop) - 1) for start, stop in zip(edges[::2], edges[1::2], strict=True)]
    if len(runs) > MAX_RANGES:
        return f"{int(chosen.sum())} of {len(chosen)} {what}"
    listed = " and ".join(f"{first} to {last}" if first != last else f"{first}" for first, last in runs)
    return f"{what} {listed} of {len(chosen)}"


def _transposed_factors(layer: LayerObservation) -> Iterator[Explanation]:
    """A, B, or their product in the wrong memory order."""
    for turn in (_read_as_transposed, _transposed_and_read):
        for wrong, text in (("B", "its B"), ("A", "its A"), ("BA", "its change, B A,")):
            total = layer.base_output.copy()
            for term in layer.terms:
                a, b = factors(term.pair)
                if wrong == "BA":
                    total += layer.product(turn(b @ a)) * term.scale
                else:
                    a, b = (turn(a), b) if wrong == "A" else (a, turn(b))
                    total += apply_matrix(apply_matrix(layer.x, a), b) * term.scale
            yield Explanation(f"transposed {wrong}", f"{text} is transposed", total)


def _read_as_transposed(matrix: Wide) -> Wide:
    """The result of reading a matrix as if it were stored transposed."""
    return matrix.reshape(matrix.shape[::-1]).T


def _transposed_and_read(matrix: Wide) -> Wide:
    """The result of reading a matrix that is stored transposed as if it were not."""
    return matrix.T.reshape(matrix.shape)


# --- DoRA ---------------------------------------------------------------------------------------


def _wrong_dora(layer: LayerObservation, magnitude: Array) -> Iterator[Explanation]:
    constant, (term,) = layer.constant, layer.terms
    magnitude = magnitude.astype(np.float64)
    total = layer.merged_weight()
    yield Explanation("missing", "its adapter is missing", layer.base_output)
    yield Explanation(
        "no magnitude", "DoRA's magnitude is missing: it computes W + BA", layer.product(total) + constant
    )
    yield Explanation(
        "no pair",
        "DoRA's magnitude is applied, A and B are missing",
        layer.dora_product(magnitude, layer.weight) + constant,
    )
    yield Explanation(
        "norm of the base",
        "DoRA's magnitude is divided by the norm of W, and not of W + BA",
        layer.dora_product(magnitude, total, norms_of=layer.weight) + constant,
    )
    if layer.bias is not None:
        predicted = layer.expected - constant + constant * expected_dora_factors(magnitude, total)
        yield Explanation("rescaled bias", "DoRA's magnitude rescales the bias too", predicted)
    for factor, _ in known_factors(term):
        text = describe_strength(factor, term, several=False)
        predicted = layer.dora_product(magnitude, layer.merged_weight(factor)) + constant
        yield Explanation(f"scale {factor:.4g}", text, predicted)


# --- bias, whole tensors, rounding --------------------------------------------------------------


def _wrong_bias(layer: LayerObservation) -> Iterator[Explanation]:
    """A constant difference, independent of the input."""
    if layer.bias is not None and layer.shift is not None:
        yield Explanation("no shift", "the adapter's shift of its bias is missing", layer.expected - layer.shift)
    if layer.bias is not None and layer.bias.any():
        yield Explanation("no bias", "its bias is missing", layer.expected - layer.bias)
        yield Explanation("bias twice", "its bias is added twice", layer.expected + layer.bias)
    if len(layer.y) > 1:
        text = "it has another bias" if layer.bias is not None else "a constant is added to its output"
        yield Explanation("another bias", text, layer.expected + (layer.y - layer.expected).mean(0))


def _missing_tensor(layer: LayerObservation) -> Iterator[Explanation]:
    if layer.original_weight is not None:
        text = "the adapter's whole tensor is missing: it has the base's weight"
        predicted = layer.expected + layer.product(layer.original_weight - layer.weight)
        yield Explanation("no whole tensor", text, predicted)
    if layer.terms:
        text = "the base's weight is missing: it has only its adapter"
        yield Explanation("no base", text, layer.expected - layer.product(layer.weight))


def _rounded_weights(layer: LayerObservation) -> Iterator[Explanation]:
    if layer.magnitude is not None:
        return
    for name, dtype in ROUNDINGS.items():
        kind = f"rounded {name}"
        with np.errstate(over="ignore"):
            merged = layer.product(_rounded(layer.merged_weight(), dtype)) + layer.constant
            yield Explanation(kind, f"its weights are rounded to {name}", merged)
            if layer.terms and layer.has_factors:
                base = _rounded(layer.weight, dtype)
                both = layer.product(base) + layer.constant
                for term in layer.terms:
                    a, b = factors(term.pair)
                    both += apply_matrix(apply_matrix(layer.x, _rounded(a, dtype)), _rounded(b * term.scale, dtype))
                base_alone = layer.product(base - layer.weight) + layer.expected
                yield Explanation(kind, f"its weights, A and B are rounded to {name}", both)
                yield Explanation(kind, f"the base's weights are rounded to {name}", base_alone)


def _rounded(matrix: Wide, dtype: Any) -> Wide:
    return matrix.astype(dtype).astype(np.float64)


# --- other modules ------------------------------------------------------------------------------


def _adapter_of_another(layer: LayerObservation, others: OtherModules) -> Iterator[Explanation]:
    """Another module's pair, or another module's input."""
    shapes = {term.pair.shape for term in layer.terms}
    for name, step in others.steps.items():
        if name == layer.name or step.depends_on_weight or {term.pair.shape for term in step.terms} != shapes:
            continue
        other = sum((layer.pair_output(term) for term in step.terms), np.zeros_like(layer.y))
        yield Explanation("another's pair", f"it has the adapter of {name}", layer.base_output + other)
        yield Explanation("two pairs", f"it has the adapter of {name} beside its own", layer.expected + other)
    for name, x in others.inputs.items():
        if name == layer.name or x.shape != layer.x.shape or x.dtype != layer.x.dtype or np.array_equal(x, layer.x):
            continue
        misread = sum((layer.pair_output(term, x) for term in layer.terms), np.zeros_like(layer.y))
        yield Explanation("another's input", f"its adapter reads the input of {name}", layer.base_output + misread)


def _another_weight(layer: LayerObservation, others: OtherModules) -> Iterator[Explanation]:
    """The module's weight transposed, another module's, or the one that the candidate stores."""
    out_features, in_features = layer.weight.shape
    without_weight = layer.expected - layer.product(layer.weight)
    if out_features == in_features:
        total = layer.merged_weight() if layer.magnitude is None else layer.weight
        yield Explanation("transposed", "its weight is transposed", layer.product(total.T) + layer.constant)
    for name, weight in others.weights(layer.weight.shape):
        if name != layer.name and not np.array_equal(weight, layer.weight):
            predicted = without_weight + layer.product(weight)
            yield Explanation("another's weight", f"its weight is that of {name}", predicted)
    if layer.candidate_weight is not None:
        product = layer.product(layer.candidate_weight)
        distance = _percent(_distance(layer.candidate_weight, layer.weight))
        text = f"its stored weight is not the base's: they are {distance} apart"
        yield Explanation("another base", text, without_weight + product)
        distance = _percent(_distance(layer.candidate_weight, layer.merged_weight()))
        text = f"its stored weight is {distance} off the sum of base and adapter"
        yield Explanation("another sum", text, product + layer.constant)


def _distance(one: Wide, other: Wide) -> float:
    """‖one − other‖ / ‖other‖."""
    return float(np.linalg.norm(one - other) / (np.linalg.norm(other) or 1.0))


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.3g} %"
