"""What GitHub shows of a run: annotations beside the job, and a summary on its page.

Annotations are lines that the runner reads, on stderr as well as on stdout. They are written to stderr, which no
program parses. Names come from files of unknown origin: they must become neither commands nor links.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_export.errors import count, one_line, printable
from lora_export.report.verdict_screen import explanation, headline, placement_lines
from lora_export.verification.against_checkpoint import Audit
from lora_export.verification.parity import DECIDES, NOT_JUDGED, SHOWN, Comparison, Outcome, Verdict, percent

if TYPE_CHECKING:
    from lora_export.verification.proof import Proof

ICONS = {Outcome.SAME: "✅", Outcome.DIFFERENT: "❌", Outcome.UNDECIDED: "❓"}
MAX_OUTPUTS = 20  # of the summary's table; GitHub accepts a megabyte


# --- Annotations ---


def workflow_commands(proof: Proof | Audit, title: str) -> Iterator[str]:
    """A workflow command for the diagnosis and for each reason (GitHub shows ten a step), or a notice of success.

    Of a checkpoint that is not `same` one, with the weights that are wrong.
    """
    if proof.verdict:
        yield workflow_command("notice", title, "\n".join([proof.verdict.headline, *proof.verdict.summary_lines[1]]))
    elif isinstance(proof, Audit):
        yield workflow_command("error", f"{title}: {proof.outcome}", str(proof))
    else:
        yield from _errors(proof, title)


def _errors(proof: Proof, title: str) -> Iterator[str]:
    verdict = proof.verdict
    title_of_outcome = f"{title}: {verdict.outcome}"
    if lines := explanation(proof):
        yield workflow_command("error", title_of_outcome, "\n".join(lines))
    shown = verdict.distinct_reasons[:SHOWN]
    for reason in shown:
        remedy = f"\n{DECIDES}: {reason.remedy}" if reason.remedy else ""
        yield workflow_command("error", f"{title}: {reason.outcome}", f"{reason}{remedy}")
    if more := len(verdict.reasons) - len(shown):
        yield workflow_command("error", title_of_outcome, f"and {count(more, 'reason')} more")


def workflow_command(name: str, title: str, message: str) -> str:
    """One workflow command: an `error` or a `notice`."""
    # In a property, `,` and `:` are escaped too, after `%` has been.
    data = _data(printable(message))
    return f"::{name} title={_data(one_line(title)).replace(':', '%3A').replace(',', '%2C')}::{data}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


# --- The summary ---


def summary(proof: Proof | Audit, title: str) -> str:
    """The verdict as GitHub's Markdown: the headline, why, the case of each output that is closest to its limits.

    Of a checkpoint, the weights that are wrong.
    """
    verdict, about = proof.verdict, proof.about
    blocks = [
        [f"### {ICONS[verdict.outcome]} {safe_markdown(title)}: {verdict.outcome}"],
        [safe_markdown(headline(proof))],
        *_blocks(proof),
    ]
    versions = [f"{name} {about[name]}" for name in ("lora_export", "torch", "onnxruntime") if name in about]
    blocks.append([f"<sub>{safe_markdown(', '.join(versions))}</sub>"] if versions else [])
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n\n"


def _blocks(proof: Proof | Audit) -> Iterator[list[str]]:
    if isinstance(proof, Audit):
        yield [f"- {safe_markdown(line.strip())}" for lines in proof.summary_lines for line in lines]
        return
    yield list(_reason_lines(proof))
    yield list(_table(proof.verdict))
    yield list(_remarks(proof))


def _reason_lines(proof: Proof) -> Iterator[str]:
    verdict = proof.verdict
    if lines := explanation(proof):
        where, *why = lines
        yield "- " + "  \n  ".join([f"**{safe_markdown(where)}**", *map(safe_markdown, why)])
    shown = verdict.distinct_reasons[:SHOWN]
    for reason in shown:
        yield f"- {safe_markdown(str(reason))}"
        if reason.remedy:
            yield f"  **{DECIDES}:** {safe_markdown(reason.remedy)}"
    if more := len(verdict.reasons) - len(shown):
        yield f"- and {count(more, 'reason')} more"


def _table(verdict: Verdict) -> Iterator[str]:
    if closest := verdict.nearest_to_failing[:MAX_OUTPUTS]:
        yield f"| output | worst case | error | {verdict.peer}'s own error | worst element | of the adapter's effect |"
        yield "|---|---|--:|--:|--:|--:|"
        yield from map(_row, closest)


def _row(comparison: Comparison) -> str:
    f = comparison.figures
    assert f is not None  # `nearest_to_failing` holds measured comparisons alone
    relative = "–" if f.relative_to_effect is None else percent(f.relative_to_effect)
    errors = [f"{error:.3g}" for error in (f.error, f.deployed_error, f.max_error)]
    return f"| {' | '.join(map(safe_markdown, [comparison.output, comparison.case, *errors, relative]))} |"


def _remarks(proof: Proof) -> Iterator[str]:
    verdict = proof.verdict
    for line in placement_lines(proof.placement) if proof.placement else ():
        yield safe_markdown(line) + "  "
    for part in verdict.not_judged:
        yield f"**{NOT_JUDGED}:** {safe_markdown(part)}  "
    for note in verdict.notes:
        yield f"_{safe_markdown(note)}_  "


def safe_markdown(text: str) -> str:
    """Text that Markdown shows as it is: no HTML, link, mention, emphasis, table cell or line break."""
    escaped = re.sub(r"([\\`*_{}\[\]()#+!|~$])", r"\\\1", one_line(text))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("@", "@\u2060")
