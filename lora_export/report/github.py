"""What GitHub shows of a run: annotations beside the job, and a summary on its page.

Annotations are lines that the runner reads, on stderr as on stdout; they belong on stderr, where they are in
nobody's way. Names come from files that nobody vouches for: they may be neither a command nor a link.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from lora_export.errors import one_line, printable
from lora_export.report.documents import Placement
from lora_export.report.terminal import placed
from lora_export.verification.parity import DECIDES, SHOWN, Comparison, Outcome, Verdict

ICONS = {Outcome.SAME: "✅", Outcome.DIFFERENT: "❌", Outcome.UNDECIDED: "❓"}
ROWS = 20  # of the summary's table; GitHub takes a megabyte, a reader less


def workflow_commands(verdict: Verdict, title: str) -> Iterator[str]:
    """A workflow command for each reason (GitHub shows ten a step), or a notice that all is well."""
    if verdict.same:
        yield _command("notice", title, str(verdict).splitlines()[0])
        return
    told = verdict.distinct_reasons[:SHOWN]
    for reason in told:
        remedy = f"\n{DECIDES}: {reason.remedy}" if reason.remedy else ""
        yield _command("error", f"{title}: {reason.outcome}", f"{reason}{remedy}")
    if more := len(verdict.reasons) - len(told):
        yield _command("error", f"{title}: {verdict.outcome}", f"and {more} reason{'s' if more > 1 else ''} more")


def refusal(title: str, message: str) -> str:
    """The annotation of a run that came to no verdict."""
    return _command("error", title, message)


def _command(name: str, title: str, message: str) -> str:
    # The message last: `%` first, or it would escape the escapes. A property ends at `,` and `:`, too.
    data = _data(printable(message))
    return f"::{name} title={_data(one_line(title)).replace(':', '%3A').replace(',', '%2C')}::{data}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def summary(
    verdict: Verdict, placement: Placement | None = None, about: Mapping[str, Any] | None = None, *, title: str
) -> str:
    """The verdict as GitHub's Markdown: why, the most strained case of each output, and what ran where."""
    lines = [f"### {ICONS[verdict.outcome]} {_safe(title)}: {verdict.outcome}", ""]
    told = verdict.distinct_reasons[:SHOWN]
    for reason in told:
        lines.append(f"- {_safe(str(reason))}")
        lines += [f"  **{DECIDES}:** {_safe(reason.remedy)}"] if reason.remedy else []
    if more := len(verdict.reasons) - len(told):
        lines.append(f"- and {more} more")
    if shown := verdict.nearest_to_failing[:ROWS]:
        lines += ["", "| output | worst case | error | PyTorch's own | worst element | of the adapter's effect |"]
        lines += ["|---|---|--:|--:|--:|--:|", *map(_row, shown)]
    lines += [""]
    if placement is not None:
        lines += [_safe(line) + "  " for line in placed(placement).splitlines()]
    lines += [f"_{_safe(note)}_  " for note in verdict.notes]
    if versions := [
        f"{name} {about[name]}" for name in ("lora_export", "torch", "onnxruntime") if about and name in about
    ]:
        lines += ["", f"<sub>{_safe(', '.join(versions))}</sub>"]
    return "\n".join(lines) + "\n\n"


def _row(there: Comparison) -> str:
    f = there.figures
    assert f is not None  # `nearest_to_failing` holds what was measured
    share = "–" if f.relative_to_effect is None else f"{100 * f.relative_to_effect:.2g} %"
    cells = [there.output, there.case, f"{f.error:.3g}", f"{f.deployed_error:.3g}", f"{f.max_error:.3g}", share]
    return f"| {' | '.join(map(_safe, cells))} |"


def _safe(text: str) -> str:
    """Text that is nothing but text: no HTML, link, mention, emphasis, table cell or line of its own."""
    escaped = re.sub(r"([\\`*_{}\[\]()#+!|~$])", r"\\\1", one_line(text))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("@", "@\u2060")
