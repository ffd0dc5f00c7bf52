"""Two sets of arrays: the same, different, or this check cannot tell.

A fixed tolerance cannot decide it: 1e-3 is where a GPU's rounding lives *and* where a weak adapter
lives. Five arrays an output do, all computed from the same inputs:

    O  the candidate, which is judged
    R  the referee: adapters attached, in fp64
    P  the deployed model: PyTorch in the dtype in which it will run; of a graph that is judged against its own
       base, that base with the adapters in another way
    B  the base: the referee without its adapters
    L  the louder referee: every scale x 1.1

    structure  all are finite and have the same names, count, dtype and shape, else different
    error      rmse(O,R) <= k * rmse(P,R), or eps * rms(R) where P happens to be exact, else different
    tail       max|O-R| <= k * max|P-R| + 4 * eps * max|R|, else different
    bulk       where most of P's error is in a few elements: the same of the median of |O-R|, else different
    features   the error gate again for features a tenth and less as large as the largest, all cases together
    signal     rmse(O,R) <= 0.1 * rmse(R,B), else undecided: a merged model could not have been told from another
    loss       where weights were rounded, that moves the outputs less than the adapter does, else undecided
    controls   error, tail or bulk must *fail* for O against B, and for O against L, else undecided

"As close to the truth as PyTorch itself is" is the rule of PyTorch's own compiler tests
(torch._dynamo.utils.same). `different` outweighs `undecided`, and only a set of cases without any
complaint is `same`. Knows arrays alone: neither torch nor onnxruntime.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import Different, InputRefused, Undecided

Array = NDArray[Any]
Arrays = Mapping[str, Array]  # output -> its values
Wide = NDArray[np.float64]

PYTORCH = "PyTorch"
DEPLOYED = ("float32", "float16", "bfloat16")  # a referee in fp64 is finer than each of these
EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}  # from 1 to the next number
FEW_ELEMENTS = 10
FEW_EPS = 4  # what a last rounding and a sum in another order may cost the worst element
LARGEST_SHARE = 0.1  # of the adapter's effect that the error may be
LARGEST_LOSS = 1.0  # of the adapter's effect that rounding the weights may cost
LEAST_VALUES = 5  # of a feature, from which its size, and PyTorch's error in it, are more than chance
SPIKED = 10  # times its median that the rmse of PyTorch's error is where a few elements hold most of it
NUDGE = 1.01
DECIDES = "what would decide it"  # before a remedy
SHOWN = 5  # outputs, and reasons, that a verdict prints; it holds all of them


class Outcome(StrEnum):
    SAME = "same"
    DIFFERENT = "different"
    UNDECIDED = "undecided"

    @property
    def exit_code(self) -> int:
        """What the command line ends with."""
        codes = {Outcome.DIFFERENT: Different.exit_code, Outcome.UNDECIDED: Undecided.exit_code}
        return codes.get(self, 0)


@dataclass(frozen=True, eq=False)
class Case:
    """What everybody made of one set of inputs.

    `candidate` and `deployed` are in the deployed dtype, the others in fp64. `base` and `louder`
    are None only where there is no adapter at all. `attached` is given where the candidate's
    merged weights are stored in a low precision: then `referee` used the weights so rounded,
    `attached` the adapters as they are, and the difference is the merge loss. `base` and `louder` are rounded
    like `referee` then: what rounding does to the base's own weights must not pass for the adapter's effect.
    """

    name: str
    inputs_summary: str  # such as "input_ids int64 [2, 7]"
    referee: Arrays
    deployed: Arrays
    candidate: Arrays
    base: Arrays | None = None
    louder: Arrays | None = None
    attached: Arrays | None = None
    peer: str = PYTORCH  # who computed `deployed`, in words


@dataclass(frozen=True)
class Sensitivity:
    """Whether perturbing one graph input alone changed any output."""

    input: str
    reference_changed: bool
    candidate_changed: bool


@dataclass(frozen=True)
class Gate:
    """One question put to an output: passed where `value` is at most `allowed`."""

    name: str
    value: float
    allowed: float
    passed: bool


@dataclass(frozen=True)
class Control:
    """The error and tail gates put to O against a referee that is wrong on purpose: they must tell the two apart."""

    name: str
    error: float  # rmse of O against the wrong referee
    told: bool
    required: bool  # where nothing can be told by nature (an output that no adapter reaches), nothing is asked


@dataclass(frozen=True)
class Place:
    """Where O lies farthest from R."""

    index: tuple[int, ...]
    candidate: float
    referee: float


@dataclass(frozen=True)
class Histogram:
    """How large numbers are, signs aside: counts[i] of them lie in [2^(first+i), 2^(first+i+1)), `zeros` are 0."""

    first: int
    counts: tuple[int, ...]
    zeros: int


@dataclass(frozen=True)
class Figures:
    """What was measured of one output in one case, in the output's own units unless said otherwise."""

    dtype: str
    shape: tuple[int, ...]
    k: float  # how many times PyTorch's own error is allowed; 0 for integers and booleans
    error: float  # rmse(O,R)
    deployed_error: float  # rmse(P,R)
    ratio: float | None  # error / deployed_error; None where PyTorch is exact
    max_error: float  # max|O-R|
    deployed_max_error: float  # max|P-R|
    max_relative_error: float | None  # max|O-R|/|R| where R is not 0
    worst: Place
    effect: float | None  # rmse(R,B), what the adapter does; None without one
    share: float | None  # error / effect; None where there is no effect
    cosine: float | None  # of O and R; None where one of them is all zero
    top1: float | None  # share of equal argmax; logits only
    kl: float | None  # mean KL(R||O) in nats; logits only
    merge_loss: float | None  # rmse(R, attached) / effect, where weights were rounded
    errors: Histogram  # |O-R|, element by element
    deployed_errors: Histogram  # |P-R|
    effects: Histogram | None  # |R-B|; None without an adapter
    gates: tuple[Gate, ...]
    controls: tuple[Control, ...]
    peer: str = field(default=PYTORCH, repr=False)  # whose own error is the measure

    @property
    def strain(self) -> float:
        """How much of what is allowed was used, at the tightest gate: over 1 is a failure."""
        return max(
            gate.value / gate.allowed if gate.allowed else (0.0 if gate.passed else math.inf) for gate in self.gates
        )


@dataclass(frozen=True)
class Reason:
    """One complaint: why a verdict is not `same`. `case` or `output` is empty where all are meant."""

    outcome: Outcome
    gate: str
    text: str
    case: str = ""
    output: str = ""
    remedy: str = ""  # of `undecided`: what would let this check decide, where that can be said

    def __str__(self) -> str:
        where = " in ".join(part for part in (self.output, self.case and f"case {self.case}") if part)
        return f"{where}: {self.text}" if where else self.text


@dataclass(frozen=True)
class Comparison:
    """One output in one case. `figures` is None where it could not be measured (a reason says why) or is empty."""

    case: str
    output: str
    figures: Figures | None = None
    reasons: tuple[Reason, ...] = ()

    def __str__(self) -> str:
        title = f"{self.output} in case {self.case}"
        if self.figures is None:
            return f"{title}: not measured"
        f = self.figures
        passed = "within" if all(gate.passed for gate in f.gates) else "NOT within"
        lines = [f"{title}: {f.dtype} {list(f.shape)}, {passed} its gates"]
        if error := next((gate for gate in f.gates if gate.name == "error"), None):
            times = f"x {f.ratio:.3g}" if f.ratio is not None else "it is exact"
            lines.append(
                f"  error {f.error:.3g}, allowed {error.allowed:.3g}; {f.peer}'s own {f.deployed_error:.3g} ({times})"
            )
        lines += [
            f"  worst place {list(f.worst.index)}: off by {f.max_error:.3g}, "
            f"{f.peer} by {f.deployed_max_error:.3g} at most",
            f"    it is {f.worst.candidate:.9g}, the referee has {f.worst.referee:.9g}",
        ]
        if f.share is not None:
            lines.append(f"  the error is {_percent(f.share)} of what the adapter does ({f.effect:.3g})")
        elif f.effect is not None:
            lines.append("  the adapter does not reach this output")
        if f.top1 is not None and f.kl is not None:
            lines.append(f"  top-1 agreement {_percent(f.top1)}, mean KL {f.kl:.3g} nats")
        if f.merge_loss is not None:
            lines.append(f"  rounding the merged weights costs {_percent(f.merge_loss)} of what the adapter does")
        return "\n".join(lines)


@dataclass(frozen=True)
class Verdict:
    """Same, different or undecided, and every figure that led to it. True only where it is `same`."""

    outcome: Outcome
    reasons: tuple[Reason, ...]  # empty exactly where the outcome is `same`
    comparisons: tuple[Comparison, ...]
    perturbed: tuple[Sensitivity, ...]
    dtype: str  # in which the candidate is deployed
    notes: tuple[str, ...] = ()  # what was not judged, and how the referee was made
    peer: str = PYTORCH  # whose own error was the measure

    @property
    def same(self) -> bool:
        return self.outcome is Outcome.SAME

    @property
    def exit_code(self) -> int:
        return self.outcome.exit_code

    @property
    def foremost(self) -> tuple[Reason, ...]:
        """Of each gate's complaints about each output the first: the other cases say it again."""
        by_gate: dict[tuple[str, ...], Reason] = {}
        for there in self.reasons:
            by_gate.setdefault((there.outcome, there.gate, there.output, "" if there.output else there.text), there)
        return tuple(by_gate.values())

    @property
    def nearest_to_failing(self) -> tuple[Comparison, ...]:
        """For each output the case that strained its gates most, the most strained output first."""
        measured = [there for there in self.comparisons if there.figures is not None]
        measured.sort(key=lambda there: there.figures.strain if there.figures else 0.0, reverse=True)
        by_output: dict[str, Comparison] = {}
        for there in measured:
            by_output.setdefault(there.output, there)
        return tuple(by_output.values())

    def __bool__(self) -> bool:
        return self.same

    def __str__(self) -> str:
        outputs = {there.output for there in self.comparisons}
        cases = {there.case for there in self.comparisons}
        lines = [f"{self.outcome}: {_count(len(outputs), 'output')} in {_count(len(cases), 'case')}, {self.dtype}"]
        told = self.foremost[:SHOWN]
        for reason, after in itertools.zip_longest(told, told[1:]):
            lines.append(f"  - {reason}")
            if reason.remedy and (after is None or after.remedy != reason.remedy):  # one for a whole run of them
                lines.append(f"    {DECIDES}: {reason.remedy}")
        more = len(self.reasons) - len(told)
        lines += [f"  - and {_count(more, 'reason')} more"] if more else []
        shown = self.nearest_to_failing
        lines += [str(there) for there in shown[:SHOWN]]
        if len(shown) > SHOWN:
            lines.append(f"{_count(len(shown) - SHOWN, 'output')} more, each farther from its limits than these")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


@dataclass(frozen=True)
class Tolerance:
    """The classical |O-R| <= atol + rtol * |R|, on top of the gates where the user asks for it."""

    atol: float
    rtol: float

    def __post_init__(self) -> None:
        for name, value in (("atol", self.atol), ("rtol", self.rtol)):
            if not 0 <= value < math.inf:
                raise InputRefused(f"{name} is {value}; a tolerance is a finite number and not negative")


def judge(
    cases: Sequence[Case],
    *,
    dtype: str = "float32",
    perturbed: Sequence[Sensitivity] = (),
    atol: float | None = None,
    rtol: float | None = None,
    notes: Sequence[str] = (),
    doubts: Sequence[str] = (),
    faults: Sequence[str] = (),
) -> Verdict:
    """Put every gate and control to every output of every case.

    `dtype` is the one in which the model is deployed; an output of a coarser dtype is measured by its own.
    `atol` and `rtol` are a further demand, never a relief. `notes` are passed through to the verdict; `doubts`
    are what the inputs did not put to the test, and make it undecided; `faults` are what was found wrong in the
    candidate's weights, however little of it arrives at its outputs, and make it different.
    Raises InputRefused for another dtype than `DEPLOYED`, and for a tolerance that is not a finite number.
    """
    if dtype not in DEPLOYED:
        raise InputRefused(f"parity in {dtype} cannot be judged by a float64 referee; deploy in {', '.join(DEPLOYED)}")
    tolerance = None if atol is None and rtol is None else Tolerance(atol or 0.0, rtol or 0.0)
    peer = cases[0].peer if cases else PYTORCH
    adapted = any(case.base is not None or case.louder is not None for case in cases)
    comparisons = tuple(
        _compare(case, output, cases, dtype=dtype, adapted=adapted, tolerance=tolerance)
        for case in cases
        for output in _names(case)
    )
    reasons = (
        *(reason for there in comparisons for reason in there.reasons),
        *_small_features(cases, comparisons, dtype),
        *_could_it_tell(cases, comparisons, adapted=adapted),
        *_folded_inputs(perturbed, peer),
        *(Reason(Outcome.UNDECIDED, "inputs", doubt) for doubt in doubts),
        *(Reason(Outcome.DIFFERENT, "weights", fault) for fault in faults),
    )
    return Verdict(
        outcome=_weightiest(reasons),
        reasons=reasons,
        comparisons=comparisons,
        perturbed=tuple(perturbed),
        dtype=dtype,
        notes=(*notes, *_not_judged(comparisons, perturbed, peer, adapted=adapted)),
        peer=peer,
    )


def together(verdicts: Mapping[str, Verdict]) -> Verdict:
    """Verdicts on one candidate in several roles as one, which is `same` where all of them are.

    Cases are called after their role, too.
    """
    first = next(iter(verdicts.values()))
    reasons = tuple(_in_role(role, reason) for role, there in verdicts.items() for reason in there.reasons)
    return Verdict(
        outcome=_weightiest(reasons),
        reasons=reasons,
        comparisons=tuple(
            replace(
                comparison,
                case=f"{role}, {comparison.case}",
                reasons=tuple(_in_role(role, reason) for reason in comparison.reasons),
            )
            for role, there in verdicts.items()
            for comparison in there.comparisons
        ),
        perturbed=tuple(dict.fromkeys(tried for there in verdicts.values() for tried in there.perturbed)),
        dtype=first.dtype,
        notes=tuple(dict.fromkeys(note for there in verdicts.values() for note in there.notes)),
        peer=first.peer,
    )


def _in_role(role: str, reason: Reason) -> Reason:
    if reason.case:
        return replace(reason, case=f"{role}, {reason.case}")
    return replace(reason, text=f"{role}: {reason.text}")


def _weightiest(reasons: Sequence[Reason]) -> Outcome:
    outcomes = {reason.outcome for reason in reasons}
    return next((o for o in (Outcome.DIFFERENT, Outcome.UNDECIDED) if o in outcomes), Outcome.SAME)


# One output of one case


def _compare(
    case: Case, output: str, cases: Sequence[Case], *, dtype: str, adapted: bool, tolerance: Tolerance | None
) -> Comparison:
    faults = _structure(case, output, adapted=adapted)
    if faults or case.referee[output].size == 0:
        return Comparison(case.name, output, reasons=tuple(faults))
    alike = [case]
    if case.referee[output].size <= FEW_ELEMENTS:
        alike = [there for there in cases if output in _names(there) and not _structure(there, output, adapted=adapted)]
    own = np.concatenate([(_wide(there.deployed[output]) - _wide(there.referee[output])).ravel() for there in alike])
    figures = _measure(case, output, own, dtype=dtype, tolerance=tolerance)
    return Comparison(case.name, output, figures, tuple(_complaints(case.name, output, figures)))


def _sides(case: Case) -> dict[str, Arrays]:
    """All sets of arrays that the case holds, by what a message calls them."""
    sides = {
        "the candidate": case.candidate,
        "the referee": case.referee,
        "the deployed model": case.deployed,
        "the base": case.base,
        "the louder referee": case.louder,
        "the attached referee": case.attached,
    }
    return {who: arrays for who, arrays in sides.items() if arrays is not None}


def _names(case: Case) -> list[str]:
    """Every output that any side has: one that is missing on one side is compared too."""
    return list(dict.fromkeys(name for arrays in _sides(case).values() for name in arrays))


def _structure(case: Case, output: str, *, adapted: bool) -> list[Reason]:
    """What forbids to measure the output. The candidate's fault is `different`; a fault of the measure, `undecided`."""
    sides = _sides(case)
    there = {who: arrays[output] for who, arrays in sides.items() if output in arrays}
    absent = [who for who in sides if who not in there]

    def complain(outcome: Outcome, text: str) -> Reason:
        return Reason(outcome, "structure", text, case.name, output)

    if list(there) == ["the candidate"]:
        return [complain(Outcome.DIFFERENT, "the candidate has this output, nobody else does")]
    faults = [complain(_whose(who), f"{who} lacks this output") for who in absent]
    if adapted and (case.base is None or case.louder is None):
        what = "without adapters" if case.base is None else "with every scale x 1.1"
        faults.append(complain(Outcome.UNDECIDED, f"the case was not run {what}: a control cannot be put"))
    if faults:
        return faults

    referee, deployed = there["the referee"], there["the deployed model"]
    for who, array in there.items():
        if array.shape != referee.shape:
            shapes = f"{list(array.shape)}, the referee's {list(referee.shape)}"
            faults.append(complain(_whose(who), f"{who}'s shape is {shapes}, for the inputs {case.inputs_summary}"))
        if who == "the candidate" and array.dtype != deployed.dtype:
            text = f"the candidate's dtype is {array.dtype}, {case.peer}'s {deployed.dtype}"
            faults.append(complain(Outcome.DIFFERENT, text))
        elif who != "the candidate" and not _comparable(array, deployed):
            text = f"{who}'s dtype is {array.dtype} beside {case.peer}'s {deployed.dtype}: not comparable"
            faults.append(complain(Outcome.UNDECIDED, text))
    return faults or _not_finite(there, complain)


def _whose(who: str) -> Outcome:
    return Outcome.DIFFERENT if who == "the candidate" else Outcome.UNDECIDED


def _comparable(array: Array, deployed: Array) -> bool:
    """Floats of any width go together; integers and booleans only with their own."""
    if _is_float(deployed):
        return _is_float(array)
    return array.dtype == deployed.dtype and deployed.dtype.kind in "iub"


def _is_float(array: Array) -> bool:
    return array.dtype.name in EPS


def _not_finite(there: Arrays, complain: Callable[[Outcome, str], Reason]) -> list[Reason]:
    """NaN and infinity. NaN on both sides is not agreement: where the measure itself is not finite, nothing is told."""
    faults = []
    measure = np.isfinite(there["the referee"]) & np.isfinite(there["the deployed model"])
    for who, array in there.items():
        bad = ~np.isfinite(array)
        fault_of_candidate = who == "the candidate" and bool(np.any(bad & measure))
        if fault_of_candidate:
            bad &= measure
        if bad.any():
            index = tuple(int(i) for i in np.argwhere(bad)[0])
            text = f"{who} has {_count(int(bad.sum()), 'value')} not finite, the first at {list(index)}: "
            text += f"{float(array[index])}, the referee has {float(there['the referee'][index]):.9g}"
            faults.append(complain(Outcome.DIFFERENT if fault_of_candidate else Outcome.UNDECIDED, text))
    return faults


def _measure(case: Case, output: str, own: Wide, *, dtype: str, tolerance: Tolerance | None) -> Figures:
    """Every figure, gate and control of one output that everybody has, finite, in one shape."""
    o, r, p = case.candidate[output], case.referee[output], case.deployed[output]
    allowed = allow(r, own, k=slack(o.size, _coarser(o, dtype)), eps=EPS[_coarser(o, dtype)]) if _is_float(o) else None
    error, deployed_error = rms(_wide(o) - _wide(r)), rms(_wide(p) - _wide(r))
    effect = None if case.base is None else _effect(r, case.base[output])
    loss = None if case.attached is None else rms(_wide(r) - _wide(case.attached[output]))
    return Figures(
        dtype=o.dtype.name,
        shape=o.shape,
        k=allowed.k if allowed else 0.0,
        error=error,
        deployed_error=deployed_error,
        ratio=_ratio(error, deployed_error),
        max_error=_peak(_wide(o) - _wide(r)),
        deployed_max_error=_peak(_wide(p) - _wide(r)),
        max_relative_error=_max_relative(_wide(o), _wide(r)),
        worst=_worst(o, r),
        effect=effect,
        share=_ratio(error, effect),
        cosine=_cosine(_wide(o), _wide(r)),
        top1=_top1(o, r) if _is_logits(output, o) else None,
        kl=_kl(o, r) if _is_logits(output, o) else None,
        merge_loss=_ratio(loss, effect),
        errors=histogram(_wide(o) - _wide(r)),
        deployed_errors=histogram(_wide(p) - _wide(r)),
        effects=None if case.base is None else histogram(_wide(r) - _wide(case.base[output])),
        gates=tuple(_gates(o, r, p, allowed=allowed, effect=effect, loss=loss, tolerance=tolerance)),
        controls=tuple(_controls(case, output, allowed=allowed, effect=effect, tolerance=tolerance)),
        peer=case.peer,
    )


def _effect(referee: Array, base: Array) -> float:
    """What the adapter does to an output; 0 where that is no more than the referee's own rounding."""
    effect = rms(_wide(referee) - _wide(base))
    noise = FEW_EPS * EPS[referee.dtype.name] * rms(_wide(referee)) if _is_float(referee) else 0.0
    return effect if effect > noise else 0.0


def _gates(
    o: Array,
    r: Array,
    p: Array,
    *,
    allowed: Allowance | None,
    effect: float | None,
    loss: float | None,
    tolerance: Tolerance | None,
) -> Iterator[Gate]:
    if allowed is None:
        yield exact_gate(o, r, p)
        return
    yield error_gate(o, r, allowed)
    yield tail_gate(o, r, allowed)
    if allowed.median is not None:
        yield bulk_gate(o, r, allowed)
    if effect:
        yield signal_gate(o, r, effect)
    if loss is not None:
        yield _gate("loss", loss, LARGEST_LOSS * (effect or 0.0))
    if tolerance:
        yield tolerance_gate(o, r, tolerance)


# The gates. A control puts error, tail and bulk again, with the same allowance, to a wrong referee.


@dataclass(frozen=True)
class Allowance:
    """How far from the truth an output may lie: k times as far as PyTorch itself."""

    k: float
    rmse: float
    peak: float
    median: float | None = None  # of |O - R|; None where PyTorch's rmse speaks for most of its elements


def slack(elements: int, dtype: str) -> float:
    """k: two, or three in half precision; more for a few elements, whose rmse is itself a matter of chance."""
    if elements <= FEW_ELEMENTS:
        return 10.0
    if elements <= 500:
        return 8.0
    return 2.0 if EPS[dtype] <= EPS["float32"] else 3.0


def allow(referee: Array, own: Wide, *, k: float, eps: float) -> Allowance:
    """What R and PyTorch's `own` errors, P - R, alone determine.

    With ten elements or less, `own` holds the same output's errors in all cases: from one element
    alone, PyTorch would now and then be exact by luck (in 7 % of all right candidates, measured on
    normal errors with k = 10), and the candidate be blamed for it.
    """
    truth = _wide(referee)
    floor = eps * rms(truth)  # for a P that happens to be exact
    median = float(np.median(np.abs(own)))
    return Allowance(
        k,
        rmse=max(k * rms(own), floor),
        peak=k * _peak(own) + FEW_EPS * eps * _peak(truth),
        median=max(k * median, floor) if own.size > FEW_ELEMENTS and rms(own) > SPIKED * median else None,
    )


def error_gate(candidate: Array, truth: Array, allowed: Allowance) -> Gate:
    """Is it as close to the truth as PyTorch itself is?"""
    return _gate("error", rms(_wide(candidate) - _wide(truth)), allowed.rmse)


def tail_gate(candidate: Array, truth: Array, allowed: Allowance) -> Gate:
    """Is every single element? One bad element in a million hides from an rmse."""
    return _gate("tail", _peak(_wide(candidate) - _wide(truth)), allowed.peak)


def bulk_gate(candidate: Array, truth: Array, allowed: Allowance) -> Gate:
    """Are most elements? Where PyTorch itself loses a few, its rmse and its worst say nothing of the others."""
    return _gate("bulk", float(np.median(np.abs(_wide(candidate) - _wide(truth)))), allowed.median or 0.0)


def signal_gate(candidate: Array, referee: Array, effect: float) -> Gate:
    """Is the error small beside what the adapter does?"""
    return _gate("signal", rms(_wide(candidate) - _wide(referee)), LARGEST_SHARE * effect)


def exact_gate(candidate: Array, referee: Array, deployed: Array) -> Gate:
    """Is every integer or boolean the referee's? Counts those that are not.

    The deployed model's own value will do: an argmax over a near tie may fall either way.
    """
    wrong = (candidate != referee) & (candidate != deployed)
    return _gate("exact", float(np.count_nonzero(wrong)), 0.0)


def tolerance_gate(candidate: Array, referee: Array, tolerance: Tolerance) -> Gate:
    """|O-R| <= atol + rtol * |R| for every element. The value is max(|O-R| - rtol * |R|), which atol allows."""
    excess = np.abs(_wide(candidate) - _wide(referee)) - tolerance.rtol * np.abs(_wide(referee))
    return _gate("tolerance", float(np.max(excess)), tolerance.atol)


def _gate(name: str, value: float, allowed: float) -> Gate:
    # An allowance that is not finite would let everything pass.
    return Gate(name, value, allowed, passed=value <= allowed < math.inf)


# The controls

CONTROLS = {
    "off": "the model without its adapters",
    "louder": "the model with every scale x 1.1",
    "nudged": "the model with every value x 1.01",
    "tolerance": "the model without its adapters",
}
WRONG_BY = {"off": 1.0, "louder": 0.1}  # how far such a referee lies from the right one, in effects


def _controls(
    case: Case, output: str, *, allowed: Allowance | None, effect: float | None, tolerance: Tolerance | None
) -> Iterator[Control]:
    """Referees that are wrong on purpose. Each float that the adapter reaches is required to tell them apart.

    An integer's gate allows nothing, so it cannot be too wide: it counts only when the whole set is
    asked whether it could tell.
    """
    o, r = case.candidate[output], case.referee[output]
    if case.base is None or case.louder is None:
        wrong = {"nudged": _wide(r) * NUDGE if _is_float(r) else np.zeros_like(r)}
        required = _is_float(o) and bool(np.any(r))
    else:
        wrong = {"off": case.base[output], "louder": case.louder[output]}
        required = _is_float(o) and bool(effect)
    for name, truth in wrong.items():
        yield Control(name, rms(_wide(o) - _wide(truth)), not _passes(o, truth, allowed), required)
    if case.base is not None and _is_float(o) and not effect and np.any(r):
        # No adapter reaches it: that its gates are not too wide is shown as it is without any adapter.
        truth = _wide(r) * NUDGE
        yield Control("nudged", rms(_wide(o) - truth), not _passes(o, truth, allowed), required=True)
    if tolerance and required and "off" in wrong:
        told = not tolerance_gate(o, wrong["off"], tolerance).passed
        yield Control("tolerance", rms(_wide(o) - _wide(wrong["off"])), told, required)


def _passes(candidate: Array, truth: Array, allowed: Allowance | None) -> bool:
    if allowed is None:
        return exact_gate(candidate, truth, truth).passed
    gates = [error_gate, tail_gate, *([bulk_gate] if allowed.median is not None else [])]
    return all(gate(candidate, truth, allowed).passed for gate in gates)


# What the figures mean


def _complaints(case: str, output: str, f: Figures) -> list[Reason]:
    """What the gates say against the candidate or, only where that is nothing, against the check itself."""
    differences = _differences(f)
    outcome = Outcome.DIFFERENT if differences else Outcome.UNDECIDED
    remedies = {} if differences else _remedies(f)
    return [
        Reason(outcome, gate, text, case, output, remedies.get(gate, ""))
        for gate, text in (differences or _doubts(f)).items()
    ]


def _differences(f: Figures) -> dict[str, str]:
    failed = {gate.name: gate for gate in f.gates if not gate.passed}
    fits = [CONTROLS[control.name] for control in f.controls if not control.told and control.required]
    suspicion = f". It fits {fits[0]}" if fits else ""
    texts = {}
    if gate := failed.get("error"):
        times = f", which is x {f.ratio:.3g}" if f.ratio is not None else ""
        texts["error"] = (
            f"the error is {f.error:.3g}, allowed is {gate.allowed:.3g}; {f.peer}'s own is {f.deployed_error:.3g}"
            f"{times}{suspicion}"
        )
    if gate := failed.get("tail"):
        texts["tail"] = f"{_at(f)}, allowed is {gate.allowed:.3g}{suspicion}"
    if gate := failed.get("bulk"):
        texts["bulk"] = (
            f"half of it is off by {gate.value:.3g} and more, allowed is {gate.allowed:.3g}: {f.peer}'s own error is "
            f"in a few elements{suspicion}"
        )
    if gate := failed.get("exact"):
        count = f"{gate.value:.0f} of {_count(math.prod(f.shape), 'value')}"
        texts["exact"] = f"{count} are neither the referee's nor {f.peer}'s; {_at(f)}"
    if gate := failed.get("tolerance"):
        texts["tolerance"] = (
            f"outside the tolerance: max(|O-R| - rtol * |R|) is {gate.value:.3g}, atol {gate.allowed:.3g}"
        )
    return texts


def _doubts(f: Figures) -> dict[str, str]:
    texts = {}
    if f.share is not None and any(gate.name == "signal" and not gate.passed for gate in f.gates):
        texts["signal"] = (
            f"the error {f.error:.3g} is {_percent(f.share)} of what the adapter does ({f.effect:.3g}); over "
            f"{_percent(LARGEST_SHARE)} a merged model cannot be told from an unmerged one"
        )
    if any(gate.name == "loss" and not gate.passed for gate in f.gates):
        cost = "all" if f.merge_loss is None else _percent(f.merge_loss)
        texts["loss"] = (
            f"rounding the merged weights costs {cost} of what the adapter does: the file is what such a merge should "
            "be, and whether the adapter is still in it cannot be told"
        )
    for control in f.controls:
        if control.told or not control.required:
            continue
        gates = "the gates: they are too wide to judge this output, or the adapter does too little to it"
        if control.name == "tolerance":
            gates = f"the tolerance: it is wider than the adapter's effect ({f.effect:.3g})"
        texts[control.name] = (
            f"control `{control.name}`: {CONTROLS[control.name]} (off by {control.error:.3g}; {f.peer}'s own error is "
            f"{f.deployed_error:.3g}) passes {gates}"
        )
    return texts


def _remedies(f: Figures) -> dict[str, str]:
    """For each doubt, by its gate, what would take it away: in numbers, so that nobody has to try them out.

    The adapter that does enough for the most demanding of them does enough for all.
    """
    allowed = next((gate.allowed for gate in f.gates if gate.name == "error"), 0.0)
    remedies = {
        "loss": "weights that are stored finer (a merge with --dtype float32, a graph of more bits), or the adapter "
        "beside them (onnx --lora nodes)"
    }
    times = [f.share / LARGEST_SHARE] if f.share else []
    for control in f.controls:
        if control.name == "tolerance":
            # The worst element lies at least as far off as all do in the mean.
            remedies[control.name] = f"an --atol below {control.error:.2g} with --rtol 0, or the gates alone"
        elif control.name == "nudged":
            remedies[control.name] = f"inputs on which {f.peer}'s own error is smaller beside the values (--inputs)"
        elif f.effect and control.required and not control.told:
            # O's own error and the wrong referee's distance add up as squares do.
            distance = math.sqrt(max(0.0, allowed**2 - f.error**2))
            times.append(distance / (f.effect * WRONG_BY.get(control.name, 1.0)))
    if times:
        enough = 1.05 * max(1.0, *times, 0.0)
        told = f"{enough:.2g}" if enough < 10 else f"{enough:,.0f}"
        more = f"an adapter that does {told} times as much to this output, or inputs on which this one does (--inputs)"
        remedies |= dict.fromkeys(("signal", *WRONG_BY), more)
    return remedies


def _at(f: Figures) -> str:
    worst = f.worst
    return (
        f"at {list(worst.index)} it is {worst.candidate:.9g}, the referee has {worst.referee:.9g}: off by "
        f"{f.max_error:.3g}, {f.peer} by {f.deployed_max_error:.3g} at most"
    )


def _small_features(cases: Sequence[Case], comparisons: Sequence[Comparison], dtype: str) -> Iterator[Reason]:
    """The error gate for features that are small beside others, which an rmse over the whole output would not see.

    Features are the numbers along an axis whose size is the same in every case: classes, a vocabulary, channels.
    Those of like size (within a factor of ten, over all cases) are judged together, by PyTorch's own error in them.
    Features below eps of the largest are left out: they are what is left where numbers as large as that cancel.
    """
    measured: dict[str, list[Case]] = {}
    for there in comparisons:
        if there.figures is not None:
            measured.setdefault(there.output, []).extend(case for case in cases if case.name == there.case)
    for output, mine in measured.items():
        first = mine[0].candidate[output]
        if not _is_float(first) or len({case.candidate[output].ndim for case in mine}) > 1:
            continue
        for axis in range(first.ndim):
            sizes = {case.candidate[output].shape[axis] for case in mine}
            if len(sizes) == 1 and sizes.pop() > 1:
                yield from _small_along(mine, output, axis, _coarser(first, dtype))


def _small_along(cases: Sequence[Case], output: str, axis: int, dtype: str) -> Iterator[Reason]:
    def means(of: Callable[[Case], Wide]) -> Wide:
        """The root mean square of each feature, over all cases."""
        every = [np.moveaxis(of(case), axis, 0) for case in cases]
        return np.array([rms(feature) for feature in np.hstack([x.reshape(len(x), -1) for x in every])])

    truth = means(lambda case: _wide(case.referee[output]))
    error = means(lambda case: _wide(case.candidate[output]) - _wide(case.referee[output]))
    own = means(lambda case: _wide(case.deployed[output]) - _wide(case.referee[output]))
    each = sum(case.candidate[output].size for case in cases) // len(truth)
    if each < LEAST_VALUES:
        return
    with np.errstate(divide="ignore"):
        below = np.floor(np.log10(truth.max() / truth)) if truth.any() else np.zeros_like(truth)
    for decade in np.unique(below[(below > 0) & (truth >= EPS[dtype] * truth.max())]):
        there = below == decade
        k = slack(int(there.sum()) * each, dtype)
        gate = _gate("features", rms(error[there]), max(k * rms(own[there]), EPS[dtype] * rms(truth[there])))
        if not gate.passed:
            worst = int(np.argmax(np.where(there, error, 0)))
            text = (
                f"{_count(int(there.sum()), 'feature')} of {len(there)} along axis {axis}, small beside the others "
                f"(number {worst} is about {truth[worst]:.3g}, the largest {truth.max():.3g}): the error is "
                f"{gate.value:.3g}, allowed is {gate.allowed:.3g}; PyTorch's own is {rms(own[there]):.3g}"
            )
            yield Reason(Outcome.DIFFERENT, "features", text, output=output)


def _could_it_tell(cases: Sequence[Case], comparisons: Sequence[Comparison], *, adapted: bool) -> Iterator[Reason]:
    """The set as a whole must have compared something, and each control must have been told apart somewhere."""

    def complain(gate: str, text: str, case: str = "", output: str = "", remedy: str = "") -> Reason:
        return Reason(Outcome.UNDECIDED, gate, text, case, output, remedy)

    if not comparisons:
        yield complain("nothing", "nothing was compared: there is no case, or no output")
        return
    for case in cases:
        compared = [there for there in comparisons if there.case == case.name and (there.figures or there.reasons)]
        if not compared:
            yield complain("nothing", "nothing was compared: it has no output, or all are empty", case.name)
    for output in dict.fromkeys(there.output for there in comparisons):
        if not any(there.figures or there.reasons for there in comparisons if there.output == output):
            yield complain("nothing", "nothing was compared: it is empty in every case", output=output)

    measured = [there.figures for there in comparisons if there.figures]
    if measured and adapted and not any(f.effect for f in measured):
        yield complain(
            "signal",
            "the adapter changes no output in any case: the referee says the same without it",
            remedy="an adapter whose B and scale are not zero (`lora-export inspect` shows them), or inputs that reach "
            "the layers that it changes (--inputs)",
        )
        return
    controls = [control for f in measured for control in f.controls]
    for name in dict.fromkeys(control.name for control in controls):
        if not any(control.told or control.required for control in controls if control.name == name):
            yield complain(
                name,
                f"control `{name}`: {CONTROLS[name]} gives the same outputs, in every case",
                remedy="an output in floating point beside those that are chosen among (the logits of an argmax), or "
                "more inputs (--inputs)",
            )


def _folded_inputs(perturbed: Sequence[Sensitivity], peer: str) -> Iterator[Reason]:
    for there in perturbed:
        if there.reference_changed and not there.candidate_changed:
            text = f"perturbing the input {there.input} changes {peer} and not the candidate: it was folded away"
            yield Reason(Outcome.DIFFERENT, "inputs", text)
    if perturbed and not any(there.reference_changed for there in perturbed):
        yield Reason(
            Outcome.UNDECIDED,
            "inputs",
            f"perturbing the inputs, one by one, changes nothing in {peer} either",
        )


def _not_judged(
    comparisons: Sequence[Comparison], perturbed: Sequence[Sensitivity], peer: str, *, adapted: bool
) -> Iterator[str]:
    measured = [(there.output, there.figures) for there in comparisons if there.figures]
    reached = {output for output, f in measured if f.effect}
    unreached = [name for name in dict.fromkeys(output for output, _ in measured) if name not in reached]
    if not adapted and comparisons:
        yield "there is no adapter: no signal to gate; the control was every value x 1.01"
    elif unreached:
        yield f"the adapter does not reach {', '.join(unreached)}: there is no signal in them to gate"
    if not perturbed:
        yield "whether each input matters was not tried"
    for there in perturbed:
        if not there.reference_changed:
            yield f"perturbing the input {there.input} does not change {peer} either, so nothing is known of it"


# Figures


def rms(x: Wide) -> float:
    """The root mean square. Divided by the peak first: neither 1e200 nor 1e-200 survives being squared."""
    peak = _peak(x)
    return peak * float(np.sqrt(np.mean(np.square(x / peak)))) if 0 < peak < math.inf else peak


def histogram(x: Wide) -> Histogram:
    """How large the numbers are, by powers of two."""
    exponents = np.frexp(x[x != 0])[1] - 1  # 2^e <= |x| < 2^(e+1)
    if not exponents.size:
        return Histogram(0, (), x.size)
    first = int(exponents.min())
    return Histogram(first, tuple(map(int, np.bincount(exponents - first))), x.size - exponents.size)


def _peak(x: Wide) -> float:
    return float(np.max(np.abs(x), initial=0.0))


def _wide(x: Array) -> Wide:
    return x.astype(np.float64, copy=False)


def _coarser(output: Array, dtype: str) -> str:
    """The dtype that limits an output: a bf16 model's logits are not finer for being handed out in fp32."""
    name = output.dtype.name
    return name if EPS.get(name, 0.0) > EPS[dtype] else dtype


def _ratio(value: float | None, unit: float | None) -> float | None:
    return value / unit if value is not None and unit else None


def _worst(candidate: Array, referee: Array) -> Place:
    wrong = np.abs(_wide(candidate) - _wide(referee))
    index = tuple(int(i) for i in np.unravel_index(int(np.argmax(wrong)), wrong.shape))
    return Place(index, float(candidate[index]), float(referee[index]))


def _max_relative(candidate: Wide, referee: Wide) -> float | None:
    where = referee != 0
    if not where.any():
        return None
    return float(np.max(np.abs(candidate[where] - referee[where]) / np.abs(referee[where])))


def _cosine(candidate: Wide, referee: Wide) -> float | None:
    if not (candidate.any() and referee.any()):
        return None
    return float(np.mean((candidate / rms(candidate)) * (referee / rms(referee))))


def _is_logits(output: str, array: Array) -> bool:
    return "logits" in output and _is_float(array) and array.ndim > 0 and array.shape[-1] >= 2


def _top1(candidate: Array, referee: Array) -> float:
    return float(np.mean(_wide(candidate).argmax(-1) == referee.argmax(-1)))


def _kl(candidate: Array, referee: Array) -> float:
    """The mean of KL(referee || candidate) over all rows, in nats."""
    of_referee, of_candidate = _log_softmax(_wide(referee)), _log_softmax(_wide(candidate))
    divergence = np.sum(np.exp(of_referee) * (of_referee - of_candidate), axis=-1)
    return max(0.0, float(np.mean(divergence)))  # it is never negative but by rounding


def _log_softmax(x: Wide) -> Wide:
    shifted = x - x.max(-1, keepdims=True)
    result: Wide = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.99 else f"{100 * share:.0f} %"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
