"""What `lora-export check` found, as lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lora_export.errors import count
from lora_export.options.spelling import named
from lora_export.preflight.facts import OF_BASE, OF_CHANGE
from lora_export.preflight.rules import RuntimeOutcome

SHOWN_CHANGES = 2


def check_lines(outcomes: Iterable[RuntimeOutcome], *, every: bool) -> Iterator[str]:
    """A line for each runtime; with `every`, its findings and what repairs them."""
    for outcome in outcomes:
        verdict = count(len(outcome.findings), "finding") if outcome.findings else "fits"
        yield f"{outcome.title} {outcome.version}: {verdict} ({outcome.proof})"
        if not every:
            continue
        for finding in outcome.findings:
            first, more = finding.changes[:SHOWN_CHANGES], len(finding.changes) - SHOWN_CHANGES
            names = f" [{', '.join(first)}{f' and {more} more' if more > 0 else ''}]" if first else ""
            yield f"  {finding.effect}: {finding.does}{names}"
            yield f"    {finding.source}"
        for repair in outcome.repairs:
            yield f"  -> {repair.text}"
        if outcome.unknown:
            facts = "; ".join((OF_BASE | OF_CHANGE)[fact] for fact in outcome.unknown)
            yield f"  not checked: {facts} ({named('base', 'CHECKPOINT')} may show it)"
