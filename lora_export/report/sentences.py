"""Sentences that several reports share: what ran where, where a candidate begins to differ, and the headline."""

from __future__ import annotations

from collections.abc import Sequence

from lora_export.errors import one_line
from lora_export.runtime.runner import Placement
from lora_export.verification.against_checkpoint import Audit
from lora_export.verification.diagnose.diagnosis import Diagnosis
from lora_export.verification.parity import Verdict

SHOWN_NODES = 5  # nodes that ran on another provider


def headline(verdict: Verdict | Audit, placement: Placement | None = None) -> str:
    """The verdict in one line: `same: error 0.00004 % of the adapter's effect, …, 3 cases, CPU 75/75 nodes`."""
    return f"{verdict.headline}, {_short(placement)}" if placement else verdict.headline


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


def explanation(recorded: Sequence[str], diagnosis: Diagnosis | None) -> list[str]:
    """What explains a verdict, in sentences: the candidate's record first, then where it begins to differ, and why."""
    return [*map(one_line, recorded), *(diagnosis_lines(diagnosis.first, diagnosis.why) if diagnosis else ())]


def diagnosis_lines(first: str | None, why: str) -> list[str]:
    """Where a candidate begins to differ, and why: the explanation of a verdict in sentences."""
    where = "No compared module differs" if first is None else one_line(f"The first module that differs is {first}")
    return [f"{where}.", *(line for line in why.split("\n") if line)]
