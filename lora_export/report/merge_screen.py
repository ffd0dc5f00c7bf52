"""A plan and a merge on the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal

from lora_export.errors import count, one_line
from lora_export.plan import Plan
from lora_export.report.console import print_line, print_table
from lora_export.weights.merge_report import LOW_RETENTION, MergeReport, QuantisationLoss, StepResult

SHOWN_RESULTS = 5  # weights of a merge report


def print_plan(to: Console, plan: Plan, most: int | None = None) -> None:
    """Print what `dry_run` shows: the counts, the notes, and what is done to each weight, at most to so many."""
    lines = str(plan).splitlines()
    head = len(lines) - len(plan.steps)
    shown = lines if most is None else lines[: head + most]
    print_line(to, "\n".join(shown))
    if most and (more := len(lines) - len(shown)):
        print_line(to, f"  and {count(more, 'weight')} more (-v)")


def print_merge_summary(to: Console, report: MergeReport, output: Path | None = None) -> None:
    """Print what a merge did in one line; the weights too, where rounding took more than a tenth of a change."""
    print_line(to, _merge_summary(report, output), style="bold")
    if not all(result.retention >= LOW_RETENTION for result in report.results):
        _print_retention(to, report)
    if report.quantisation:
        print_line(to, _quantisation_summary(report.quantisation))


def print_merge_report(to: Console, report: MergeReport, output: Path | None = None) -> None:
    """Print what a merge did, and the weights that lost most of their change to rounding."""
    print_line(to, _merge_summary(report, output), style="bold")
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
        print_line(to, f"{count(len(results) - SHOWN_RESULTS, 'more weight')}, with the same retention or a higher one")


def _quantisation_summary(losses: Sequence[QuantisationLoss]) -> str:
    """The range of the errors, and how they compare with the changes of the adapters."""
    errors = [loss.relative_error for loss in losses]
    ratios = [loss.error / loss.change for loss in losses if loss.change]
    beside = f", ‖Q-W‖/‖ΔW‖ of {len(ratios)} of them: {min(ratios):.3g} to {max(ratios):.3g}" if ratios else ""
    weights = count(len(losses), "dequantised weight")
    return f"quantisation error ‖Q-W‖/‖W‖ of {weights}: {min(errors):.3g} to {max(errors):.3g}{beside}"


def _print_quantisation(to: Console, losses: Sequence[QuantisationLoss]) -> None:
    print_line(to, _quantisation_summary(losses))
    shown = sorted(losses, key=lambda loss: -loss.relative_error)[:SHOWN_RESULTS]
    header = ["weights with the largest quantisation error", "scheme", "‖Q-W‖/‖W‖", "‖Q-W‖", "‖ΔW‖"]
    rows = [
        [loss.weight, loss.scheme, f"{loss.relative_error:.3g}", f"{loss.error:.3g}", _figure(loss.change)]
        for loss in shown
    ]
    print_table(to, [header, *rows])
    if len(losses) > SHOWN_RESULTS:
        print_line(to, f"{count(len(losses) - SHOWN_RESULTS, 'more weight')}, with the same error or a smaller one")


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
