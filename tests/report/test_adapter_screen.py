"""An adapter on the terminal: its layers as a table, and everything else that it changes."""

from __future__ import annotations

import math

import numpy as np

from lora_export.lora import Adapter, LoraPair, TokenRows
from lora_export.report.adapter_screen import print_adapter
from support.records import ADAPTER
from support.screens import printed


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
