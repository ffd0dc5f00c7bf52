"""`lora-export train`: scores and files that are printed, and options that are refused."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import lora_export.api.train
from lora_export import formats
from lora_export.cli.train import MEASURED
from lora_export.storage.store_path import place
from lora_export.training.order import split_rows
from support.api import MODEL
from support.cli import Capture, answer, call
from support.small_models import small_model, words_tokenizer


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = np.random.default_rng(0).standard_normal((24, 5, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", rows=rows, weights=np.ones((24, 5), np.float32), labels=np.tanh(rows[..., ::-1]))
    return tmp_path / "data.npz"


def test_scores_and_the_adapter_are_printed(data: Path, capsys: Capture) -> None:
    out = data.parent / "ad"
    assert call("train", MODEL, "--data", data, "-o", out, "--rank", "2", "--epochs", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    off = "held-out examples, adapter disabled"  # there is no head
    assert [line.partition(": ")[0] for line in lines[:-1]] == [MEASURED["adapter"], off]
    assert lines[-1] == f"wrote {out} ({formats.load(out).parameters:,} numbers)"


def test_json_has_the_figures_of_the_training(data: Path, capsys: Capture) -> None:
    out = data.parent / "ad"
    line = ("train", MODEL, "--data", data, "-o", out, "--rank", "3", "--alpha", "6", "--batch-size", "4")
    code, document = answer(capsys, *line, "--epochs", "2", "--holdout", "0.5")
    adapter = formats.load(out)
    assert (code, document["output"], document["sha256"]) == (0, str(out), adapter.sha256)
    assert document["parameters"] == adapter.parameters == 3 * 8 + 8 * 3
    assert document["steps"] == 6  # 2 epochs of 12 examples, 4 in each step
    assert set(document["loss"]) == {"adapter", "adapter_off"} and document["seconds"] > 0
    assert {(pair.rank, pair.scale) for pair in adapter.pairs.values()} == {(3, 2.0)}


def test_json_has_no_number_for_a_loss_that_is_not_finite(data: Path, capsys: Capture) -> None:
    _, held_out = split_rows(np.zeros(24, np.int64), 0.5, seed=0)
    with np.load(data) as arrays:
        labels = arrays["labels"].copy()
        labels[held_out] *= 1e30  # their squares are no fp32
        np.savez(data, **{**arrays, "labels": labels})
    line = ("train", MODEL, "--data", data, "-o", data.parent / "ad", "--rank", "2", "--epochs", "1")
    code, document = answer(capsys, *line, "--holdout", "0.5")
    assert code == 0 and document["loss"]["adapter"] is None and document["loss"]["adapter_text"] == "inf"


def test_an_output_in_a_store_is_printed_as_its_address(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    adapter, run = SimpleNamespace(parameters=24, replaced={}), SimpleNamespace(rank=2)
    result = SimpleNamespace(output=place("s3://bucket/ad"), adapters=[adapter], adapter=adapter, runs=[run], scores={})
    monkeypatch.setattr(lora_export.api.train, "train", lambda **_: result)
    assert call("train", MODEL, "--data", "data.npz", "-o", "s3://bucket/ad") == 0
    assert capsys.readouterr().out == "wrote s3://bucket/ad (24 numbers)\n"


def test_an_output_without_a_name_is_refused(data: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.chdir(data.parent)
    assert call("train", MODEL, "--data", data, "-o", ".") == 7
    assert capsys.readouterr().err.endswith("Error: . cannot be written to: name a file or folder in it\n")
    assert list(data.parent.iterdir()) == [data]


@pytest.mark.slow
def test_several_ranks_print_a_table(data: Path, capsys: Capture) -> None:
    out = data.parent / "ad"
    line = ("train", MODEL, "--data", data, "-o", out, "--rank", "2", "--rank", "4", "--compare", "full,frozen")
    assert call(*line, "--epochs", "1") == 0
    printed = capsys.readouterr().out
    rows = [row.split() for row in printed.splitlines()]
    assert rows[0][:3] == ["strategy", "rank", "trained"]
    assert [row[0] for row in rows[1:5]] == ["LoRA", "LoRA", "all", "base"]
    assert [row[1:3] for row in rows[1:3]] == [["2", "32"], ["4", "64"]]
    assert printed.endswith(f"wrote {out / 'rank-2'} (32 numbers)\nwrote {out / 'rank-4'} (64 numbers)\n")
    code, document = answer(capsys, *line, "--epochs", "1", "--overwrite")
    assert code == 0 and [run["strategy"] for run in document["runs"]] == ["lora", "lora", "full", "frozen"]


@pytest.mark.slow
def test_columns_of_the_data_may_have_other_names(tmp_path: Path, capsys: Capture) -> None:
    base = words_tokenizer(small_model("llama", tmp_path / "base"))
    (tmp_path / "a.csv").write_text("body,kind\n" + "a good film,1\nbad film,2\n" * 4)
    line = ("train", base, "--data", tmp_path / "a.csv", "-o", tmp_path / "ad", "--column", "text=body", "--rank", "2")
    assert call(*line) == 0
    assert "8 examples (language-modelling)" in capsys.readouterr().err
    assert call(*line, "--column", "label=kind", "--overwrite") == 0
    assert "8 examples of 2 classes (classification)" in capsys.readouterr().err
    assert call(*line, "--column", "label=kind", "--task", "language-modelling", "--overwrite") == 0
    assert "8 examples (language-modelling)" in capsys.readouterr().err
    assert call(*line, "--column", "label=none", "--overwrite") == 3
    assert "has no column none; it has body, kind" in capsys.readouterr().err


def test_patterns_are_read_and_wrong_ones_are_refused(data: Path, capsys: Capture) -> None:
    line = ("train", MODEL, "--data", data, "--epochs", "1", "--rank", "2", "-o", data.parent / "ad")
    assert call(*line, "--target-pattern", "d.*e", "--rank-pattern", "d[e]nse=3", "--alpha-pattern", "dense=4.5") == 0
    (pair,) = formats.load(data.parent / "ad").pairs.values()
    assert (pair.rank, pair.scale) == (3, 1.5)
    capsys.readouterr()
    for option, code, message in (
        (("--rank-pattern", "dense"), 2, "dense is not REGEX=RANK, such as q_proj=4"),
        (("--rank-pattern", "dense=1.5"), 2, "dense=1.5 is not REGEX=RANK"),
        (("--rank-pattern", "=2"), 2, "=2 is not REGEX=RANK"),
        (("--rank-pattern", "dense=0"), 3, "the rank of `dense` is 0: it must be positive"),
        (("--rank-pattern", "dens=2"), 3, "`dens` matches the name of no adapted layer; the nearest: dense"),
        (("--rank-pattern", "dense=9"), 3, "the rank is larger than 1 of 1 layers"),
        (("--target-pattern", "dens"), 3, "`dens` matches the whole name of no layer to adapt; the nearest: dense"),
        (("--target-parameter", "dense"), 3, "`dense` is no stacked parameter of experts; the model has none"),
        (("--token-index", "1"), 3, "in the one table of input embeddings; the module has none"),
        (("--continue-from", data.parent / "ad"), 2, "--rank cannot be given beside it"),
    ):  # fmt: skip
        assert call(*line[:-1], data.parent / "none", *option) == code
        assert message in " ".join(capsys.readouterr().err.split()), option
        assert not (data.parent / "none").exists()


@pytest.mark.slow
def test_a_killed_and_an_interrupted_training_end_with_the_same_bits(data: Path, capfd: Capture) -> None:
    """SIGKILL, then --resume and Ctrl-C, then the command that this prints: the curve of one whole run."""
    out, whole = data.parent / "ad", data.parent / "whole"
    line = ["train", MODEL, "--data", str(data), "--rank", "2", "--batch-size", "4", "--epochs", "400"]
    line += ["--save-every", "50"]
    assert call(*line, "-o", whole) == 0
    state = data.parent / "ad.training/state.safetensors"

    def run_until_saved(*words: str, end: signal.Signals) -> tuple[int, str]:
        before = state.stat().st_mtime_ns if state.exists() else 0
        command = [sys.executable, "-m", "lora_export", *line, "-o", str(out), *words]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            while not state.exists() or state.stat().st_mtime_ns == before:
                assert process.poll() is None, "it ended before a checkpoint"
            process.send_signal(end)
            _, told = process.communicate()
        return process.returncode, told

    assert run_until_saved(end=signal.SIGKILL)[0] == -signal.SIGKILL
    assert not out.exists()
    code, told = run_until_saved("--resume", end=signal.SIGINT)
    assert code == 130 and not out.exists() and "ad.training had been written" in told
    (command,) = [text for text in told.splitlines() if text.startswith("to continue: lora-export ")]
    assert call(*shlex.split(command.removeprefix("to continue: lora-export "))) == 0
    assert not state.exists()
    curves = [
        [json.loads(text)["loss"] for text in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (whole, out)
    ]
    assert curves[0] == curves[1] and len(curves[0]) == 2000
    assert formats.load(whole).sha256 == formats.load(out).sha256


def test_rslora_divides_by_the_root_of_the_rank(data: Path) -> None:
    out = data.parent / "ad"
    assert call("train", MODEL, "--data", data, "-o", out, "--rank", "4", "--alpha", "6", "--rslora") == 0
    assert {pair.scale for pair in formats.load(out).pairs.values()} == {3.0}


def test_a_base_in_4_bits_needs_bitsandbytes_and_a_folder(
    data: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ("train", MODEL, "-o", data.parent / "ad", "--quantize-base", "nf4")
    assert call(*line, "--data", data) == 3
    assert "--quantize-base is for Hugging Face folders of transformers" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert call(*line, "--data", data.parent / "none.npz") == 6  # before the data are read
    assert "pip install 'bitsandbytes>=" in capsys.readouterr().err
    assert [path.name for path in data.parent.iterdir()] == ["data.npz"]


@pytest.mark.parametrize(
    ("rank", "count", "printed"),
    [
        (0, 1, "to continue: lora-export train"),
        (0, 2, "to continue, launch as before: -m lora_export train"),
        (1, 2, ""),
    ],
)
def test_the_command_that_continues_is_printed_by_one_process(
    rank: int, count: int, printed: str, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    (data.parent / "ad.training").mkdir()
    monkeypatch.setattr("lora_export.api.train.train", interrupted)
    monkeypatch.setattr("lora_export.training.processes.rank", lambda: rank)
    monkeypatch.setattr("lora_export.training.processes.world_size", lambda: count)
    assert call("train", MODEL, "--data", data, "-o", data.parent / "ad") == 130
    lines = [line for line in capsys.readouterr().err.splitlines() if "to continue" in line]
    assert len(lines) == bool(printed)
    assert all(line.startswith(f"{printed} {MODEL} ") and line.endswith(" --resume") for line in lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rank", "0"), "Invalid value for '--rank'"),
        (("--alpha", "0"), "Invalid value for '--alpha'"),
        (("--holdout", "1"), "Invalid value for '--holdout'"),
        (("--device", "tpu"), "Invalid value for '--device'"),
        (("--compare", "frozen,half"), "half is none of full, frozen"),
        (("--patience", "2", "--holdout", "0"), "--keep-best need held-out examples"),
        (("--column", "text"), "text is not NAME=COLUMN"),
        (("--quantize-base", "nf4", "--compare", "full"), "--compare full trains all weights"),
        (("--quantize-base", "int4"), "Invalid value for '--quantize-base'"),
        (("--rank", "2", "--rank", "2"), "each --rank is given once"),
        (("--rank", "2", "--rank", "4", "--resume"), "a comparison is not continued"),
        (("--packing",), "--packing is for texts that a causal language model continues"),
    ],
)
def test_wrong_usage_ends_with_2(data: Path, words: tuple[str, ...], message: str, capsys: Capture) -> None:
    assert call("train", MODEL, "--data", data, "-o", data.parent / "ad", *words) == 2
    assert message in capsys.readouterr().err and not (data.parent / "ad").exists()
