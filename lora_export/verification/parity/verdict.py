"""What a verdict is made of: the figures of every output in every case, and the reasons against it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from lora_export.errors import Different, Undecided

PYTORCH = "PyTorch"
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


@dataclass(frozen=True)
class Sensitivity:
    """Whether perturbing one graph input alone changed any output."""

    input: str
    peer_changed: bool
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
    """The error and tail gates put to O against a reference that is wrong on purpose: they must tell the two apart."""

    name: str
    error: float  # rmse of O against the wrong reference
    detected: bool
    required: bool  # where nothing can be told by nature (an output that no adapter reaches), nothing is asked


@dataclass(frozen=True)
class WorstElement:
    """Where O lies farthest from R."""

    index: tuple[int, ...]
    candidate: float
    reference: float


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
    ratio_limit: float  # how many times PyTorch's own error is allowed; 0 for integers and booleans
    error: float  # rmse(O,R)
    deployed_error: float  # rmse(P,R)
    ratio: float | None  # error / deployed_error; None where PyTorch is exact
    max_error: float  # max|O-R|
    deployed_max_error: float  # max|P-R|
    max_relative_error: float | None  # max|O-R|/|R| where R is not 0
    worst: WorstElement
    effect: float | None  # rmse(R,B), what the adapter does; None without one
    relative_to_effect: float | None  # error / effect; None where there is no effect
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
    def limit_used(self) -> float:
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
            f"    it is {f.worst.candidate:.9g}, the reference has {f.worst.reference:.9g}",
        ]
        if f.relative_to_effect is not None:
            lines.append(f"  the error is {percent(f.relative_to_effect)} of what the adapter does ({f.effect:.3g})")
        elif f.effect is not None:
            lines.append("  the adapter does not reach this output")
        if f.top1 is not None and f.kl is not None:
            lines.append(f"  top-1 agreement {percent(f.top1)}, mean KL {f.kl:.3g} nats")
        if f.merge_loss is not None:
            lines.append(f"  rounding the merged weights costs {percent(f.merge_loss)} of what the adapter does")
        return "\n".join(lines)


@dataclass(frozen=True)
class Verdict:
    """Same, different or undecided, and every figure that led to it. True only where it is `same`."""

    outcome: Outcome
    reasons: tuple[Reason, ...]  # empty exactly where the outcome is `same`
    comparisons: tuple[Comparison, ...]
    sensitivity: tuple[Sensitivity, ...]
    dtype: str  # in which the candidate is deployed
    notes: tuple[str, ...] = ()  # what was not judged, and how the reference was made
    peer: str = PYTORCH  # whose own error was the measure

    @property
    def same(self) -> bool:
        return self.outcome is Outcome.SAME

    @property
    def exit_code(self) -> int:
        return self.outcome.exit_code

    @property
    def distinct_reasons(self) -> tuple[Reason, ...]:
        """Of each gate's complaints about each output the first: the other cases say it again."""
        by_gate: dict[tuple[str, ...], Reason] = {}
        for there in self.reasons:
            by_gate.setdefault((there.outcome, there.gate, there.output, "" if there.output else there.text), there)
        return tuple(by_gate.values())

    @property
    def nearest_to_failing(self) -> tuple[Comparison, ...]:
        """For each output the case that strained its gates most, the most strained output first."""
        measured = [there for there in self.comparisons if there.figures is not None]
        measured.sort(key=lambda there: there.figures.limit_used if there.figures else 0.0, reverse=True)
        by_output: dict[str, Comparison] = {}
        for there in measured:
            by_output.setdefault(there.output, there)
        return tuple(by_output.values())

    def __bool__(self) -> bool:
        return self.same

    def __str__(self) -> str:
        outputs = {there.output for there in self.comparisons}
        cases = {there.case for there in self.comparisons}
        lines = [f"{self.outcome}: {count(len(outputs), 'output')} in {count(len(cases), 'case')}, {self.dtype}"]
        told = self.distinct_reasons[:SHOWN]
        for reason, after in itertools.zip_longest(told, told[1:]):
            lines.append(f"  - {reason}")
            if reason.remedy and (after is None or after.remedy != reason.remedy):  # one for a whole run of them
                lines.append(f"    {DECIDES}: {reason.remedy}")
        more = len(self.reasons) - len(told)
        lines += [f"  - and {count(more, 'reason')} more"] if more else []
        shown = self.nearest_to_failing
        lines += [str(there) for there in shown[:SHOWN]]
        if len(shown) > SHOWN:
            lines.append(f"{count(len(shown) - SHOWN, 'output')} more, each farther from its limits than these")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def combine(verdicts: Mapping[str, Verdict]) -> Verdict:
    """Verdicts on one candidate in several roles as one, which is `same` where all of them are.

    Cases are called after their role, too, and notes that are not of all.
    """
    *_, last = verdicts.values()
    said: dict[str, list[str]] = {}
    for role, there in verdicts.items():
        for note in dict.fromkeys(there.notes):
            said.setdefault(note, []).append(role)
    reasons = tuple(_in_role(role, reason) for role, there in verdicts.items() for reason in there.reasons)
    return Verdict(
        outcome=outcome_of(reasons),
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
        sensitivity=tuple(dict.fromkeys(tried for there in verdicts.values() for tried in there.sensitivity)),
        dtype=last.dtype,
        notes=tuple(
            note if len(roles) == len(verdicts) else f"{', '.join(roles)}: {note}" for note, roles in said.items()
        ),
        peer=last.peer,
    )


def _in_role(role: str, reason: Reason) -> Reason:
    if reason.case:
        return replace(reason, case=f"{role}, {reason.case}")
    return replace(reason, text=f"{role}: {reason.text}")


def outcome_of(reasons: Sequence[Reason]) -> Outcome:
    outcomes = {reason.outcome for reason in reasons}
    return next((o for o in (Outcome.DIFFERENT, Outcome.UNDECIDED) if o in outcomes), Outcome.SAME)


def percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.99 else f"{100 * share:.0f} %"


def count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
