"""A verdict on the terminal: one screen."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from lora_export.errors import one_line, printable
from lora_export.report.console import print_line, print_wrapped
from lora_export.report.sentences import headline, placement_lines
from lora_export.runtime.runner import Placement
from lora_export.verification.against_checkpoint import Audit
from lora_export.verification.diagnose.diagnosis import Diagnosis
from lora_export.verification.parity import DECIDES, Outcome, Verdict

COLOURS = {Outcome.SAME: "green", Outcome.DIFFERENT: "red", Outcome.UNDECIDED: "yellow"}


def print_headline(to: Console, verdict: Verdict | Audit, placement: Placement | None = None, name: str = "") -> None:
    """Print a verdict in one line, after the name of what it is about."""
    rest = printable(headline(verdict, placement).removeprefix(verdict.outcome))
    before = one_line(f"{name}: ") if name else ""
    to.print(Text.assemble(before, (verdict.outcome, f"bold {COLOURS[verdict.outcome]}"), rest), soft_wrap=True)


def print_summary(
    to: Console, verdict: Verdict | Audit, placement: Placement | None = None, diagnosis: Diagnosis | None = None
) -> None:
    """Print a verdict in few lines. Where it is `same`, one; else also where it begins to differ, and the reasons."""
    print_headline(to, verdict, placement)
    recorded, reasons = verdict.summary_lines
    for line in recorded:
        _print_reason(to, line, verdict)
    _print_diagnosis(to, diagnosis, verdict)
    for line in reasons:
        _print_reason(to, line, verdict)
    if placement and placement.off_provider:
        _print_placement(to, placement)


def print_verdict(
    to: Console, verdict: Verdict | Audit, placement: Placement | None = None, diagnosis: Diagnosis | None = None
) -> None:
    """Print one screen: headline, reasons, the outputs closest to their limits, diagnosis, placement."""
    print_headline(to, verdict, placement)
    for line in str(verdict).splitlines()[1:]:
        _print_reason(to, line, verdict)
    _print_diagnosis(to, diagnosis, verdict)
    if placement:
        _print_placement(to, placement)


def _print_reason(to: Console, line: str, verdict: Verdict | Audit) -> None:
    is_reason, is_remedy = line.startswith("  - "), line.startswith(f"    {DECIDES}")
    print_wrapped(to, line, COLOURS[verdict.outcome] if is_reason else "bold" if is_remedy else "")


def _print_diagnosis(to: Console, diagnosis: Diagnosis | None, verdict: Verdict | Audit) -> None:
    for line in str(diagnosis).splitlines() if diagnosis else ():
        print_wrapped(to, line, COLOURS[verdict.outcome] if diagnosis and diagnosis.first else "")


def _print_placement(to: Console, placement: Placement) -> None:
    for line in placement_lines(placement):
        print_line(to, line, style="red" if placement.off_provider else "")


def screen(verdict: Verdict, placement: Placement | None = None, diagnosis: Diagnosis | None = None) -> str:
    """The text that `print_verdict` prints, without colours."""
    lines = [*_verdict_lines(verdict, placement), *(str(diagnosis).splitlines() if diagnosis else ())]
    return "\n".join([*lines, *(placement_lines(placement) if placement else ())])


def _verdict_lines(verdict: Verdict | Audit, placement: Placement | None) -> Iterator[str]:
    yield headline(verdict, placement)
    yield from str(verdict).splitlines()[1:]
