"""Sentences that several reports share: what ran where, where a candidate begins to differ, and the headline."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_export.errors import one_line
from lora_export.runtime.runner import Placement

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
