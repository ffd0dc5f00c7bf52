"""`lora-export train`: scores and files that are printed, and options that are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lora_export import formats
from lora_export.cli.train import MEASURED
from support.api import MODEL
from support.cli import answer, call


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = np.random.default_rng(0).standard_normal((24, 5, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", rows=rows, weights=np.ones((24, 5), np.float32), labels=np.tanh(rows[..., ::-1]))
    return tmp_path / "data.npz"


def test_scores_and_the_adapter_are_printed(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = data.parent / "ad"
    assert call("train", MODEL, "--data", data, "-o", out, "--rank", "2", "--epochs", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines[:-1]] == [MEASURED["adapter"], MEASURED["adapter_off"]]
    assert lines[-1] == f"wrote {out} ({formats.load(out).parameters:,} numbers)"


def test_json_has_the_figures_of_the_training(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = data.parent / "ad"
    line = ("train", MODEL, "--data", data, "-o", out, "--rank", "3", "--alpha", "6", "--batch-size", "4")
    code, document = answer(capsys, *line, "--epochs", "2", "--holdout", "0.5")
    adapter = formats.load(out)
    assert (code, document["output"], document["sha256"]) == (0, str(out), adapter.sha256)
    assert document["parameters"] == adapter.parameters == 3 * 8 + 8 * 3
    assert document["steps"] == 6  # 2 epochs of 12 examples, 4 in each step
    assert set(document["loss"]) == {"adapter", "adapter_off"} and document["seconds"] > 0
    assert {(pair.rank, pair.scale) for pair in adapter.pairs.values()} == {(3, 2.0)}


def test_rslora_divides_by_the_root_of_the_rank(data: Path) -> None:
    out = data.parent / "ad"
    assert call("train", MODEL, "--data", data, "-o", out, "--rank", "4", "--alpha", "6", "--rslora") == 0
    assert {pair.scale for pair in formats.load(out).pairs.values()} == {3.0}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rank", "0"), "Invalid value for '--rank'"),
        (("--alpha", "0"), "Invalid value for '--alpha'"),
        (("--holdout", "1"), "Invalid value for '--holdout'"),
        (("--device", "tpu"), "Invalid value for '--device'"),
        (("--compare-frozen",), "--compare-frozen needs a head"),
    ],
)
def test_wrong_usage_ends_with_2(
    data: Path, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("train", MODEL, "--data", data, "-o", data.parent / "ad", *words) == 2
    assert message in capsys.readouterr().err and not (data.parent / "ad").exists()


def test_a_missing_file_ends_with_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", MODEL, "--data", tmp_path / "none.npz", "-o", tmp_path / "ad") == 3
    assert "none.npz" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
