"""How much each command prints: -q, the short screen, and -v."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_export.cli import COMMANDS
from lora_export.runtime import environment_probes
from support.api import MODEL, an_adapter, base_weights
from support.cli import call
from support.handmade import peft_adapter
from support.slow import slow

probed_once = functools.cache(environment_probes.run_in_child)
SHORT = 10  # lines of the short screen when all is well


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("screens")
    an_adapter(folder / "adapter")
    for number in range(6):
        an_adapter(folder / f"a{number}", scale=1 + number / 8)
    base_weights(folder / "base.safetensors")
    assert call("merge", folder / "base.safetensors", folder / "adapter", "-o", folder / "merged.safetensors") == 0
    assert call("onnx", MODEL, "-a", folder / "adapter", "-o", folder / "m.onnx", "--no-verify") == 0
    rng = np.random.default_rng(0)
    np.savez(
        folder / "data.npz",
        rows=rng.standard_normal((16, 4, 8)).astype(np.float32),
        weights=np.ones((16, 4), np.float32),
        labels=rng.standard_normal((16, 4, 8)).astype(np.float32),
    )
    return folder


def printed(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[list[str], list[str]]:
    """The lines on stdout and stderr of a command that succeeds."""
    capsys.readouterr()
    assert call(*words) == 0
    told = capsys.readouterr()
    return told.out.splitlines(), told.err.splitlines()


def test_a_green_verdict_is_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("verify", place / "m.onnx", "--model", MODEL, "-a", place / "adapter")
    out, err = printed(capsys, *words)
    (line,) = out
    assert line.startswith("same: error 0.0") and "× PyTorch's own rounding (limit " in line
    assert line.endswith(" nodes") and err == []
    assert printed(capsys, *words, "-q") == ([line], [])
    full, _ = printed(capsys, *words, "-v")
    assert full[0] == line and len(full) > SHORT
    assert any(text.endswith("within its limits") for text in full) and "note: the reference ran" in "".join(full)
    words = ("verify", place / "merged.safetensors", "--base", place / "base.safetensors", "-a", place / "adapter")
    assert printed(capsys, *words)[0] == printed(capsys, *words, "-q")[0] == printed(capsys, *words, "-v")[0][:1]
    assert len(printed(capsys, *words, "-v")[0]) == 3


@pytest.mark.parametrize(
    ("words", "quiet"),
    [
        (["merge", "base.safetensors", "adapter", "-o", "OUT.safetensors"], ["wrote OUT.safetensors"]),
        (["merge", "base.safetensors", "adapter", "-o", "OUT.safetensors", "--dry-run"], ["1 weight changed, 1 kept"]),
        slow(["onnx", MODEL, "-a", "adapter", "-o", "OUT.onnx"], ["same: ", "wrote OUT.onnx"]),
        slow(["torchscript", MODEL, "-a", "adapter", "-o", "OUT.pt"], ["same: ", "wrote OUT.pt"]),
        (["train", MODEL, "--data", "data.npz", "-o", "OUT", "--epochs", "1"], ["wrote OUT"]),
        slow(["doctor"], ["Nothing is wrong."]),
    ],
)
def test_quiet_is_verdict_and_paths_and_short_is_short(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    quiet: list[str],
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(environment_probes, "run_in_child", probed_once)  # each takes seconds; the screens are tested

    def to(name: str) -> list[str]:
        return [word.replace("OUT", str(tmp_path / name)) for word in words]

    out, err = printed(capsys, *to("quiet"), "-q")
    assert err == [] and len(out) == len(quiet)
    for line, expected in zip(out, quiet, strict=True):
        assert line.startswith(expected.replace("OUT", str(tmp_path / "quiet")))
    out, err = printed(capsys, *to("short"))
    assert len(quiet) <= len(out) + len(err) <= SHORT
    full, _ = printed(capsys, *to("full"), "-v")
    assert len(full) >= len(out)


@pytest.mark.slow
def test_many_adapters_are_summed_up(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapters = [word for number in range(6) for word in ("-a", str(place / f"a{number}"))]
    out, err = printed(capsys, "onnx", MODEL, *adapters, "--lora", "inputs", "-o", tmp_path / "m.onnx")
    assert len(out) + len(err) <= SHORT
    assert out[0].startswith("the base: same: ") and out[1].startswith("a") and ": same: " in out[1]
    assert out[5] == "and 2 adapters more, each the same and farther from its limits (-v)"
    assert out[-1] == "and 4 more files beside it (-v)"
    full, _ = printed(
        capsys, "onnx", MODEL, *adapters, "--lora", "inputs", "-o", tmp_path / "n.onnx", "-v", "--overwrite"
    )
    assert sum(line.startswith("wrote ") for line in full) == 7 and "a3:" in full


def test_a_wrong_verdict_is_explained_without_figures(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["verify", place / "m.onnx", "--model", MODEL, "-a", place / "a4"]
    capsys.readouterr()
    assert call(*words) == 4
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("different: ") and lines[1].startswith("  - You gave `a4`; this file contains")
    assert lines[2] == "first module that differs: dense"
    assert any(line.startswith("  - ") and "the error is" in line for line in lines[3:])
    assert not any("its limits" in line for line in lines)
    assert "note: the reference ran in fp64 throughout" in lines  # a note may explain
    assert call(*words, "-q") == 4
    assert capsys.readouterr().out.splitlines() == lines[:1]
    assert call(*words, "-v") == 4
    assert "NOT within its limits" in capsys.readouterr().out


@pytest.mark.slow
def test_an_undecided_export_shows_figures_with_verbose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    an_adapter(tmp_path / "faint", scale=1e-7)
    words = ["onnx", MODEL, "-a", tmp_path / "faint", "-o", tmp_path / "m.onnx"]
    assert call(*words) == 5
    short = capsys.readouterr().err
    assert "undecided: " in short and "its limits\n" not in short
    assert call(*words, "-v") == 5
    assert "its limits\n" in capsys.readouterr().err


def test_verbose_shows_the_original_of_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    an_adapter(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    words = ["inspect", tmp_path / "adapter"]
    assert call(*words) == 3
    short = capsys.readouterr().err
    assert len(short.splitlines()) == 1
    assert call(*words, "-v") == 3
    full = capsys.readouterr().err
    assert full.startswith(short) and "The original error:\n  Traceback (most recent call last):" in full


def test_notes_beyond_the_first_are_left_to_verbose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"fc.weight": np.ones((2, 3), np.float32)}, tmp_path / "base.safetensors")
    heads = {f"head{number}.weight": np.ones((1, 2), np.float32) for number in range(7)}
    peft_adapter(tmp_path / "adapter", {"fc": ([[1, 2, 3]], [[1], [2]])}, heads)
    words = ["merge", tmp_path / "base.safetensors", tmp_path / "adapter", "-o"]
    _, err = printed(capsys, *words, tmp_path / "short.safetensors")
    assert len(err) == 5 and err[-1] == "note: there are more notes. -v shows all of them"
    assert len(printed(capsys, *words, tmp_path / "full.safetensors", "-v")[1]) == 7
    assert printed(capsys, *words, tmp_path / "quiet.safetensors", "-q")[1] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_both_options_and_not_together(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(name, "--help") == 0
    told = capsys.readouterr().out
    assert "-q, --quiet" in told and "-v, --verbose" in told
    if name == "guide":
        assert call(name, "-q", "-v") == 2
        assert "-q and -v exclude each other" in capsys.readouterr().err


def test_quiet_guide_lists_the_names_alone(capsys: pytest.CaptureFixture[str]) -> None:
    from lora_export.cli.guide import TOPICS

    assert printed(capsys, "guide", "-q")[0] == list(TOPICS)
