"""An adapter on the terminal: its layers as a table, and everything else that it changes."""

from __future__ import annotations

import functools
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_export.adapters.low_rank import LayerShare
from lora_export.lora import Adapter, LoraPair, TokenRows
from lora_export.report.console import PlainConsole, console
from lora_export.report.screens import (
    adapter_facts,
    by_kind,
    kind_of,
    print_adapter,
    print_merge,
    print_plan,
    print_shares,
    title,
)
from lora_export.weights.merge_report import OutputResult, QuantisationLoss, QuantisedLayer
from support.records import ADAPTER, a_merge_report, a_plan, a_result
from support.screens import printed
from support.written import adapter_of, low_rank

whole_merge = functools.partial(print_merge, whole=True)


def test_adapter_is_printed_as_a_table() -> None:
    lines = [line.split() for line in printed(print_adapter, ADAPTER).splitlines()]
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
    lines = printed(print_adapter, Adapter("mixed", "peft", {"e": table, "c": kernel})).splitlines()
    assert lines[2].split()[-2:] == ["DoRA", "embedding"]
    assert lines[3].split()[3:] == ["4", "x", "2", "x", "3", f"{math.sqrt(24):.4g}", "convolution"]


def test_token_rows_have_their_number_and_width() -> None:
    rows = {"e.weight": TokenRows(np.array([1, 7]), np.ones((2, 3), np.float32))}
    lines = printed(print_adapter, Adapter("tokens", "peft", {}, token_rows=rows)).splitlines()
    assert lines == ["tokens: peft, 2 rows, 6 parameters", "rows replaced: e.weight  2 x 3 float32"]


def test_norm_is_that_of_the_delta() -> None:
    rng = np.random.default_rng(3)
    pair = LoraPair(a=rng.normal(size=(4, 6, 3, 3)), b=rng.normal(size=(5, 4, 1, 1)), scale=-0.7)
    adapter = Adapter("conv", "peft", {"c": pair})
    norm = np.linalg.norm(pair.delta().ravel())
    assert f"  {norm:.4g}  convolution\n" in printed(print_adapter, adapter)


def test_new_adapter_is_said_to_change_nothing() -> None:
    pair = LoraPair(a=np.ones((1, 2)), b=np.zeros((2, 1)), scale=1.0)
    assert "this adapter changes nothing" in printed(print_adapter, Adapter("new", "peft", {"q": pair}))
    assert "this adapter changes nothing" not in printed(print_adapter, ADAPTER)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("encoder.layer.11.attention.query", "encoder.layer.*.attention.query"),
        ("0.weight", "*.weight"),
        ("h.0.1", "h.*.*"),
        ("h.0.experts.up_proj[12]", "h.*.experts.up_proj[*]"),
        ("h.0.experts.up_proj[3, 0:16]", "h.*.experts.up_proj[*, 0:16]"),
        ("layer1.conv2", "layer1.conv2"),
        ("fc", "fc"),
    ],
)
def test_numbers_between_dots_are_those_of_layers(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_items_of_one_kind_and_look_are_a_group() -> None:
    shapes = {"h.0.fc": 3, "h.0.out": 3, "h.1.fc": 3, "h.2.fc": 4}
    groups = by_kind(shapes, str, lambda name: shapes[name])
    assert groups == [["h.0.fc", "h.1.fc"], ["h.0.out"], ["h.2.fc"]]
    assert [title(group) for group in groups] == ["h.*.fc", "h.0.out", "h.2.fc"]


def test_flattened_names_are_grouped_by_the_numbers_between_underscores():
    assert (
        kind_of("denoiser/down_blocks_1_attentions_0_attn1_to_out_0")
        == "denoiser/down_blocks_*_attentions_*_attn1_to_out_0"
    )
    assert kind_of("time_embed.linear_1") == "time_embed.linear_1"


def facts(**metadata: Any) -> list[tuple[str, str]]:
    return list(adapter_facts(adapter_of({"fc": low_rank(2, 2, 1)}, metadata=metadata)))


def test_scales_and_plain_fields_are_shown() -> None:
    adapter = adapter_of(
        {"fc": low_rank(2, 2, 1)}, scale_source="alpha / rank", metadata={"r": 2, "task_type": "X", "more": [1]}
    )
    assert list(adapter_facts(adapter)) == [("scales", "alpha / rank"), ("r", "2"), ("task_type", "X")]


def test_trigger_words_and_frequent_tags_are_found_in_a_header() -> None:
    tags = {"10_a": {"ohwx ": 7, "a dog": 2}, "5_b": {"ohwx": 1, "cat": 9, "wrong": "many"}, "odd": 3}
    header = {
        "modelspec.trigger_phrase": "ohwx dog",
        "modelspec.title": "dogs",
        "ss_output_name": "dogs",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_tag_frequency": json.dumps(tags),
    }
    assert facts(header=header) == [
        ("title", "dogs"),
        ("trigger words", "ohwx dog"),
        ("trained for", "sdxl_base_v1-0"),
        ("most frequent tags", "cat, ohwx, a dog"),
        ("header", "5 entries (json=True lists them)"),
    ]


@pytest.mark.parametrize("tags", ["{", "[1]", '{"a": 1}', '{"a": {"b": "c"}}', "[" * 100_000, "x" * 2_000_000])
def test_damaged_tags_are_left_out(tags: str) -> None:
    assert facts(header={"ss_tag_frequency": tags}) == [("header", "1 entry (json=True lists them)")]


def test_long_values_are_shortened() -> None:
    assert facts(note="x" * 1000) == [("note", "x" * 100 + "...")]


def shares_printed(*shares: float, whole: bool = False, rank: int = 4) -> list[str]:
    file = io.StringIO()
    layers = [LayerShare(f"layer.{n}", (8, 8), rank - n % 2, 8, share, 1.0) for n, share in enumerate(shares)]
    print_shares(console(file), Path("out\nsame: forged"), layers, whole=whole)
    return file.getvalue().splitlines()


def test_the_layers_with_the_least_share_come_first() -> None:
    lines = shares_printed(0.9, 0.5, 0.7, 0.99, 1.0, 0.8)
    assert lines[0] == r"wrote out\nsame: forged: 6 pairs of rank 3 to 4, 81.5% of ‖ΔW‖²"
    assert [line.split()[0] for line in lines[2:-1]] == ["layer.1", "layer.2", "layer.5", "layer.0", "layer.3"]
    assert lines[-1] == "1 more layer, with the same share or a higher one (-v)"
    assert len(shares_printed(0.9, 0.5, 0.7, 0.99, 1.0, 0.8, whole=True)) == 8
    for whole in (False, True):  # norms alone differ
        assert shares_printed(whole=whole) == [r"wrote out\nsame: forged: 0 pairs"]


def test_nothing_is_listed_where_nothing_is_lost() -> None:
    assert shares_printed(1.0, 1.0) == [r"wrote out\nsame: forged: 2 pairs of rank 3 to 4, 100.0% of ‖ΔW‖²"]


def test_a_loss_is_not_rounded_away() -> None:
    assert "over 99.9%" in shares_printed(0.99999)[0]


# --- A merge on the terminal: one line, and the weights that lost most to rounding. ---


def test_promoted_layers_are_shown_with_the_reason() -> None:
    layers = (
        QuantisedLayer("kept.weight", "nf4", "nf4", "", 0.97, 0.3),
        QuantisedLayer("lost.weight", "nf4", "bfloat16", "2.0% of its change would be left", 0.02, 0.99),
        QuantisedLayer("fused.weight", "nf4", "bfloat16", "fused with lost.weight", None, None),
    )
    report = replace(a_merge_report(), layers=layers, bytes=110, base_bytes=100)
    _, line, _, first, second = printed(print_merge, report).splitlines()
    assert line.endswith("1 kept in their scheme, 2 promoted; 110 bytes, 1.10 times the base")
    assert " ".join(first.split()) == "lost.weight nf4 bfloat16 0.02 0.99 2.0% of its change would be left"
    assert " ".join(second.split()) == "fused.weight nf4 bfloat16 - - fused with lost.weight"
    assert printed(whole_merge, report).splitlines()[-1].split() == ["kept.weight", "nf4", "nf4", "0.97", "0.3"]


def test_quantisation_errors_are_a_range_and_the_largest_ones() -> None:
    losses = tuple(
        QuantisationLoss(f"w{number}", "nf4", 1.0, number / 100, number / 100, 0.5 if number == 4 else None)
        for number in range(1, 31)
    )
    merged = replace(a_merge_report(), quantisation=losses)
    (_, line) = printed(print_merge, merged).splitlines()
    assert line == (
        "quantisation error ‖Q-W‖/‖W‖ of 30 dequantised weights: 0.01 to 0.3, ‖Q-W‖/‖ΔW‖ of 1 of them: 0.08 to 0.08"
    )
    rows = printed(whole_merge, merged).splitlines()[1:]
    assert rows[0] == line and rows[2].split() == ["w30", "nf4", "0.3", "0.3", "-"]
    assert rows[-1].endswith("more weights, with the same error or a smaller one")
    assert len(rows) < 30


def test_output_errors_are_shown_beside_those_of_the_nearest() -> None:
    outputs = [OutputResult(1.0, error, 0.5, 0.8, is_calibrated=error < 0.8) for error in (0.2, 0.8)]
    results = [replace(a_result(f"w{number}", 0.4), outputs=each) for number, each in enumerate(outputs)]
    line = "1 of 2 layers calibrated; error of outputs on held-out inputs, relative to the adapters' effect: 0.2 to 0.8"
    (_, found) = printed(print_merge, a_merge_report(*results)).splitlines()
    assert found == f"{line}, with the nearest numbers 0.8 to 0.8"
    rows = printed(whole_merge, a_merge_report(*results)).splitlines()
    assert rows[-2].split() == ["w1", "0.8", "0.8", "1", "0.5"]


def test_plan_is_printed_as_its_text() -> None:
    assert printed(print_plan, a_plan()) == f"{a_plan()}\n"


def test_merge_report_lists_the_weights_with_the_lowest_retention() -> None:
    retentions = [0.999, 0.42, 1.0, 0.95, math.nan, 0.97, 0.98]
    results = [a_result(f"layer.{number}", retention) for number, retention in enumerate(retentions)]
    lines = printed(whole_merge, a_merge_report(*results), Path("merged")).splitlines()
    assert lines[0] == (
        "7 weights merged; 88.1 MB written to merged in 0.25 s (352.4 MB/s), 80.2 MB of them copied unchanged"
    )
    rows = [line.split() for line in lines[2:-1]]
    assert [row[0] for row in rows] == ["layer.4", "layer.1", "layer.3", "layer.5", "layer.6"]
    assert rows[1] == ["layer.1", "0.0123", "0.4200", "0.02", "90.0%"]
    assert lines[-1] == "2 more weights, with the same retention or a higher one"


def test_merge_report_names_the_replaced_tensors() -> None:
    head = a_merge_report(*map(a_result, "abcd"), replaced=("score.weight",))
    first = printed(whole_merge, head).splitlines()[0]
    assert first.startswith("4 weights merged, 1 tensor replaced (score.weight); 88.1 MB written in 0.25 s")
    many = a_merge_report(replaced=tuple(f"head.{number}.weight" for number in range(7)))
    first = printed(whole_merge, many).splitlines()[0]
    assert first.startswith("0 weights merged, 7 tensors replaced (head.0.weight, ")
    assert "head.4.weight and 2 more); 88.1 MB" in first


def test_weights_with_low_retention_are_coloured() -> None:
    results = a_result("lost", 0.4), a_result("retained", 1.0), a_result("unknown", math.nan)
    lines = printed(whole_merge, a_merge_report(*results), terminal=True).splitlines()
    assert [("lost" in line or "unknown" in line) for line in lines] == ["\x1b[33m" in line for line in lines]


def test_merge_without_low_rank_weights_is_one_line() -> None:
    assert printed(whole_merge, a_merge_report()).splitlines() == [
        "0 weights merged; 88.1 MB written in 0.25 s (352.4 MB/s), 80.2 MB of them copied unchanged"
    ]


# --- The console: nothing is cut, and nothing in a name is markup. ---


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_colours_in_a_pipe_can_be_requested(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(console(io.StringIO()), PlainConsole)
    monkeypatch.setenv(variable, "1")
    assert console(io.StringIO()).is_terminal


def test_console_cuts_nothing_and_reads_no_markup() -> None:
    file = io.StringIO()
    to = console(file)
    to.print("[bold]W[/bold] :smile: " + "1234567890 " * 30)
    assert file.getvalue() == "[bold]W[/bold] :smile: " + "1234567890 " * 30 + "\n"
