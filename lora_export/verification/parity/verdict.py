"""The verdict: the figures of every output in every case, and the reasons against `same`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from enum import StrEnum

import numpy as np

from lora_export.errors import Different, EscapedLines, Undecided, brief, count, escaped_lines, one_line
from lora_export.notebook import html_table
from lora_export.options.spelling import named
from lora_export.verification.parity.figures import PYTORCH, Figures

DECIDES = "what would decide it"  # introduces a remedy
NOT_JUDGED = "not judged"  # introduces a part of the candidate in which a fault could be
SHOWN = 5  # outputs, and reasons, that a verdict prints; it holds all of them


class Outcome(StrEnum):
    SAME = "same"
    DIFFERENT = "different"
    UNDECIDED = "undecided"

    @property
    def exit_code(self) -> int:
        """The exit code of a command that ends with this outcome."""
        codes = {Outcome.DIFFERENT: Different.exit_code, Outcome.UNDECIDED: Undecided.exit_code}
        return codes.get(self, 0)

    @property
    def colour(self) -> str:
        """In which it is shown."""
        return {Outcome.SAME: "green", Outcome.DIFFERENT: "red"}.get(self, "yellow")


SEVERITY = (Outcome.SAME, Outcome.UNDECIDED, Outcome.DIFFERENT)  # each outweighs those before it


@dataclass(frozen=True)
class Sensitivity:
    """Whether a change of one graph input alone changed any output."""

    input: str
    peer_changed: bool
    candidate_changed: bool

    @property
    def is_frozen(self) -> bool:
        """Whether the input has no influence, as where an export replaced it by a constant."""
        return self.peer_changed and not self.candidate_changed


@dataclass(frozen=True)
class Reason:
    """One reason why a verdict is not `same`. `case` or `output` is empty where it concerns all of them."""

    outcome: Outcome
    gate: str  # or the name of a control
    text: str
    case: str = ""
    output: str = ""
    remedy: str = ""  # with `undecided`: the change to the run that would let it decide, where that is known

    def __str__(self) -> str:
        where = " in ".join(part for part in (self.output, self.case and f"case {self.case}") if part)
        return one_line(f"{where}: {self.text}" if where else self.text)


@dataclass(frozen=True)
class Findings:
    """What was found beside the figures, in sentences. A sum has those of both, in this order."""

    notes: tuple[str, ...] = ()  # how the runs were made, and what to know about them
    not_judged: tuple[str, ...] = ()  # parts of the candidate in which a fault could be
    doubts: tuple[str, ...] = ()  # parts of the model that the inputs do not exercise: each makes a verdict undecided
    faults: tuple[str, ...] = ()  # each makes a verdict different, however little of it reaches an output

    def __add__(self, other: Findings) -> Findings:
        return Findings(*(one + more for one, more in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Comparison:
    """One output in one case. `figures` is None where the output could not be measured, or is empty."""

    case: str
    output: str
    figures: Figures | None = None
    reasons: tuple[Reason, ...] = ()

    @property
    def text(self) -> EscapedLines:
        """The figures of this output, in lines."""
        title = one_line(f"{self.output} in case {self.case}")
        if self.figures is None:
            return escaped_lines(f"{title}: not measured")
        f = self.figures
        passed = "within" if all(gate.passed for gate in f.gates) else "NOT within"
        return escaped_lines(f"{title}: {f.dtype} {list(f.shape)}, {passed} its limits", *_figure_lines(f))

    def __str__(self) -> str:
        return self.text


def _figure_lines(f: Figures) -> Iterator[str]:
    if error := f.gate("error"):
        ratio = f"× {f.ratio:.3g}" if f.ratio is not None else "it is exact"
        own = f"{f.peer}'s own error {f.deployed_error:.3g} ({ratio})"
        yield f"  error {f.error:.3g}, allowed {error.allowed:.3g}; {own}"
    yield (
        f"  worst element {list(f.worst.index)}: off by {f.max_error:.3g}; "
        f"{f.peer} is off by at most {f.deployed_max_error:.3g}"
    )
    yield f"    the candidate has {f.worst.candidate:.9g}, the reference {f.worst.reference:.9g}"
    if f.relative_to_effect is not None:
        yield f"  the error is {percent(f.relative_to_effect)} of the adapter's effect ({f.effect:.3g})"
    elif f.effect is not None:
        yield "  the adapter does not reach this output"
    if f.kl is not None:
        agreement = "" if f.top1 is None else f"top-1 agreement {percent(f.top1)}, "
        yield f"  {agreement}mean KL divergence {f.kl:.3g} nats"
    if f.merge_loss is not None:
        yield f"  rounding the merged weights costs {percent(f.merge_loss)} of the adapter's effect"


def _shown(f: Figures) -> tuple[object, ...]:
    """The figures that a table has of an output."""
    return f.error, f.deployed_error, "" if f.effect is None else f.effect, f.limit_used


@dataclass(frozen=True, repr=False)
class Verdict:
    """`same`, `different` or `undecided`, with every figure that led to it. True only where it is `same`."""

    outcome: Outcome
    reasons: tuple[Reason, ...]  # empty if and only if the outcome is `same`
    comparisons: tuple[Comparison, ...]
    sensitivity: tuple[Sensitivity, ...]
    dtype: str  # the precision in which the candidate is deployed
    notes: tuple[str, ...] = ()  # how the reference was computed, and what to know about the run
    not_judged: tuple[str, ...] = ()  # parts of the candidate in which a fault could be
    peer: str = PYTORCH  # the implementation whose own error sets the limits
    recorded: tuple[str, ...] = ()  # where the candidate's record disagrees with what it was compared with

    def __repr__(self) -> str:
        return brief(self, self.headline)

    def _repr_html_(self) -> str:
        columns = "output", "case", "error", f"{self.peer}'s own error", "adapter's effect", "error / allowed"
        measured = [(each, f) for each in self.nearest_to_failing if (f := each.figures)]
        rows = [(each.output, each.case, *_shown(f)) for each, f in measured]
        reasons = [(reason.gate, reason) for reason in self.distinct_reasons]
        table = html_table(self.headline, columns, rows, colour=self.outcome.colour)
        return table + (html_table("", ("check", "reason"), reasons) if reasons else "")

    @property
    def same(self) -> bool:
        return self.outcome is Outcome.SAME

    @property
    def exit_code(self) -> int:
        return self.outcome.exit_code

    @property
    def measured(self) -> tuple[tuple[Comparison, Figures], ...]:
        """The comparisons that have figures, with them."""
        return tuple((comparison, comparison.figures) for comparison in self.comparisons if comparison.figures)

    @property
    def distinct_reasons(self) -> tuple[Reason, ...]:
        """The first reason of each gate for each output. Other cases repeat it."""
        first: dict[tuple[str, ...], Reason] = {}
        for reason in self.reasons:
            what = reason.output or reason.text
            first.setdefault((reason.outcome, reason.gate, what), reason)
        return tuple(first.values())

    @property
    def nearest_to_failing(self) -> tuple[Comparison, ...]:
        """For each output the case that is closest to its limits, the closest output first."""
        closest_first = sorted(self.measured, key=lambda pair: pair[1].limit_used, reverse=True)
        by_output: dict[str, Comparison] = {}
        for comparison, _ in closest_first:
            by_output.setdefault(comparison.output, comparison)
        return tuple(by_output.values())

    @property
    def headline(self) -> str:
        """The verdict in one line: the outcome, the largest error, and how much was compared.

        The error is left out where the candidate is different for another reason.
        """
        if not self.comparisons:
            return f"{self.outcome}: nothing was compared"
        parts: list[str] = []
        is_different = any(reason.outcome is Outcome.DIFFERENT for reason in self.reasons)
        if not is_different or any(reason.gate == "error" for reason in self.reasons):
            parts += self._largest_error()
        outputs = len({comparison.output for comparison in self.comparisons})
        cases = count(len({comparison.case for comparison in self.comparisons}), "case")
        parts.append(cases if outputs == 1 else f"{outputs} outputs in {cases}")
        parts += [self.dtype] if self.dtype != "float32" else []
        return f"{self.outcome}: {', '.join(parts)}"

    def _largest_error(self) -> Iterator[str]:
        effects = [f.relative_to_effect for _, f in self.measured if f.relative_to_effect is not None]
        if effects:
            yield f"error {percent(max(effects))} of the adapter's effect"
        gated = [(gate.limit_used, f) for _, f in self.measured if (gate := f.gate("error"))]
        if not gated:
            return
        used, f = max(gated, key=lambda pair: pair[0])
        if f.ratio is None or (used <= 1 and f.ratio > f.ratio_limit):  # one rounding step is allowed in any case
            yield f"{percent(used)} of the allowed error" if used < 10 else f"{multiple(used)} × the allowed error"
        else:
            yield f"{multiple(f.ratio)} × {f.peer}'s own rounding (limit {f.ratio_limit:g} ×)"

    def strictly(self) -> Verdict:
        """The verdict in which each part that was not judged is a reason for `undecided`."""
        parts = (
            Reason(Outcome.UNDECIDED, NOT_JUDGED, f"{NOT_JUDGED}: {part}. {named('strict', False)} accepts that")
            for part in self.not_judged
        )
        return with_reasons(self, *parts)

    def __bool__(self) -> bool:
        return self.same

    @property
    def summary_lines(self) -> tuple[list[str], list[str]]:
        """Lines below the headline: what the candidate records; the reasons, what was not judged, and the notes.

        There are notes only where the verdict is not `same`.
        """
        notes = () if self.same else (one_line(f"note: {note}") for note in self.notes)
        recorded = [one_line(f"  - {line}") for line in self.recorded]
        return recorded, [*self._reason_lines(), *self._not_judged_lines(), *notes]

    @property
    def summary(self) -> EscapedLines:
        """The headline, what was not judged and, where the verdict is not `same`, why: no figures of single outputs."""
        recorded, reasons = self.summary_lines
        return escaped_lines(self.headline, *recorded, *reasons)

    def __str__(self) -> str:
        lines = [self.headline, *(f"  - {line}" for line in self.recorded), *self._reason_lines()]
        closest = self.nearest_to_failing
        lines += (comparison.text for comparison in closest[:SHOWN])
        if len(closest) > SHOWN:
            lines.append(f"{count(len(closest) - SHOWN, 'output')} more, each farther from its limits than these")
        return escaped_lines(*lines, *self._not_judged_lines(), *(f"note: {note}" for note in self.notes))

    def _not_judged_lines(self) -> Iterator[str]:
        """None where these are reasons already."""
        is_strict = any(reason.gate == NOT_JUDGED for reason in self.reasons)
        return iter(()) if is_strict else (one_line(f"{NOT_JUDGED}: {part}") for part in self.not_judged)

    def _reason_lines(self) -> Iterator[str]:
        shown = self.distinct_reasons[:SHOWN]
        for reason, following in itertools.zip_longest(shown, shown[1:]):
            yield f"  - {reason}"
            # A remedy that several reasons share is printed once, after the last of them.
            if reason.remedy and (following is None or following.remedy != reason.remedy):
                yield f"    {DECIDES}: {reason.remedy}"
        if more := len(self.reasons) - len(shown):
            yield f"  - and {count(more, 'reason')} more"


def joint_verdict(verdicts: Mapping[str, Verdict]) -> Verdict:
    """One verdict of several on the same candidate, by role. It is `same` if and only if all of them are.

    The name of a case begins with its role, and so does a note that does not concern all roles.
    """
    *_, last = verdicts.values()
    reasons = tuple(_in_role(role, reason) for role, verdict in verdicts.items() for reason in verdict.reasons)
    return Verdict(
        outcome=outcome_of(reasons),
        reasons=reasons,
        comparisons=tuple(
            replace(
                comparison,
                case=f"{role}, {comparison.case}",
                reasons=tuple(_in_role(role, reason) for reason in comparison.reasons),
            )
            for role, verdict in verdicts.items()
            for comparison in verdict.comparisons
        ),
        sensitivity=tuple(dict.fromkeys(each for verdict in verdicts.values() for each in verdict.sensitivity)),
        dtype=last.dtype,
        notes=tuple(_combined({role: verdict.notes for role, verdict in verdicts.items()})),
        not_judged=tuple(_combined({role: verdict.not_judged for role, verdict in verdicts.items()})),
        peer=last.peer,
    )


def _combined(lines_of: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """The lines of all roles, each once. It begins with its roles, unless all have it."""
    roles_of: dict[str, list[str]] = {}
    for role, lines in lines_of.items():
        for line in dict.fromkeys(lines):
            roles_of.setdefault(line, []).append(role)
    for line, roles in roles_of.items():
        yield line if len(roles) == len(lines_of) else f"{', '.join(roles)}: {line}"


def _in_role(role: str, reason: Reason) -> Reason:
    if reason.case:
        return replace(reason, case=f"{role}, {reason.case}")
    return replace(reason, text=f"{role}: {reason.text}")


def with_findings(verdict: Verdict, found: Findings, gate: str) -> Verdict:
    """The verdict, and what was found after it; `gate` names the reasons that it makes."""
    faults = (Reason(Outcome.DIFFERENT, gate, fault) for fault in found.faults)
    doubts = (Reason(Outcome.UNDECIDED, gate, doubt) for doubt in found.doubts)
    notes, not_judged = (*verdict.notes, *found.notes), (*verdict.not_judged, *found.not_judged)
    return with_reasons(replace(verdict, notes=notes, not_judged=not_judged), *faults, *doubts)


def with_reasons(verdict: Verdict, *more: Reason) -> Verdict:
    reasons = (*verdict.reasons, *more)
    return replace(verdict, outcome=outcome_of(reasons), reasons=reasons)


def outcome_of(reasons: Sequence[Reason]) -> Outcome:
    """The outcome that outweighs those of all other reasons; no reason at all is `same`."""
    return max((reason.outcome for reason in reasons), key=SEVERITY.index, default=Outcome.SAME)


def percent(fraction: float) -> str:
    """Two significant digits, and whole numbers from 99 % on: `0.000042 %`, `1234 %`."""
    if not 0 < fraction < 0.99:
        return f"{100 * fraction:.0f} %"
    rounded = float(f"{100 * fraction:.2g}")
    return f"{np.format_float_positional(rounded, trim='-') if rounded >= 1e-6 else f'{rounded:.2g}'} %"


def multiple(factor: float) -> str:
    """Two significant digits, and whole numbers from 10 on: `1.3`, `840`."""
    return f"{factor:.2g}" if factor < 10 else f"{factor:,.0f}" if factor < 1e6 else f"{factor:.2g}"
