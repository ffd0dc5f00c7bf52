"""Two sets of arrays: the same, different, or this check cannot tell.

A fixed tolerance cannot decide it: 1e-3 is where a GPU's rounding lives *and* where a weak adapter
lives. Five arrays an output do, all computed from the same inputs:

    O  the candidate, which is judged
    R  the reference: adapters attached, in fp64
    P  the deployed model: PyTorch in the dtype in which it will run, adapters attached or, where that is less
       exact, merged; of a graph that is judged against its own base, that base with the adapters in another way
    B  the base: the reference without its adapters
    L  the reference with scale × 1.1: every scale x 1.1

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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lora_export.errors import InputRefused
from lora_export.verification.parity.figures import (
    EPS,
    Array,
    Arrays,
    Wide,
    coarser,
    cosine,
    effect_of,
    histogram,
    is_float,
    is_logits,
    kl,
    max_relative,
    peak,
    ratio,
    rms,
    top1,
    wide,
    worst_element,
)
from lora_export.verification.parity.gates import (
    CONTROLS,
    FEW_ELEMENTS,
    Tolerance,
    allow,
    controls_of,
    gate_of,
    gates_of,
    slack,
)
from lora_export.verification.parity.reasons import complaints
from lora_export.verification.parity.verdict import (
    PYTORCH,
    Comparison,
    Figures,
    Outcome,
    Reason,
    Sensitivity,
    Verdict,
    count,
    outcome_of,
)

DEPLOYED = ("float32", "float16", "bfloat16")  # a reference in fp64 is finer than each of these
LEAST_VALUES = 5  # of a feature, from which its size, and PyTorch's error in it, are more than chance


@dataclass(frozen=True, eq=False)
class Case:
    """What everybody made of one set of inputs.

    `candidate` and `deployed` are in the deployed dtype, the others in fp64. `base` and `scaled`
    are None only where there is no adapter at all. `attached` is given where the candidate's
    merged weights are stored in a low precision: then `reference` used the weights so rounded,
    `attached` the adapters as they are, and the difference is the merge loss. `base` and `scaled` are rounded
    like `reference` then: what rounding does to the base's own weights must not pass for the adapter's effect.
    """

    name: str
    inputs_summary: str  # such as "input_ids int64 [2, 7]"
    reference: Arrays
    deployed: Arrays
    candidate: Arrays
    base: Arrays | None = None
    scaled: Arrays | None = None
    attached: Arrays | None = None
    peer: str = PYTORCH  # who computed `deployed`, in words


def judge(
    cases: Sequence[Case],
    *,
    dtype: str = "float32",
    sensitivity: Sequence[Sensitivity] = (),
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
        raise InputRefused(
            f"parity in {dtype} cannot be judged by a float64 reference; deploy in {', '.join(DEPLOYED)}"
        )
    tolerance = None if atol is None and rtol is None else Tolerance(atol or 0.0, rtol or 0.0)
    peer = cases[0].peer if cases else PYTORCH
    adapted = any(case.base is not None or case.scaled is not None for case in cases)
    comparisons = tuple(
        _compare(case, output, cases, dtype=dtype, adapted=adapted, tolerance=tolerance)
        for case in cases
        for output in _names(case)
    )
    reasons = (
        *(reason for there in comparisons for reason in there.reasons),
        *_small_features(cases, comparisons, dtype),
        *_could_it_tell(cases, comparisons, adapted=adapted),
        *_folded_inputs(sensitivity, peer),
        *(Reason(Outcome.UNDECIDED, "inputs", doubt) for doubt in doubts),
        *(Reason(Outcome.DIFFERENT, "weights", fault) for fault in faults),
    )
    return Verdict(
        outcome=outcome_of(reasons),
        reasons=reasons,
        comparisons=comparisons,
        sensitivity=tuple(sensitivity),
        dtype=dtype,
        notes=(*notes, *_not_judged(comparisons, sensitivity, peer, adapted=adapted)),
        peer=peer,
    )


# --- One output of one case ---


def _compare(
    case: Case, output: str, cases: Sequence[Case], *, dtype: str, adapted: bool, tolerance: Tolerance | None
) -> Comparison:
    faults = _structure(case, output, adapted=adapted)
    if faults or case.reference[output].size == 0:
        return Comparison(case.name, output, reasons=tuple(faults))
    alike = [case]
    if case.reference[output].size <= FEW_ELEMENTS:
        alike = [there for there in cases if output in _names(there) and not _structure(there, output, adapted=adapted)]
    own = np.concatenate([(wide(there.deployed[output]) - wide(there.reference[output])).ravel() for there in alike])
    figures = _measure(case, output, own, dtype=dtype, tolerance=tolerance)
    return Comparison(case.name, output, figures, tuple(complaints(case.name, output, figures)))


def _sides(case: Case) -> dict[str, Arrays]:
    """All sets of arrays that the case holds, by what a message calls them."""
    sides = {
        "the candidate": case.candidate,
        "the reference": case.reference,
        "the deployed model": case.deployed,
        "the base": case.base,
        "the reference with scale × 1.1": case.scaled,
        "the attached reference": case.attached,
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
    if adapted and (case.base is None or case.scaled is None):
        what = "without adapters" if case.base is None else "with every scale x 1.1"
        faults.append(complain(Outcome.UNDECIDED, f"the case was not run {what}: a control cannot be put"))
    if faults:
        return faults

    reference, deployed = there["the reference"], there["the deployed model"]
    for who, array in there.items():
        if array.shape != reference.shape:
            shapes = f"{list(array.shape)}, the reference's {list(reference.shape)}"
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
    if is_float(deployed):
        return is_float(array)
    return array.dtype == deployed.dtype and deployed.dtype.kind in "iub"


def _not_finite(there: Arrays, complain: Callable[[Outcome, str], Reason]) -> list[Reason]:
    """NaN and infinity. NaN on both sides is not agreement: where the measure itself is not finite, nothing is told."""
    faults = []
    measure = np.isfinite(there["the reference"]) & np.isfinite(there["the deployed model"])
    for who, array in there.items():
        bad = ~np.isfinite(array)
        fault_of_candidate = who == "the candidate" and bool(np.any(bad & measure))
        if fault_of_candidate:
            bad &= measure
        if bad.any():
            index = tuple(int(i) for i in np.argwhere(bad)[0])
            text = f"{who} has {count(int(bad.sum()), 'value')} not finite, the first at {list(index)}: "
            text += f"{float(array[index])}, the reference has {float(there['the reference'][index]):.9g}"
            faults.append(complain(Outcome.DIFFERENT if fault_of_candidate else Outcome.UNDECIDED, text))
    return faults


def _measure(case: Case, output: str, own: Wide, *, dtype: str, tolerance: Tolerance | None) -> Figures:
    """Every figure, gate and control of one output that everybody has, finite, in one shape."""
    o, r, p = case.candidate[output], case.reference[output], case.deployed[output]
    allowed = allow(r, own, k=slack(o.size, coarser(o, dtype)), eps=EPS[coarser(o, dtype)]) if is_float(o) else None
    error, deployed_error = rms(wide(o) - wide(r)), rms(wide(p) - wide(r))
    base, scaled = (None if there is None else there[output] for there in (case.base, case.scaled))
    effect = None if base is None else effect_of(r, base)
    loss = None if case.attached is None else rms(wide(r) - wide(case.attached[output]))
    return Figures(
        dtype=o.dtype.name,
        shape=o.shape,
        ratio_limit=allowed.k if allowed else 0.0,
        error=error,
        deployed_error=deployed_error,
        ratio=ratio(error, deployed_error),
        max_error=peak(wide(o) - wide(r)),
        deployed_max_error=peak(wide(p) - wide(r)),
        max_relative_error=max_relative(wide(o), wide(r)),
        worst=worst_element(o, r),
        effect=effect,
        relative_to_effect=ratio(error, effect),
        cosine=cosine(wide(o), wide(r)),
        top1=top1(o, r) if is_logits(output, o) else None,
        kl=kl(o, r) if is_logits(output, o) else None,
        merge_loss=ratio(loss, effect),
        errors=histogram(wide(o) - wide(r)),
        deployed_errors=histogram(wide(p) - wide(r)),
        effects=None if base is None else histogram(wide(r) - wide(base)),
        gates=tuple(gates_of(o, r, p, allowed=allowed, effect=effect, loss=loss, tolerance=tolerance)),
        controls=tuple(controls_of(o, r, base, scaled, allowed=allowed, effect=effect, tolerance=tolerance)),
        peer=case.peer,
    )


# --- All cases together ---


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
        if not is_float(first) or len({case.candidate[output].ndim for case in mine}) > 1:
            continue
        for axis in range(first.ndim):
            sizes = {case.candidate[output].shape[axis] for case in mine}
            if len(sizes) == 1 and sizes.pop() > 1:
                yield from _small_along(mine, output, axis, coarser(first, dtype))


def _small_along(cases: Sequence[Case], output: str, axis: int, dtype: str) -> Iterator[Reason]:
    def means(of: Callable[[Case], Wide]) -> Wide:
        """The root mean square of each feature, over all cases."""
        every = [np.moveaxis(of(case), axis, 0) for case in cases]
        return np.array([rms(feature) for feature in np.hstack([x.reshape(len(x), -1) for x in every])])

    truth = means(lambda case: wide(case.reference[output]))
    error = means(lambda case: wide(case.candidate[output]) - wide(case.reference[output]))
    own = means(lambda case: wide(case.deployed[output]) - wide(case.reference[output]))
    each = sum(case.candidate[output].size for case in cases) // len(truth)
    if each < LEAST_VALUES:
        return
    with np.errstate(divide="ignore"):
        below = np.floor(np.log10(truth.max() / truth)) if truth.any() else np.zeros_like(truth)
    for decade in np.unique(below[(below > 0) & (truth >= EPS[dtype] * truth.max())]):
        there = below == decade
        k = slack(int(there.sum()) * each, dtype)
        gate = gate_of("features", rms(error[there]), max(k * rms(own[there]), EPS[dtype] * rms(truth[there])))
        if not gate.passed:
            worst = int(np.argmax(np.where(there, error, 0)))
            text = (
                f"{count(int(there.sum()), 'feature')} of {len(there)} along axis {axis}, small beside the others "
                f"(number {worst} is about {truth[worst]:.3g}, the largest {truth.max():.3g}): the error is "
                f"{gate.value:.3g}, allowed is {gate.allowed:.3g}; {cases[0].peer}'s own is {rms(own[there]):.3g}"
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
            "effect",
            "the adapter changes no output in any case: the reference says the same without it",
            remedy="an adapter whose B and scale are not zero (`lora-export inspect` shows them), or inputs that reach "
            "the layers that it changes (--inputs)",
        )
        return
    controls = [control for f in measured for control in f.controls]
    for name in dict.fromkeys(control.name for control in controls):
        if not any(control.detected or control.required for control in controls if control.name == name):
            yield complain(
                name,
                f"control `{name}`: {CONTROLS[name]} gives the same outputs, in every case",
                remedy="an output in floating point beside those that are chosen among (the logits of an argmax), or "
                "more inputs (--inputs)",
            )


def _folded_inputs(sensitivity: Sequence[Sensitivity], peer: str) -> Iterator[Reason]:
    for there in sensitivity:
        if there.peer_changed and not there.candidate_changed:
            text = f"perturbing the input {there.input} changes {peer} and not the candidate: it was folded away"
            yield Reason(Outcome.DIFFERENT, "inputs", text)
    if sensitivity and not any(there.peer_changed for there in sensitivity):
        yield Reason(
            Outcome.UNDECIDED,
            "inputs",
            f"perturbing the inputs, one by one, changes nothing in {peer} either",
        )


def _not_judged(
    comparisons: Sequence[Comparison], sensitivity: Sequence[Sensitivity], peer: str, *, adapted: bool
) -> Iterator[str]:
    measured = [(there.output, there.figures) for there in comparisons if there.figures]
    reached = {output for output, f in measured if f.effect}
    unreached = [name for name in dict.fromkeys(output for output, _ in measured) if name not in reached]
    if not adapted and comparisons:
        yield "there is no adapter: no signal to gate; the control was every value x 1.01"
    elif unreached:
        yield f"the adapter does not reach {', '.join(unreached)}: there is no signal in them to gate"
    if not sensitivity:
        yield "whether each input matters was not tried"
    for there in sensitivity:
        if not there.peer_changed:
            yield f"perturbing the input {there.input} does not change {peer} either, so nothing is known of it"
