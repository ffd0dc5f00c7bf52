"""What training writes: cards, metrics, and the table of a comparison."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

import lora_export as le
from support.api import MODEL


def test_ranks_and_strategies_are_compared_in_a_table(data: Path, tmp_path: Path) -> None:
    options = {"epochs": 2, "batch_size": 8, "compare": ["full", "frozen"]}
    result = le.train(MODEL, data, tmp_path / "out", rank=[2, 4], **options)
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    assert {"comparison.json", "comparison.png", "comparison.html", "rank-2/README.md"} <= written
    table = json.loads((tmp_path / "out/comparison.json").read_text())["runs"]
    assert [(run["strategy"], run["rank"], run["trained_parameters"]) for run in table] == [
        ("lora", 2, 32), ("lora", 4, 64), ("full", None, table[0]["all_parameters"] - 32), ("frozen", None, 0),
    ]  # fmt: skip
    assert table[0]["losses"][0] == table[1]["losses"][0] == pytest.approx(table[2]["losses"][0])
    assert table[0]["memory"]["optimizer"] < table[1]["memory"]["optimizer"] < table[2]["memory"]["optimizer"]
    alone = le.train(MODEL, data, tmp_path / "alone", rank=4, epochs=2, batch_size=8)
    assert alone.adapter.sha256 == result.adapters[1].sha256  # nothing of the first training is left
    assert result.scores["full"].loss != result.scores["frozen"].loss


def test_the_card_and_the_metrics_tell_what_was_trained(data: Path, tmp_path: Path) -> None:
    result = le.train(MODEL, data, tmp_path / "ad", rank=2, epochs=2, evaluate_every=2, batch_size=8)
    card = (tmp_path / "ad/README.md").read_text()
    for text in ("library_name: peft", "SHA-256 of the data", hashlib.sha256(data.read_bytes()).hexdigest()):
        assert text in card
    lines = [json.loads(line) for line in (tmp_path / "ad/metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == list(result.history.losses)
    assert [line["step"] for line in lines if "held_out_loss" in line] == [2, 4, 6]
