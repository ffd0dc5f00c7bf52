"""The result of an audit: what was found of each tensor, and of the whole checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, ClassVar

from lora_export.errors import brief, count, escaped_lines, one_line
from lora_export.notebook import html_table
from lora_export.plan import Step
from lora_export.verification.parity import NOT_JUDGED, Findings, Outcome, WorstElement

SHOWN_WEIGHTS = 8  # weights that are printed; the object holds all of them


class Fate(StrEnum):
    """What should have become of a tensor."""

    KEPT = "kept"
    CHANGED = "changed"
    REPLACED = "replaced"
    NONE = "none"  # neither the base nor an adapter has it

    @classmethod
    def of(cls, step: Step | None) -> Fate:
        if step is None:
            return cls.KEPT
        return cls.REPLACED if step.is_replacement else cls.CHANGED


@dataclass(frozen=True)
class AuditedWeight:
    """What was found of one tensor."""

    name: str
    fate: Fate
    outcome: Outcome
    why: str = ""  # empty where it is the same
    elements: int = 0
    off: int = 0  # entries that differ by more than what is allowed
    # The largest |M - V| relative to what is allowed for that entry: of the first entries, and of those that their bits
    # do not decide. It is 1 or less for every other entry.
    error: float = 0.0
    controls: Mapping[str, bool] = field(default_factory=dict)  # a deliberate error -> whether it was detected
    # Of a changed weight, as a merge report has them (see StepResult), but with sums in fp64:
    relative_change: float | None = None
    retention: float | None = None
    noise: float | None = None
    # Of a calibrated layer: ‖X(M - V)ᵀ‖ / ‖X(V - W)ᵀ‖ on held-out inputs X, and the same with the nearest numbers
    output_error: float | None = None
    nearest_output_error: float | None = None
    worst: WorstElement | None = None  # the entry with the largest error relative to what is allowed

    def __str__(self) -> str:
        return one_line(f"{self.name}: {self.outcome}{f', {self.why}' if self.why else ''}")


@dataclass(frozen=True, repr=False)
class Audit:
    """All tensors: different where one is different, else undecided where one is undecided. True only where same."""

    outcome: Outcome
    weights: tuple[AuditedWeight, ...]
    recorded: tuple[str, ...] = ()  # where the candidate's record disagrees with what it was compared with
    files: tuple[str, ...] = ()  # how config, tokenizer and the like differ from the base's, see `companion_files`
    not_judged: tuple[str, ...] = ()  # parts in which a fault could be
    notes: tuple[str, ...] = ()
    figures: tuple[str, ...] = ()  # what else was measured, as sentences
    about: Mapping[str, Any] = field(default_factory=dict)  # versions, files, adapters
    seconds: float = 0.0  # of the whole run
    # What a report shows of a `Proof`: nothing ran, and no error of a run can end an audit.
    placement: ClassVar[None] = None
    diagnosis: ClassVar[None] = None
    error: ClassVar[None] = None

    def __repr__(self) -> str:
        return brief(self, self.headline)

    def _repr_html_(self) -> str:
        shown = self.worst or [weight for weight in self.weights if weight.fate is not Fate.KEPT]
        rows = [(each.name, each.fate, each.outcome, each.error, each.why) for each in shown]
        columns = "tensor", "fate", "outcome", "error / allowed", "why"
        return html_table(self.headline, columns, rows, colour=self.outcome.colour)

    @property
    def verdict(self) -> Audit:
        """The audit itself, where a `Proof` has the verdict that it reports."""
        return self

    @property
    def exit_code(self) -> int:
        return self.outcome.exit_code

    def __bool__(self) -> bool:
        return self.outcome is Outcome.SAME

    def with_files(self, files: Findings) -> Audit:
        """The audit and what was found of the files beside the weights; one difference in them makes it different."""
        outcome = Outcome.DIFFERENT if files.faults else self.outcome
        return replace(
            self,
            outcome=outcome,
            files=(*self.files, *files.faults),
            not_judged=(*self.not_judged, *files.not_judged),
            notes=(*self.notes, *files.notes),
        )

    def strictly(self) -> Audit:
        """The audit in which anything that was not judged makes `same` undecided."""
        return replace(self, outcome=Outcome.UNDECIDED) if self and self.not_judged else self

    @property
    def worst(self) -> tuple[AuditedWeight, ...]:
        """The weights that are not the same: different ones first, then by the number of entries that are off."""
        wrong = [weight for weight in self.weights if weight.outcome is not Outcome.SAME]
        return tuple(
            sorted(wrong, key=lambda weight: (weight.outcome is Outcome.UNDECIDED, -weight.off, -weight.error))
        )

    @property
    def headline(self) -> str:
        """The outcome, and how many tensors are as they should be."""
        fates = [weight.fate for weight in self.weights if weight.outcome is Outcome.SAME]
        counts = ", ".join(f"{fates.count(fate)} {fate}" for fate in Fate if fate in fates)
        total = len(self.weights)
        right = f"{'is as it' if total == 1 else 'are as they'} should be{f': {counts}' if counts else ''}"
        beside = f"; {count(len(self.files), 'value')} in the files beside them not the base's" if self.files else ""
        return f"{self.outcome}: {len(fates)} of {count(total, 'tensor')} {right}{beside}"

    @property
    def explanation(self) -> tuple[str, ...]:
        """What no tensor shows: what the candidate records, and files that differ."""
        return (*self.recorded, *self.files)

    @property
    def summary_lines(self) -> tuple[list[str], list[str]]:
        """Lines below the headline: what the candidate records; weights that are not right, what was not judged."""
        weights = [f"  {weight}" for weight in self.worst[:SHOWN_WEIGHTS]]
        more = len(self.worst) - len(weights)
        weights += [f"  and {more} more"] if more else []
        not_judged = [one_line(f"{NOT_JUDGED}: {part}") for part in self.not_judged]
        figures = [f"  {one_line(line)}" for line in self.figures]
        return [f"  {one_line(line)}" for line in self.explanation], [*weights, *figures, *not_judged]

    def __str__(self) -> str:
        recorded, weights = self.summary_lines
        notes = [f"note: {note}" for note in self.notes]
        return escaped_lines(self.headline, *recorded, *weights, *(self._margins() if self else ()), *notes)

    def _margins(self) -> list[str]:
        """How close the changed weights of a right checkpoint are to their bounds, and how many controls failed."""
        changed = [weight for weight in self.weights if weight.fate is Fate.CHANGED]
        if not changed:
            return []
        worst = max(changed, key=lambda weight: weight.error)
        controls = [detected for weight in changed for detected in weight.controls.values()]
        return [
            one_line(f"largest error against W + s·BA in fp64: {worst.error:.2f} of what is allowed, in {worst.name}"),
            f"detected as wrong: {count(len(controls), 'control')} (an adapter left out, scaled or transposed)",
        ]
