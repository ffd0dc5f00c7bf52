"""A verdict as text: the sentences that several reports share, and one screen on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_export.errors import one_line
from lora_export.report.console import AnyConsole, print_line, print_parts, print_wrapped
from lora_export.runtime.runner import Placement
from lora_export.verification.parity import DECIDES

if TYPE_CHECKING:
    from lora_export.verification.against_checkpoint import Audit
    from lora_export.verification.proof import Proof

SHOWN_NODES = 5  # nodes that ran on another provider


def headline(proof: Proof | Audit) -> str:
    """The verdict in one line: `same: error 0.00004 % of the adapter's effect, …, 3 cases, CPU 75/75 nodes`."""
    line = proof.verdict.headline
    return f"{line}, {_short(proof.placement)}" if proof.placement else line


def _short(placement: Placement) -> str:
    count = placement.compute_nodes
    on_provider = count - len(placement.off_provider)
    return f"{placement.requested_provider.removesuffix('ExecutionProvider')} {on_provider}/{count} nodes"


def placement_lines(placement: Placement) -> list[str]:
    """`142 of 142 compute nodes on CPUExecutionProvider`, and the nodes that ran elsewhere."""
    off, count = placement.off_provider, placement.compute_nodes
    lines = [f"{count - len(off)} of {count} compute nodes on {placement.requested_provider}"]
    lines += [one_line(f"  - {node} ({operator}) on {provider}") for provider, node, operator in off[:SHOWN_NODES]]
    return lines + ([f"  - and {len(off) - SHOWN_NODES} more"] if len(off) > SHOWN_NODES else [])


def explanation(proof: Proof) -> list[str]:
    """What explains a verdict, in sentences: the candidate's record first, then where it begins to differ, and why."""
    found = proof.diagnosis
    recorded = map(one_line, proof.verdict.recorded)
    return [*recorded, *(diagnosis_lines(found.first, found.why) if found else ())]


def diagnosis_lines(first: str | None, why: str) -> list[str]:
    """Where a candidate begins to differ, and why: the explanation of a verdict in sentences."""
    where = "No compared module differs" if first is None else one_line(f"The first module that differs is {first}")
    return [f"{where}.", *(line for line in why.split("\n") if line)]


def print_headline(to: AnyConsole, proof: Proof | Audit, name: str = "") -> None:
    """Print a verdict in one line, after the name of what it is about."""
    outcome = proof.verdict.outcome
    before = one_line(f"{name}: ") if name else ""
    print_parts(to, (before, ""), (outcome, f"bold {outcome.colour}"), (headline(proof).removeprefix(outcome), ""))


def print_summary(to: AnyConsole, proof: Proof | Audit) -> None:
    """Print a verdict in few lines. Where it is `same`, one; else also where it begins to differ, and the reasons."""
    print_headline(to, proof)
    recorded, reasons = proof.verdict.summary_lines
    _print_lines(to, recorded, proof)
    _print_diagnosis(to, proof)
    _print_lines(to, reasons, proof)
    if proof.placement and proof.placement.off_provider:
        _print_placement(to, proof)


def print_verdict(to: AnyConsole, proof: Proof | Audit) -> None:
    """Print one screen: headline, reasons, the outputs closest to their limits, diagnosis, placement."""
    print_headline(to, proof)
    _print_lines(to, str(proof.verdict).splitlines()[1:], proof)
    _print_diagnosis(to, proof)
    _print_placement(to, proof)


def _print_lines(to: AnyConsole, lines: Sequence[str], proof: Proof | Audit) -> None:
    for line in lines:
        is_reason, is_remedy = line.startswith("  - "), line.startswith(f"    {DECIDES}")
        print_wrapped(to, line, proof.verdict.outcome.colour if is_reason else "bold" if is_remedy else "")


def _print_diagnosis(to: AnyConsole, proof: Proof | Audit) -> None:
    if found := proof.diagnosis:
        for line in str(found).splitlines():
            print_wrapped(to, line, proof.verdict.outcome.colour if found.first else "")


def _print_placement(to: AnyConsole, proof: Proof | Audit) -> None:
    if placement := proof.placement:
        for line in placement_lines(placement):
            print_line(to, line, style="red" if placement.off_provider else "")


def screen(proof: Proof | Audit) -> str:
    """The text that `print_verdict` prints, without colours."""
    lines = [headline(proof), *str(proof.verdict).splitlines()[1:]]
    lines += str(proof.diagnosis).splitlines() if proof.diagnosis else ()
    return "\n".join([*lines, *(placement_lines(proof.placement) if proof.placement else ())])
