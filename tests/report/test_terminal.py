"""The terminal: what was measured is on one screen, whole, and nothing in a name controls the terminal."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from lora_export import report
from lora_export.lora import Adapter, LoraPair, TokenRows
from lora_export.verification.parity import Verdict, judge
from lora_export.weights.merge_report import QuantisationLoss
from support.records import ADAPTER, a_merge_report, a_plan, a_result
from support.verdicts import DIAGNOSIS, DIFFERENT, NOTHING, ON_CPU, SAME, STRAYED, UNDECIDED, a_placement, case


def printed(*arguments: Any, with_: Any = report.print_verdict, terminal: bool = False, width: int = 40) -> str:
    file = io.StringIO()
    to = Console(file=file, force_terminal=terminal, width=width, color_system="standard" if terminal else "auto")
    with_(to, *arguments)
    return file.getvalue()


# --- Verdicts ---


def test_screen_has_headline_figures_and_placement() -> None:
    text = printed(SAME, ON_CPU)
    assert text.splitlines()[0] == (
        "same: error 0.39 % of the adapter's effect, 2 × PyTorch's own rounding (limit 2 ×), 2 cases, CPU 142/142 nodes"
    )
    assert "\nlogits in case 2 x 300: float32 [2, 300], within its limits\n" in text
    assert "  error 0.25, allowed 0.25; PyTorch's own error 0.125 (× 2)\n" in text
    assert "  worst element [0, 0]: off by 0.25; PyTorch is off by at most 0.125\n" in text
    assert "    the candidate has -0.25, the reference 0\n" in text
    assert "  the error is 0.39 % of the adapter's effect (64)\n" in text
    assert text.endswith("142 of 142 compute nodes on CPUExecutionProvider\n")


def test_headline_without_placement_has_no_nodes() -> None:
    assert printed(SAME).splitlines()[0].endswith("(limit 2 ×), 2 cases")


def test_narrow_pipe_cuts_no_line_and_has_no_colour() -> None:
    text = printed(SAME, ON_CPU, width=10)
    assert "\x1b" not in text and "…" not in text
    assert text.splitlines() == report.screen(SAME, ON_CPU).splitlines()
    assert text.splitlines()[1:] == [*str(SAME).splitlines()[1:], *report.placement_lines(ON_CPU)]


@pytest.mark.parametrize(("verdict", "colour"), [(SAME, "32"), (DIFFERENT, "31"), (UNDECIDED, "33")])
def test_terminal_shows_the_outcome_in_colour(verdict: Verdict, colour: str) -> None:
    text = printed(verdict, terminal=True)
    assert text.startswith(f"\x1b[1;{colour}m{verdict.outcome}\x1b[0m: ")
    assert text.count(f"\x1b[{colour}m  - ") == len(verdict.reasons)


def test_screen_shows_the_reasons_and_the_diagnosis() -> None:
    text = printed(DIFFERENT, None, DIAGNOSIS)
    assert "  - logits in case bad: the error is 1, allowed is 0.25; PyTorch's own error is 0.125 (× 8)\n" in text
    frozen = "changing the input mask changes PyTorch's outputs and not the candidate's: the export replaced this input"
    assert f"  - {frozen} by a constant\n" in text
    assert "encoder.1\n  its adapter's scale, 2, is applied twice\n" in text
    assert printed(NOTHING).startswith("undecided: nothing was compared\n  - nothing was compared: there is no case")


def test_nodes_on_another_provider_are_listed() -> None:
    text = printed(SAME, STRAYED)
    assert "2 cases, CUDA 141/142 nodes\n" in text
    assert "141 of 142 compute nodes on CUDAExecutionProvider\n" in text
    assert text.endswith("  - /layer.141/MatMul (MatMul) on CPUExecutionProvider\n")
    many = report.placement_lines(a_placement("CUDAExecutionProvider", elsewhere=9))
    assert (len(many), many[-1]) == (7, "  - and 4 more")


def test_names_are_neither_markup_nor_terminal_commands() -> None:
    text = printed(judge([case(output="[red]\x1b[2J[/red]")]), terminal=True)
    assert "[red]\\x1b[2J[/red] in case" in text
    assert "\x1b[2J" not in text


# --- Adapters ---


def test_adapter_is_printed_as_a_table() -> None:
    lines = [line.split() for line in printed(ADAPTER, with_=report.print_adapter).splitlines()]
    assert " ".join(lines[0]) == "english: peft, 2 low-rank pairs, 1 whole tensor, 1 bias, 3,857 parameters"
    assert lines[1] == ["module", "rank", "scale", "shape", "‖ΔW‖"]
    # ΔW = 2 * [[3, 0, 4], [6, 0, 8]], whose norm is 2 * 5 * √5
    assert lines[2] == ["q", "1", "2", "2", "x", "3", f"{10 * math.sqrt(5):.4g}"]
    assert lines[3] == ["v", "2", "0.5", "2", "x", "2", f"{math.sqrt(0.5):.4g}", "DoRA"]
    assert " ".join(lines[4]) == "DoRA rescales W + ΔW, so the whole change also depends on the base's weights"
    assert lines[5] == ["replaced", "as", "a", "whole:", "score.weight", "10", "x", "384", "float32"]
    assert lines[6] == ["added", "to", "a", "bias:", "k", "2"]
    assert lines[7] == ["note:", "rsLoRA:", "the", "scale", "is", "alpha/√r"]


def test_embeddings_and_convolutions_are_marked() -> None:
    table = LoraPair(a=np.ones((1, 9)), b=np.ones((2, 1)), scale=1.0, magnitude=np.ones(2), embedding=True)
    kernel = LoraPair(a=np.ones((1, 2, 3)), b=np.ones((4, 1, 1)), scale=1.0)
    lines = printed(Adapter("mixed", "peft", {"e": table, "c": kernel}), with_=report.print_adapter).splitlines()
    assert lines[2].split()[-2:] == ["DoRA", "embedding"]
    assert lines[3].split()[3:] == ["4", "x", "2", "x", "3", f"{math.sqrt(24):.4g}", "convolution"]


def test_token_rows_have_their_number_and_width() -> None:
    rows = {"e.weight": TokenRows(np.array([1, 7]), np.ones((2, 3), np.float32))}
    lines = printed(Adapter("tokens", "peft", {}, token_rows=rows), with_=report.print_adapter).splitlines()
    assert lines == ["tokens: peft, 2 rows, 6 parameters", "rows replaced: e.weight  2 x 3 float32"]


def test_norm_is_that_of_the_delta() -> None:
    rng = np.random.default_rng(3)
    pair = LoraPair(a=rng.normal(size=(4, 6, 3, 3)), b=rng.normal(size=(5, 4, 1, 1)), scale=-0.7)
    adapter = Adapter("conv", "peft", {"c": pair})
    norm = np.linalg.norm(pair.delta().ravel())
    assert f"  {norm:.4g}  convolution\n" in printed(adapter, with_=report.print_adapter)


def test_new_adapter_is_said_to_change_nothing() -> None:
    pair = LoraPair(a=np.ones((1, 2)), b=np.zeros((2, 1)), scale=1.0)
    assert "this adapter changes nothing" in printed(Adapter("new", "peft", {"q": pair}), with_=report.print_adapter)
    assert "this adapter changes nothing" not in printed(ADAPTER, with_=report.print_adapter)


# --- Plans and merges ---


def test_quantisation_errors_are_a_range_and_the_largest_ones() -> None:
    losses = tuple(
        QuantisationLoss(f"w{number}", "nf4", 1.0, number / 100, number / 100, 0.5 if number == 4 else None)
        for number in range(1, 31)
    )
    merged = replace(a_merge_report(), quantisation=losses)
    (_, line) = printed(merged, with_=report.print_merge_summary).splitlines()
    assert line == (
        "quantisation error ‖Q-W‖/‖W‖ of 30 dequantised weights: 0.01 to 0.3, ‖Q-W‖/‖ΔW‖ of 1 of them: 0.08 to 0.08"
    )
    rows = printed(merged, with_=report.print_merge_report).splitlines()[1:]
    assert rows[0] == line and rows[2].split() == ["w30", "nf4", "0.3", "0.3", "-"]
    assert rows[-1].endswith("more weights, with the same error or a smaller one")
    assert len(rows) < 30


def test_plan_is_printed_as_its_text() -> None:
    assert printed(a_plan(), with_=report.print_plan) == f"{a_plan()}\n"


def test_merge_report_lists_the_weights_with_the_lowest_retention() -> None:
    retentions = [0.999, 0.42, 1.0, 0.95, math.nan, 0.97, 0.98]
    results = [a_result(f"layer.{number}", retention) for number, retention in enumerate(retentions)]
    lines = printed(a_merge_report(*results), Path("merged"), with_=report.print_merge_report).splitlines()
    assert lines[0] == (
        "7 weights merged; 88.1 MB written to merged in 0.25 s (352.4 MB/s), 80.2 MB of them copied unchanged"
    )
    rows = [line.split() for line in lines[2:-1]]
    assert [row[0] for row in rows] == ["layer.4", "layer.1", "layer.3", "layer.5", "layer.6"]
    assert rows[1] == ["layer.1", "0.0123", "0.4200", "0.02", "90.0%"]
    assert lines[-1] == "2 more weights, with the same retention or a higher one"


def test_merge_report_names_the_replaced_tensors() -> None:
    head = a_merge_report(*map(a_result, "abcd"), replaced=("score.weight",))
    first = printed(head, with_=report.print_merge_report).splitlines()[0]
    assert first.startswith("4 weights merged, 1 tensor replaced (score.weight); 88.1 MB written in 0.25 s")
    many = a_merge_report(replaced=tuple(f"head.{number}.weight" for number in range(7)))
    first = printed(many, with_=report.print_merge_report).splitlines()[0]
    assert first.startswith("0 weights merged, 7 tensors replaced (head.0.weight, ")
    assert "head.4.weight and 2 more); 88.1 MB" in first


def test_weights_with_low_retention_are_coloured() -> None:
    results = a_result("lost", 0.4), a_result("retained", 1.0), a_result("unknown", math.nan)
    lines = printed(a_merge_report(*results), with_=report.print_merge_report, terminal=True).splitlines()
    assert [("lost" in line or "unknown" in line) for line in lines] == ["\x1b[33m" in line for line in lines]


def test_merge_without_low_rank_weights_is_one_line() -> None:
    assert printed(a_merge_report(), with_=report.print_merge_report).splitlines() == [
        "0 weights merged; 88.1 MB written in 0.25 s (352.4 MB/s), 80.2 MB of them copied unchanged"
    ]


def test_console_cuts_nothing_and_reads_no_markup() -> None:
    file = io.StringIO()
    to = report.console(file)
    to.print("[bold]W[/bold] :smile: " + "1234567890 " * 30)
    assert file.getvalue() == "[bold]W[/bold] :smile: " + "1234567890 " * 30 + "\n"
