"""Where a candidate goes wrong, and why: what each module made of its input, against what it should have made.

A module's output is linear in its weight, so that every mistake with an adapter predicts its own output: the
base's alone where the adapter is missing, f times the change where the scale is wrong, another module's change
where pairs were swapped. The predictions are compared with what was observed, at the candidate's own input; one
is believed only where it leaves next to nothing of the difference unexplained. Knows arrays alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lora_export.lora import LoraPair
from lora_export.plan import Step, Term
from lora_export.verification.parity import EPS, Wide, rms

UNEXPLAINED = 0.02  # share of the difference that an explanation may leave
OWN_ERRORS = 8.0  # times its own error in fp32 that one module may be off by
FEW_EPS = 4
SAME_FACTOR = 2e-3  # relative difference up to which a fitted factor is a known one
ROUNDINGS = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
MOST_RANGES = 3  # of outputs, that are told one by one
NOT_EXPLAINED = "none of the tried explanations fits"

Array = NDArray[Any]


@dataclass(frozen=True)
class LayerError:
    """What was measured of one module's output in one case, in the output's own units."""

    name: str
    error: float  # rmse(O,R): infinite where O is not finite
    deployed_error: float  # rmse(P,R)
    effect: float | None  # rmse(R,B); None without an adapter


@dataclass(frozen=True)
class Diagnosis:
    """The first module whose output differs, and why. `layers` are in the order in which they run."""

    first: str | None  # None where no module does
    why: str
    layers: tuple[LayerError, ...] = ()

    def __str__(self) -> str:
        title = "no module differs" if self.first is None else f"first module that differs: {self.first}"
        return "\n".join([title, *(f"  {line}" for line in self.why.split("\n") if line)])


@dataclass(frozen=True, eq=False)
class Observed:
    """One module of the candidate: what entered it and what came out, and the weights that it should have.

    All in fp64, a convolution's kernel flattened with its inputs; `x` are ids (n,) for an embedding.
    """

    name: str
    x: Array  # (n, in)
    y: Wide  # (n, out)
    weight: Wide  # (out, in): the base's, or the tensor that an adapter brings whole
    bias: Wide | None = None  # (out,), with what an adapter adds to it
    step: Step | None = None  # what the adapters do to the weight
    shift: Wide | None = None  # (out,): what of the bias is an adapter's
    before: Wide | None = None  # (out, in): the base's, where the adapter brings `weight`
    stored: Wide | None = None  # (out, in): what the candidate holds, where that can be read
    settled: Wide | None = None  # (out, in): W + ΔW, where it should be rounded as it is
    gate: float = 0.0  # what PyTorch's own error allows it, whatever fp32 costs: a layer may compute in int8

    @property
    def terms(self) -> Sequence[Term]:
        return self.step.terms if self.step else ()

    @cached_property
    def base(self) -> Wide:
        """(n, out): what comes out without the pairs."""
        return self.product(self.weight) + self.constant

    @property
    def constant(self) -> Wide:
        return np.zeros(len(self.weight)) if self.bias is None else self.bias

    @cached_property
    def changes(self) -> list[Wide]:
        """(n, out) for each term: what its pair adds to the output."""
        return [self.change(term) for term in self.terms]

    def change(self, term: Term) -> Wide:
        a, b = _matrices(term.pair)
        return self.low_rank(a, b) * term.scale

    def low_rank(self, a: Wide, b: Wide) -> Wide:
        return times(times(self.x, a), b)

    def product(self, weight: Wide) -> Wide:
        """(n, out): x Wᵀ."""
        return times(self.x, weight)

    @cached_property
    def expected(self) -> Wide:
        """(n, out): what should have come out."""
        return self.unrounded if self.settled is None else self.product(self.settled) + self.constant

    @cached_property
    def unrounded(self) -> Wide:
        """(n, out): what W + ΔW makes of the input."""
        magnitude = self.step.magnitude if self.step else None
        if magnitude is not None:
            return self.rescaled(magnitude, self.total()) + self.constant
        return self.base + sum(self.changes, np.zeros_like(self.base))

    def total(self, factor: float = 1.0) -> Wide:
        """(out, in): W + factor · ΔW."""
        total = self.weight.copy()
        for term in self.terms:
            a, b = _matrices(term.pair)
            total += (factor * term.scale) * (b @ a)
        return total

    def rescaled(self, magnitude: Array, weight: Wide, of: Wide | None = None) -> Wide:
        """(n, out): x Wᵀ, each output's weights at the length that DoRA gives them, as if `of` were as long as they."""
        lengths = np.linalg.norm(weight if of is None else of, axis=1)
        return self.product(weight) * (magnitude / np.where(lengths, lengths, 1.0))

    @cached_property
    def wrong(self) -> float:
        """How far what came out is from what should have: rmse."""
        return rms(self.y - self.expected) if np.isfinite(self.y).all() else math.inf

    @cached_property
    def allowed(self) -> float:
        """How far it may be: some times what fp32 itself costs this module on this input."""
        narrow = times(self.x.astype(np.float32) if self.x.dtype.kind == "f" else self.x, _narrow(self.total()))
        own = rms(narrow.astype(np.float64) - self.product(self.total()))
        return max(self.gate, OWN_ERRORS * own, FEW_EPS * EPS["float32"] * rms(self.expected))

    @property
    def grain(self) -> float:
        """What a rounding that is meant costs the output: rmse. No explanation can be finer than twice that."""
        return rms(self.expected - self.unrounded)

    @property
    def agrees(self) -> bool:
        return self.wrong <= self.allowed


def times(x: Array, matrix: Array) -> Array:
    """x (n, in), or ids (n,) of its columns, by a matrix (out, in)."""
    product: Array = x @ matrix.T if x.ndim == 2 else matrix[:, x].T
    return product


def _narrow(array: Wide) -> NDArray[np.float32]:
    return array.astype(np.float32)


def _matrices(pair: LoraPair) -> tuple[Wide, Wide]:
    """A (rank, in) and B (out, rank), a convolution's kernel flattened."""
    a, b = pair.a.astype(np.float64), pair.b.astype(np.float64)
    return a.reshape(pair.rank, -1), b.reshape(-1, pair.rank)


# --- explanations -------------------------------------------------------------------------------


class Explanation(NamedTuple):
    """What would make a module's output what it is."""

    kind: str  # the same for modules that have the same thing wrong
    text: str
    predicted: Wide  # (n, out)


@dataclass(frozen=True)
class Cause:
    """An explanation that fits."""

    kind: str
    text: str
    share: float  # of the difference, that it leaves

    def __str__(self) -> str:
        if self.share > UNEXPLAINED:  # and yet it was believed
            return f"{self.text} (what that does not explain is no more than rounding costs)"
        return f"{self.text} (explains {_percent(1 - self.share)} of the difference)"


@dataclass(frozen=True, eq=False)
class Neighbours:
    """What else is in the model that may have got into a module."""

    steps: Mapping[str, Step] = field(default_factory=dict)  # module -> what adapters do to it
    inputs: Mapping[str, Array] = field(default_factory=dict)  # module -> what entered it
    # shape (out, in) -> each module of that shape, and the base's weight there
    weights: Callable[[tuple[int, ...]], Iterable[tuple[str, Wide]]] = field(default=lambda _: ())


def explain(there: Observed, neighbours: Neighbours | None = None) -> Cause | None:
    """The simplest explanation of a wrong output that fits it as well as any; None where none does.

    What else is in the model is asked where the module's own weights do not explain it whole.
    """
    if not np.isfinite(there.y).all():
        bad = there.y.size - np.count_nonzero(np.isfinite(there.y))
        return Cause("not finite", f"{bad} of its {there.y.size} values are not finite", 0.0)
    enough = max(there.allowed, 2 * there.grain)
    limit = max(enough, UNEXPLAINED * there.wrong)
    fitting: list[tuple[float, Cause]] = []
    for explanations in (_own(there), _foreign(there, neighbours or Neighbours())):
        for told in explanations:
            left = rms(there.y - told.predicted)
            if left <= limit:
                fitting.append((left, Cause(told.kind, told.text, left / there.wrong)))
        best = min((left for left, _ in fitting), default=math.inf)
        if best <= enough:
            break
    return next((cause for left, cause in fitting if left <= max(enough, 2 * best)), None)


def _own(there: Observed) -> Iterator[Explanation]:
    """What may be wrong with the module's own weights, the simplest first."""
    if there.step is not None and there.step.magnitude is not None:
        yield from _of_dora(there, there.step.magnitude)
    elif there.terms:
        yield from _of_strength(there)
        yield from _of_parts(there)
        yield from _of_order(there)
    yield from _of_bias(there)
    yield from _of_whole(there)
    yield from _of_rounding(there)


def _foreign(there: Observed, neighbours: Neighbours) -> Iterator[Explanation]:
    if there.terms and there.step is not None and there.step.magnitude is None:
        yield from _of_neighbours(there, neighbours)
    yield from _of_weight(there, neighbours)


def _of_strength(there: Observed) -> Iterator[Explanation]:
    """Each pair as strong as fits best."""
    observed = (there.y - there.base).ravel()
    changes = np.stack([change.ravel() for change in there.changes], axis=1)  # (n * out, terms)
    several = len(there.terms) > 1
    if not changes.any():
        return
    yield Explanation("missing", "its adapter is missing", there.base)
    factors = np.linalg.lstsq(changes, observed, rcond=None)[0]
    rounded = [_nearest_known(f, term) for f, term in zip(factors, there.terms, strict=True)]
    for chosen in (rounded, factors):
        told = [
            _strength(float(f), term, several=several)
            for f, term in zip(chosen, there.terms, strict=True)
            if abs(f - 1) > SAME_FACTOR
        ]
        if told:
            kind = " ".join(["scale", *(f"{f:.4g}" for f in chosen)])
            yield Explanation(kind, "; ".join(told), there.base + (changes @ chosen).reshape(there.y.shape))


def _nearest_known(factor: float, term: Term) -> float:
    known = [0.0, 1.0, round(factor, 2), *(value for value, _ in _known_factors(term))]
    nearest = min(known, key=lambda value: abs(value - factor))
    return nearest if abs(nearest - factor) <= SAME_FACTOR * max(abs(nearest), 1.0) else factor


def _strength(factor: float, term: Term, *, several: bool) -> str:
    who = f"its adapter {term.adapter}" if several else "its adapter"
    if factor == 0:
        return f"{who} is missing"
    if factor == -1:
        return f"{who} has the wrong sign: it is taken away where it should be added"
    close = [text for value, text in _known_factors(term) if abs(factor / value - 1) <= SAME_FACTOR]
    as_if = f": as if {' or '.join(close)}" if close else ""
    return f"{who} arrives {factor:.4g} times as strong as it should (scale {term.pair.scale:.4g}){as_if}"


def _known_factors(term: Term) -> list[tuple[float, str]]:
    """Factors that known mistakes make of a scale, and what the mistake is."""
    rank, scale, root = float(term.pair.rank), term.pair.scale, math.sqrt(term.pair.rank)
    known = [
        (2.0, "it were added twice"),
        (-1.0, "it were taken away"),
        (1.1, "it were a tenth too strong"),
        (rank, f"alpha were not divided by the rank, {rank:g}"),
        (1 / rank, f"it were divided by the rank, {rank:g}, once more"),
        (root, f"alpha were divided by the root of the rank, as rsLoRA does, and not by the rank, {rank:g}"),
        (1 / root, f"alpha were divided by the rank, {rank:g}, and not by its root, as rsLoRA does"),
    ]
    if scale:
        known += [
            (scale, f"the scale, {scale:g}, were applied twice"),
            (1 / scale, f"the scale, {scale:g}, were left out"),
            (1 / scale**2, f"the scale were upside down, {1 / scale:g} for {scale:g}"),
        ]
    if term.strength:
        known += [
            (1 / term.strength, f"its weight, {term.strength:g}, were left out"),
            (term.strength, f"its weight, {term.strength:g}, were applied twice"),
        ]
    return [(value, text) for value, text in known if abs(value - 1) > SAME_FACTOR]


def _of_parts(there: Observed) -> Iterator[Explanation]:
    """The whole change in some outputs, or in some rows, and none in the others."""
    observed, expected = there.y - there.base, sum(there.changes, np.zeros_like(there.y))
    for axis, what in ((0, "outputs"), (1, "rows of its input")):
        energy = np.square(expected).sum(axis)
        reached = energy > 0
        if not reached.any():
            continue
        share = (observed * expected).sum(axis)[reached] / energy[reached]
        has = np.ones(len(energy), bool)
        has[reached] = share > 0.5
        if has.all() or not has[reached].any():
            continue
        mask = has if axis == 0 else has[:, None]
        text = f"its adapter is missing in {_ranges(~has, what)}"
        yield Explanation(f"part of the {what}", text, there.base + expected * mask)


def _ranges(chosen: NDArray[np.bool_], what: str) -> str:
    """`outputs 16 to 31 of 64`."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8)))
    runs = [(int(start), int(stop) - 1) for start, stop in zip(edges[::2], edges[1::2], strict=True)]
    if len(runs) > MOST_RANGES:
        return f"{int(chosen.sum())} of {len(chosen)} {what}"
    told = " and ".join(f"{first} to {last}" if first != last else f"{first}" for first, last in runs)
    return f"{what} {told} of {len(chosen)}"


def _of_order(there: Observed) -> Iterator[Explanation]:
    """A's or B's numbers, or their product's, read as if they lay the other way round."""
    for turn in (_read_as_transposed, _transposed_and_read):
        for wrong, text in (("B", "its B"), ("A", "its A"), ("BA", "its change, B A,")):
            total = there.base.copy()
            for term in there.terms:
                a, b = _matrices(term.pair)
                scale = term.scale
                if wrong == "BA":
                    total += there.product(turn(b @ a)) * scale
                else:
                    total += there.low_rank(turn(a) if wrong == "A" else a, turn(b) if wrong == "B" else b) * scale
            yield Explanation(f"transposed {wrong}", f"{text} is transposed", total)


def _read_as_transposed(matrix: Wide) -> Wide:
    """The matrix that comes of one that is taken to lie transposed already, and does not."""
    return matrix.reshape(matrix.shape[::-1]).T


def _transposed_and_read(matrix: Wide) -> Wide:
    """The matrix that comes of one that lies transposed, and is read as if it did not."""
    return matrix.T.reshape(matrix.shape)


def _of_neighbours(there: Observed, neighbours: Neighbours) -> Iterator[Explanation]:
    """Another module's pair, or another module's input."""
    shapes = {term.pair.shape for term in there.terms}
    for name, step in neighbours.steps.items():
        if name == there.name or step.magnitude is not None or {term.pair.shape for term in step.terms} != shapes:
            continue
        other = sum((there.change(term) for term in step.terms), np.zeros_like(there.y))
        yield Explanation("another's pair", f"it has the adapter of {name}", there.base + other)
        yield Explanation("two pairs", f"it has the adapter of {name} beside its own", there.expected + other)
    for name, x in neighbours.inputs.items():
        if name == there.name or x.shape != there.x.shape or x.dtype != there.x.dtype or np.array_equal(x, there.x):
            continue
        a_sum = np.zeros_like(there.y)
        for term in there.terms:
            a, b = _matrices(term.pair)
            a_sum += times(times(x, a), b) * term.scale
        yield Explanation("another's input", f"its adapter reads what enters {name}", there.base + a_sum)


def _of_dora(there: Observed, magnitude: Array) -> Iterator[Explanation]:
    constant, (term,) = there.constant, there.terms
    magnitude = magnitude.astype(np.float64)
    total = there.total()
    yield Explanation("missing", "its adapter is missing", there.base)
    yield Explanation(
        "no magnitude", "DoRA's magnitude is missing: it computes W + BA", there.product(total) + constant
    )
    yield Explanation(
        "no pair", "DoRA's magnitude is there, A and B are not", there.rescaled(magnitude, there.weight) + constant
    )
    yield Explanation(
        "norm of the base",
        "DoRA's magnitude is divided by the length of W, and not of W + BA",
        there.rescaled(magnitude, total, of=there.weight) + constant,
    )
    if there.bias is not None:
        lengths = np.linalg.norm(total, axis=1)
        told = there.expected - constant + constant * magnitude / np.where(lengths, lengths, 1.0)
        yield Explanation("rescaled bias", "DoRA's magnitude rescales the bias too", told)
    for factor, _ in _known_factors(term):
        text = _strength(factor, term, several=False)
        yield Explanation(f"scale {factor:.4g}", text, there.rescaled(magnitude, there.total(factor)) + constant)


def _of_bias(there: Observed) -> Iterator[Explanation]:
    """A constant, whatever enters."""
    if there.bias is not None and there.shift is not None:
        text = "what the adapter adds to its bias is missing"
        yield Explanation("no shift", text, there.expected - there.shift)
    if there.bias is not None and there.bias.any():
        yield Explanation("no bias", "its bias is missing", there.expected - there.bias)
        yield Explanation("bias twice", "its bias is added twice", there.expected + there.bias)
    if len(there.y) > 1:
        text = "its bias is another" if there.bias is not None else "something constant is added to it"
        yield Explanation("another bias", text, there.expected + (there.y - there.expected).mean(0))


def _of_whole(there: Observed) -> Iterator[Explanation]:
    if there.before is not None:
        text = "the tensor that the adapter brings is missing: it has the base's"
        yield Explanation("no whole tensor", text, there.expected + there.product(there.before - there.weight))
    if there.terms:
        text = "the base's own weight is missing: only its adapter is there"
        yield Explanation("no base", text, there.expected - there.product(there.weight))


def _of_rounding(there: Observed) -> Iterator[Explanation]:
    if there.step is not None and there.step.magnitude is not None:
        return
    for name, dtype in ROUNDINGS.items():
        with np.errstate(over="ignore"):
            rounded = there.total().astype(dtype).astype(np.float64)
            parts = there.weight.astype(dtype).astype(np.float64)
            yield Explanation(
                f"rounded {name}", f"its weights are rounded to {name}", there.product(rounded) + there.constant
            )
            if there.terms:
                both = there.product(parts) + there.constant
                for term in there.terms:
                    a, b = _matrices(term.pair)
                    b = b * term.scale
                    both += there.low_rank(*(side.astype(dtype).astype(np.float64) for side in (a, b)))
                kept = there.product(parts - there.weight) + there.expected
                yield Explanation(f"rounded {name}", f"its weights, A and B are rounded to {name}", both)
                yield Explanation(f"rounded {name}", f"the base's weights are rounded to {name}", kept)


def _of_weight(there: Observed, neighbours: Neighbours) -> Iterator[Explanation]:
    """Another weight altogether."""
    out_features, in_features = there.weight.shape
    own = there.product(there.weight)
    if out_features == in_features:
        total = there.total() if there.step is None or there.step.magnitude is None else there.weight
        turned = there.product(total.T) + there.constant
        yield Explanation("transposed", "its weight is transposed", turned)
    for name, weight in neighbours.weights(there.weight.shape):
        if name != there.name and not np.array_equal(weight, there.weight):
            text = f"its weight is that of {name}"
            yield Explanation("another's weight", text, there.expected - own + there.product(weight))
    if there.stored is not None:
        apart = _distance(there.stored, there.weight)
        text = f"the weight that it holds is not the base's: they are {_percent(apart)} apart"
        yield Explanation("another base", text, there.expected - own + there.product(there.stored))
        after = _distance(there.stored, there.total())
        text = f"the weight that it holds is {_percent(after)} off what base and adapter make"
        yield Explanation("another sum", text, there.product(there.stored) + there.constant)


def _distance(one: Wide, other: Wide) -> float:
    """‖one − other‖ / ‖other‖."""
    return float(np.linalg.norm(one - other) / (np.linalg.norm(other) or 1.0))


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
