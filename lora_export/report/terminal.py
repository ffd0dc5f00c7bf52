"""The terminal: a verdict is one screen, and no number in it is cut."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.filesize import decimal
from rich.text import Text

from lora_export.errors import one_line, printable
from lora_export.lora import Adapter, LoraPair
from lora_export.plan import Plan
from lora_export.report.adapter_facts import adapter_facts
from lora_export.report.sentences import headline, placement_lines
from lora_export.runtime.runner import Placement
from lora_export.verification.against_checkpoint import Audit
from lora_export.verification.diagnose.diagnosis import Diagnosis
from lora_export.verification.parity import DECIDES, Outcome, Verdict, count
from lora_export.weights.merge_report import LOW_RETENTION, MergeReport, QuantisationLoss, StepResult

COLOURS = {Outcome.SAME: "green", Outcome.DIFFERENT: "red", Outcome.UNDECIDED: "yellow"}
SHOWN_RESULTS = 5  # weights of a merge report


def console(file: TextIO | None = None) -> Console:
    """A console on stdout, plain where that is no terminal. It never reads markup in names that come from files."""
    return Console(file=file, soft_wrap=True, markup=False, highlight=False, emoji=False)


# --- A verdict ---


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
    _print_wrapped(to, line, COLOURS[verdict.outcome] if is_reason else "bold" if is_remedy else "")


def _print_diagnosis(to: Console, diagnosis: Diagnosis | None, verdict: Verdict | Audit) -> None:
    for line in str(diagnosis).splitlines() if diagnosis else ():
        _print_wrapped(to, line, COLOURS[verdict.outcome] if diagnosis and diagnosis.first else "")


def _print_placement(to: Console, placement: Placement) -> None:
    for line in placement_lines(placement):
        _print(to, line, style="red" if placement.off_provider else "")


def screen(verdict: Verdict, placement: Placement | None = None, diagnosis: Diagnosis | None = None) -> str:
    """The text that `print_verdict` prints, without colours."""
    lines = [*_verdict_lines(verdict, placement), *(str(diagnosis).splitlines() if diagnosis else ())]
    return "\n".join([*lines, *(placement_lines(placement) if placement else ())])


def _verdict_lines(verdict: Verdict | Audit, placement: Placement | None) -> Iterator[str]:
    yield headline(verdict, placement)
    yield from str(verdict).splitlines()[1:]


# --- An adapter ---


def print_adapter(to: Console, adapter: Adapter) -> None:
    """Print the contents of an adapter, a row for each module. ‖ΔW‖ is the Frobenius norm of s·BA at weight 1."""
    contents = contents_of(adapter)
    _print(to, f"{adapter.name}: {adapter.format}, {contents}, {adapter.parameters:,} parameters", style="bold")
    for what, value in adapter_facts(adapter):
        _print(to, one_line(f"  {what}: {value}"))
    rows = [["module", "rank", "scale", "shape", "‖ΔW‖", ""]]
    for module, pair in adapter.pairs.items():
        rows.append(
            [
                module,
                f"{pair.rank}",
                f"{pair.scale:g}",
                _shape(pair.shape),
                f"{pair.norm:.4g}",
                kind_of_pair(pair),
            ]
        )
    print_table(to, rows)
    if any(pair.magnitude is not None for pair in adapter.pairs.values()):
        _print(to, "DoRA rescales W + ΔW, so the whole change also depends on the base's weights")
    for name, tensor in adapter.replaced.items():
        _print(to, f"replaced as a whole: {name}  {_shape(tensor.shape)} {tensor.dtype}")
    for name, rows_of_table in adapter.token_rows.items():
        _print(to, f"rows replaced: {name}  {_shape(rows_of_table.values.shape)} {rows_of_table.values.dtype}")
    for name, change in adapter.biases.items():
        _print(to, f"added to a bias: {name}  {_shape(change.shape)}")
    if adapter.is_identity:
        _print(to, "this adapter changes nothing: every B, A or scale is zero, as in a new adapter", style="yellow")
    for note in adapter.notes:
        _print(to, f"note: {note}")


def contents_of(adapter: Adapter) -> str:
    """How many pairs, whole tensors, biases and rows an adapter has."""
    numbers = {
        ("low-rank pair", "low-rank pairs"): len(adapter.pairs),
        ("whole tensor", "whole tensors"): len(adapter.replaced),
        ("bias", "biases"): len(adapter.biases),
        ("row", "rows"): sum(rows.indices.size for rows in adapter.token_rows.values()),
    }
    return ", ".join(f"{n} {one if n == 1 else several}" for (one, several), n in numbers.items() if n) or "empty"


def kind_of_pair(pair: LoraPair) -> str:
    """DoRA, and the kind of layer where it is not linear."""
    layer = "embedding" if pair.embedding else "convolution" if len(pair.shape) > 2 else ""
    return " ".join(filter(None, ["" if pair.magnitude is None else "DoRA", layer]))


# --- A plan and a merge ---


def print_plan(to: Console, plan: Plan, most: int | None = None) -> None:
    """Print what `--dry-run` shows: the counts, the notes, and what is done to each weight, at most to so many."""
    lines = str(plan).splitlines()
    head = len(lines) - len(plan.steps)
    shown = lines if most is None else lines[: head + most]
    _print(to, "\n".join(shown))
    if most and (more := len(lines) - len(shown)):
        _print(to, f"  and {count(more, 'weight')} more (-v)")


def print_merge_summary(to: Console, report: MergeReport, output: Path | None = None) -> None:
    """Print what a merge did in one line; the weights too, where rounding took more than a tenth of a change."""
    _print(to, _merge_summary(report, output), style="bold")
    if not all(result.retention >= LOW_RETENTION for result in report.results):
        _print_retention(to, report)
    if report.quantisation:
        _print(to, _quantisation_summary(report.quantisation))


def print_merge_report(to: Console, report: MergeReport, output: Path | None = None) -> None:
    """Print what a merge did, and the weights that lost most of their change to rounding."""
    _print(to, _merge_summary(report, output), style="bold")
    _print_retention(to, report)
    if report.quantisation:
        _print_quantisation(to, report.quantisation)


def _print_retention(to: Console, report: MergeReport) -> None:
    # NaN comes first: a weight whose retention is not known needs attention most.
    results = sorted(report.results, key=lambda result: -math.inf if math.isnan(result.retention) else result.retention)
    shown = results[:SHOWN_RESULTS]
    header = ["weights with the lowest retention", "‖ΔW‖/‖W‖", "retention", "noise", "entries changed"]
    marked = {number for number, result in enumerate(shown, 1) if not result.retention >= LOW_RETENTION}
    print_table(to, [header, *map(_result_row, shown)], marked)
    if len(results) > SHOWN_RESULTS:
        _print(to, f"{count(len(results) - SHOWN_RESULTS, 'more weight')}, with the same retention or a higher one")


def _quantisation_summary(losses: Sequence[QuantisationLoss]) -> str:
    """The range of the errors, and how they compare with the changes of the adapters."""
    errors = [loss.relative_error for loss in losses]
    ratios = [loss.error / loss.change for loss in losses if loss.change]
    beside = f", ‖Q-W‖/‖ΔW‖ of {len(ratios)} of them: {min(ratios):.3g} to {max(ratios):.3g}" if ratios else ""
    weights = count(len(losses), "dequantised weight")
    return f"quantisation error ‖Q-W‖/‖W‖ of {weights}: {min(errors):.3g} to {max(errors):.3g}{beside}"


def _print_quantisation(to: Console, losses: Sequence[QuantisationLoss]) -> None:
    _print(to, _quantisation_summary(losses))
    shown = sorted(losses, key=lambda loss: -loss.relative_error)[:SHOWN_RESULTS]
    header = ["weights with the largest quantisation error", "scheme", "‖Q-W‖/‖W‖", "‖Q-W‖", "‖ΔW‖"]
    rows = [
        [loss.weight, loss.scheme, f"{loss.relative_error:.3g}", f"{loss.error:.3g}", _figure(loss.change)]
        for loss in shown
    ]
    print_table(to, [header, *rows])
    if len(losses) > SHOWN_RESULTS:
        _print(to, f"{count(len(losses) - SHOWN_RESULTS, 'more weight')}, with the same error or a smaller one")


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _merge_summary(report: MergeReport, output: Path | None) -> str:
    merged = f"{count(len(report.results), 'weight')} merged"
    if names := report.replaced_weights:
        more = f" and {len(names) - SHOWN_RESULTS} more" if len(names) > SHOWN_RESULTS else ""
        merged += f", {count(len(names), 'tensor')} replaced ({', '.join(names[:SHOWN_RESULTS])}{more})"
    speed = f" ({decimal(int(report.bytes / report.seconds))}/s)" if report.seconds > 0 else ""
    where = f" to {one_line(str(output))}" if output else ""
    return (
        f"{merged}; {decimal(report.bytes)} written{where} in {report.seconds:.2f} s{speed}, "
        f"{decimal(report.copied)} of them copied unchanged"
    )


def _result_row(result: StepResult) -> list[str]:
    changed = result.changed / result.elements if result.elements else math.nan
    figures = [f"{result.relative_change:.3g}", f"{result.retention:.4f}", f"{result.noise:.3g}", f"{changed:.1%}"]
    return [result.weight, *figures]


# --- Lines and tables ---


def print_table(to: Console, rows: Sequence[Sequence[str]], marked: Iterable[int] = ()) -> None:
    """Print rows of cells, of which the first is the header; none where there is no other row."""
    # Not rich's Table: it cuts cells on a narrow terminal and in a pipe, and a cut number is a wrong number.
    if len(rows) < 2:
        return
    rows = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for number, (first, *others) in enumerate(rows):
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        style = "dim" if number == 0 else "yellow" if number in marked else ""
        _print(to, "  ".join(cells).rstrip(), style=style)


def _print(to: Console, line: str, *, style: str = "") -> None:
    to.print(Text(printable(line), style=style), soft_wrap=True)


def _print_wrapped(to: Console, line: str, style: str) -> None:
    for part in _wrapped(printable(line), to.width) if to.is_terminal else [line]:
        _print(to, part, style=style)


def _wrapped(line: str, width: int) -> list[str]:
    """The line broken between words, continued with a deeper indent.

    The terminal itself would break it anywhere, also within a number.
    """
    indent = len(line) - len(line.lstrip(" -"))
    wrapped = textwrap.wrap(
        line, width, subsequent_indent=" " * (indent + 2), break_long_words=False, break_on_hyphens=False
    )
    return wrapped if len(line) > width else [line]


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
