"""A merge on the terminal: one line, and the weights that lost most to rounding."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from lora_export.report.merge_screen import print_merge_report, print_merge_summary, print_plan
from lora_export.weights.merge_report import QuantisationLoss
from support.records import a_merge_report, a_plan, a_result
from support.screens import printed


def test_quantisation_errors_are_a_range_and_the_largest_ones() -> None:
    losses = tuple(
        QuantisationLoss(f"w{number}", "nf4", 1.0, number / 100, number / 100, 0.5 if number == 4 else None)
        for number in range(1, 31)
    )
    merged = replace(a_merge_report(), quantisation=losses)
    (_, line) = printed(print_merge_summary, merged).splitlines()
    assert line == (
        "quantisation error ‖Q-W‖/‖W‖ of 30 dequantised weights: 0.01 to 0.3, ‖Q-W‖/‖ΔW‖ of 1 of them: 0.08 to 0.08"
    )
    rows = printed(print_merge_report, merged).splitlines()[1:]
    assert rows[0] == line and rows[2].split() == ["w30", "nf4", "0.3", "0.3", "-"]
    assert rows[-1].endswith("more weights, with the same error or a smaller one")
    assert len(rows) < 30


def test_plan_is_printed_as_its_text() -> None:
    assert printed(print_plan, a_plan()) == f"{a_plan()}\n"


def test_merge_report_lists_the_weights_with_the_lowest_retention() -> None:
    retentions = [0.999, 0.42, 1.0, 0.95, math.nan, 0.97, 0.98]
    results = [a_result(f"layer.{number}", retention) for number, retention in enumerate(retentions)]
    lines = printed(print_merge_report, a_merge_report(*results), Path("merged")).splitlines()
    assert lines[0] == (
        "7 weights merged; 88.1 MB written to merged in 0.25 s (352.4 MB/s), 80.2 MB of them copied unchanged"
    )
    rows = [line.split() for line in lines[2:-1]]
    assert [row[0] for row in rows] == ["layer.4", "layer.1", "layer.3", "layer.5", "layer.6"]
    assert rows[1] == ["layer.1", "0.0123", "0.4200", "0.02", "90.0%"]
    assert lines[-1] == "2 more weights, with the same retention or a higher one"


def test_merge_report_names_the_replaced_tensors() -> None:
    head = a_merge_report(*map(a_result, "abcd"), replaced=("score.weight",))
    first = printed(print_merge_report, head).splitlines()[0]
    assert first.startswith("4 weights merged, 1 tensor replaced (score.weight); 88.1 MB written in 0.25 s")
    many = a_merge_report(replaced=tuple(f"head.{number}.weight" for number in range(7)))
    first = printed(print_merge_report, many).splitlines()[0]
    assert first.startswith("0 weights merged, 7 tensors replaced (head.0.weight, ")
    assert "head.4.weight and 2 more); 88.1 MB" in first


def test_weights_with_low_retention_are_coloured() -> None:
    results = a_result("lost", 0.4), a_result("retained", 1.0), a_result("unknown", math.nan)
    lines = printed(print_merge_report, a_merge_report(*results), terminal=True).splitlines()
    assert [("lost" in line or "unknown" in line) for line in lines] == ["\x1b[33m" in line for line in lines]


def test_merge_without_low_rank_weights_is_one_line() -> None:
    assert printed(print_merge_report, a_merge_report()).splitlines() == [
        "0 weights merged; 88.1 MB written in 0.25 s (352.4 MB/s), 80.2 MB of them copied unchanged"
    ]
