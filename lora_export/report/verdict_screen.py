"""A verdict on the terminal: one screen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from lora_export.errors import one_line, printable
from lora_export.report.console import print_line, print_wrapped
from lora_export.report.sentences import headline, placement_lines
from lora_export.verification.parity import DECIDES, Outcome

if TYPE_CHECKING:
    from lora_export.verification.against_checkpoint import Audit
    from lora_export.verification.proof import Proof

COLOURS = {Outcome.SAME: "green", Outcome.DIFFERENT: "red", Outcome.UNDECIDED: "yellow"}


def print_headline(to: Console, proof: Proof | Audit, name: str = "") -> None:
    """Print a verdict in one line, after the name of what it is about."""
    outcome = proof.verdict.outcome
    rest = printable(headline(proof).removeprefix(outcome))
    before = one_line(f"{name}: ") if name else ""
    to.print(Text.assemble(before, (outcome, f"bold {COLOURS[outcome]}"), rest), soft_wrap=True)


def print_summary(to: Console, proof: Proof | Audit) -> None:
    """Print a verdict in few lines. Where it is `same`, one; else also where it begins to differ, and the reasons."""
    print_headline(to, proof)
    recorded, reasons = proof.verdict.summary_lines
    _print_lines(to, recorded, proof)
    _print_diagnosis(to, proof)
    _print_lines(to, reasons, proof)
    if proof.placement and proof.placement.off_provider:
        _print_placement(to, proof)


def print_verdict(to: Console, proof: Proof | Audit) -> None:
    """Print one screen: headline, reasons, the outputs closest to their limits, diagnosis, placement."""
    print_headline(to, proof)
    _print_lines(to, str(proof.verdict).splitlines()[1:], proof)
    _print_diagnosis(to, proof)
    _print_placement(to, proof)


def _print_lines(to: Console, lines: Sequence[str], proof: Proof | Audit) -> None:
    for line in lines:
        is_reason, is_remedy = line.startswith("  - "), line.startswith(f"    {DECIDES}")
        print_wrapped(to, line, COLOURS[proof.verdict.outcome] if is_reason else "bold" if is_remedy else "")


def _print_diagnosis(to: Console, proof: Proof | Audit) -> None:
    if found := proof.diagnosis:
        for line in str(found).splitlines():
            print_wrapped(to, line, COLOURS[proof.verdict.outcome] if found.first else "")


def _print_placement(to: Console, proof: Proof | Audit) -> None:
    if placement := proof.placement:
        for line in placement_lines(placement):
            print_line(to, line, style="red" if placement.off_provider else "")


def screen(proof: Proof | Audit) -> str:
    """The text that `print_verdict` prints, without colours."""
    lines = [headline(proof), *str(proof.verdict).splitlines()[1:]]
    lines += str(proof.diagnosis).splitlines() if proof.diagnosis else ()
    return "\n".join([*lines, *(placement_lines(proof.placement) if proof.placement else ())])
