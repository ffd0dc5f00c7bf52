"""The terminal: a verdict is one screen, and no number in it is cut."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, TextIO

import numpy as np
from rich.console import Console
from rich.filesize import decimal
from rich.text import Text

from lora_export.errors import one_line, printable
from lora_export.lora import Adapter, LoraPair
from lora_export.plan import Plan
from lora_export.report.documents import Placement
from lora_export.verification.against_checkpoint import Audit
from lora_export.verification.diagnose.diagnosis import Diagnosis
from lora_export.verification.parity import DECIDES, Outcome, Verdict

COLOURS = {Outcome.SAME: "green", Outcome.DIFFERENT: "red", Outcome.UNDECIDED: "yellow"}
SHOWN = 5  # rows of a ledger
LOW_RETENTION = 0.9  # below this a row is coloured


class StepResult(Protocol):
    """What became of one weight."""

    @property
    def weight(self) -> str: ...
    @property
    def relative_change(self) -> float: ...
    @property
    def retention(self) -> float: ...
    @property
    def noise(self) -> float: ...
    @property
    def changed(self) -> int: ...
    @property
    def elements(self) -> int: ...


class Ledger(Protocol):
    """What a merge did."""

    @property
    def results(self) -> Sequence[StepResult]: ...
    @property
    def copied(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def seconds(self) -> float: ...


def console(file: TextIO | None = None) -> Console:
    """Where answers go: stdout, plain where it is no terminal. Names from files are never taken for markup."""
    return Console(file=file, soft_wrap=True, markup=False, highlight=False, emoji=False)


def print_verdict(
    to: Console, verdict: Verdict | Audit, placement: Placement | None = None, diagnosis: Diagnosis | None = None
) -> None:
    """One screen: the outcome, why, the most strained outputs with their figures, where it begins, what ran where."""
    colour = COLOURS[verdict.outcome]
    title, *lines = str(verdict).splitlines()
    rest = printable(title.removeprefix(verdict.outcome))
    to.print(Text.assemble((verdict.outcome, f"bold {colour}"), rest), soft_wrap=True)
    for line in lines:
        style = colour if line.startswith("  - ") else "bold" if line.startswith(f"    {DECIDES}") else ""
        for part in _broken(printable(line), to.width) if to.is_terminal else [line]:
            _say(to, part, style=style)
    for line in str(diagnosis).splitlines() if diagnosis else ():
        for part in _broken(printable(line), to.width) if to.is_terminal else [line]:
            _say(to, part, style=colour if diagnosis and diagnosis.first else "")
    if placement is not None:
        _say(to, placed(placement), style="red" if placement.off_provider else "")


def screen(verdict: Verdict, placement: Placement | None = None, diagnosis: Diagnosis | None = None) -> str:
    """What `print_verdict` prints, as plain text."""
    told = [str(verdict), str(diagnosis) if diagnosis else "", placed(placement) if placement else ""]
    return "\n".join(part for part in told if part)


def placed(placement: Placement) -> str:
    """`142 of 142 compute nodes on CPUExecutionProvider`, and those that were not."""
    off = placement.off_provider
    count = placement.compute_nodes
    line = f"{count - len(off)} of {count} compute nodes on {placement.requested_provider}"
    strays = [f"  - {node} ({operator}) on {provider}" for provider, node, operator in off[:SHOWN]]
    strays += [f"  - and {len(off) - SHOWN} more"] if len(off) > SHOWN else []
    return "\n".join([line, *strays])


def print_adapter(to: Console, adapter: Adapter) -> None:
    """What an adapter file holds, a row for each module. ‖ΔW‖ is the Frobenius norm of s·BA at strength 1."""
    counts = {"low-rank pair": len(adapter.pairs), "whole tensor": len(adapter.replaced), "bias": len(adapter.biases)}
    counts["row"] = sum(rows.indices.size for rows in adapter.token_rows.values())
    held = ", ".join(f"{count} {what}{_s(count)}" for what, count in counts.items() if count)
    _say(to, f"{adapter.name}: {adapter.format}, {held or 'empty'}, {adapter.parameters:,} parameters", style="bold")
    rows = [["module", "rank", "scale", "shape", "‖ΔW‖", ""]]
    for module, pair in adapter.pairs.items():
        rows.append([module, f"{pair.rank}", f"{pair.scale:g}", _shape(pair.shape), f"{_norm(pair):.4g}", _kind(pair)])
    _table(to, rows)
    if any(pair.magnitude is not None for pair in adapter.pairs.values()):
        _say(to, "DoRA rescales W + ΔW: how much changes in all, only the base's weights would tell")
    for name, tensor in adapter.replaced.items():
        _say(to, f"replaced as a whole: {name}  {_shape(tensor.shape)} {tensor.dtype}")
    for name, own in adapter.token_rows.items():
        _say(to, f"rows replaced: {name}  {_shape(own.values.shape)} {own.values.dtype}")
    for name, change in adapter.biases.items():
        _say(to, f"added to a bias: {name}  {_shape(change.shape)}")
    if adapter.is_identity:
        _say(to, "it changes nothing: every B, A or scale is zero, as in a fresh adapter", style="yellow")
    for note in adapter.notes:
        _say(to, f"note: {note}")


def _kind(pair: LoraPair) -> str:
    layer = "embedding" if pair.embedding else "convolution" if pair.a.ndim > 2 else ""
    return " ".join(filter(None, ["" if pair.magnitude is None else "DoRA", layer]))


def _norm(pair: LoraPair) -> float:
    """‖scale · B A‖ without making it: ‖BA‖² = Σ (BᵀB) ∘ (AAᵀ), both (rank, rank)."""
    a = pair.a.astype(np.float64).reshape(pair.rank, -1)
    b = pair.b.astype(np.float64).reshape(-1, pair.rank)
    return abs(pair.scale) * math.sqrt(max(0.0, float(np.sum((b.T @ b) * (a @ a.T)))))


def print_plan(to: Console, plan: Plan) -> None:
    """What `--dry-run` shows."""
    _say(to, str(plan))


def print_merge_report(to: Console, ledger: Ledger, output: Path | None = None) -> None:
    """What a merge did, in a line, and the weights that lost most of their change to rounding."""
    speed = f" ({decimal(int(ledger.bytes / ledger.seconds))}/s)" if ledger.seconds > 0 else ""
    where = f" to {one_line(str(output))}" if output else ""
    _say(
        to,
        f"{len(ledger.results)} weight{_s(len(ledger.results))} merged; {decimal(ledger.bytes)} written{where} in "
        f"{ledger.seconds:.2f} s{speed}, {decimal(ledger.copied)} of them copied unchanged",
        style="bold",
    )
    # One whose retention is no number comes first: it is the one to look at.
    results = sorted(ledger.results, key=lambda result: -math.inf if math.isnan(result.retention) else result.retention)
    rows = [["least kept of their change", "‖ΔW‖/‖W‖", "retention", "noise", "entries changed"]]
    for result in results[:SHOWN]:
        share = result.changed / result.elements if result.elements else math.nan
        figures = [f"{result.relative_change:.3g}", f"{result.retention:.4f}", f"{result.noise:.3g}", f"{share:.1%}"]
        rows.append([result.weight, *figures])
    marked = {number for number, there in enumerate(results[:SHOWN], 1) if not there.retention >= LOW_RETENTION}
    _table(to, rows, marked)
    if len(results) > SHOWN:
        _say(to, f"{len(results) - SHOWN} more, each keeps at least as much")


def _table(to: Console, rows: Sequence[Sequence[str]], marked: Iterable[int] = ()) -> None:
    # Not rich's Table: on a narrow terminal or in a pipe it cuts cells, and a cut number is a wrong number.
    if len(rows) < 2:
        return
    rows = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for number, (first, *others) in enumerate(rows):
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        style = "dim" if number == 0 else "yellow" if number in marked else ""
        _say(to, "  ".join(cells).rstrip(), style=style)


def _say(to: Console, line: str, *, style: str = "") -> None:
    to.print(Text(printable(line), style=style), soft_wrap=True)


def _broken(line: str, width: int) -> list[str]:
    """A sentence that is too long for a terminal goes on in the next line, between words and further in.

    The terminal itself would break it anywhere, in the middle of a number too.
    """
    indent = len(line) - len(line.lstrip(" -"))
    wrapped = textwrap.wrap(
        line, width, subsequent_indent=" " * (indent + 2), break_long_words=False, break_on_hyphens=False
    )
    return wrapped if len(line) > width else [line]


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _s(count: int) -> str:
    return "" if count == 1 else "s"
