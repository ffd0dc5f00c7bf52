"""The main job through the command line, on a user's own module: train, merge, export, verify."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

from lora_export import cli, formats
from lora_export.models.load import load_model
from support import FACTORIES
from support.cli import Capture, answer, call
from support.graphs import record_of
from support.handmade import graph_file
from support.slow import slow

MODEL = f"{FACTORIES}:spotter"


def signals(path: Path) -> Path:
    """Three classes of noisy signals whose level tells them apart."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 90)
    noise = rng.standard_normal((90, 4, 9)).astype(np.float32)
    np.savez(path, signal=noise + labels[:, None, None].astype(np.float32), labels=labels)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter trained by the command line, and the base's weights as safetensors."""
    folder = tmp_path_factory.mktemp("flow")
    signals(folder / "signals.npz")
    code = call(
        *("train", MODEL, "--data", folder / "signals.npz", "-o", folder / "adapter", "--rank", "4", "--alpha", "8"),
        *("--epochs", "6", "--learning-rate", "1e-2", "--batch-size", "16"),
    )
    assert code == 0
    save_file(load_model(MODEL).module.state_dict(), folder / "base.safetensors")
    return folder


def test_training_reaches_attention_and_is_what_it_says_it_is(place: Path) -> None:
    adapter = formats.load(place / "adapter")
    assert "encoder.layers.0.self_attn" in adapter.pairs  # packed in_proj_weight
    assert "encoder.layers.1.self_attn.out_proj" in adapter.pairs
    assert {pair.scale for pair in adapter.pairs.values()} == {2.0}
    assert not any(pair.is_identity for pair in adapter.pairs.values())


def test_training_is_repeatable_and_better_than_nothing(place: Path, tmp_path: Path, capsys: Capture) -> None:
    options = ("--rank", "4", "--alpha", "8", "--epochs", "6", "--learning-rate", "1e-2", "--batch-size", "16")
    code, told = answer(capsys, "train", MODEL, "--data", place / "signals.npz", "-o", tmp_path / "again", *options)
    assert code == 0
    assert told["accuracy"]["adapter"] > told["accuracy"]["adapter_off"]
    assert "PEFT reads adapters of nn.MultiheadAttention in another way" in capsys.readouterr().err
    first, again = (load_file(path / "adapter_model.safetensors") for path in (place / "adapter", tmp_path / "again"))
    assert all(np.array_equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("mode", [slow("merged"), "nodes"])
def test_onnx_is_proven_published_and_proven_again(place: Path, mode: str, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out.onnx"
    code, told = answer(capsys, "onnx", MODEL, "-a", place / "adapter", "-o", out, "--lora", mode)
    assert (code, told["proof"]["outcome"]) == (0, "same")
    graph = onnx.load(out)
    branches = [value.name for value in graph.graph.initializer if "lora_A" in value.name]
    assert ("encoder.layers.0.self_attn.lora_A.weight" in branches) == (mode == "nodes")
    record = record_of(out)
    assert record["adapters"][0]["sha256"] == formats.load(place / "adapter").sha256
    assert record["verdict"]["outcome"] == "same"
    reports = tmp_path / "verdict.json", tmp_path / "verdict.xml"
    options = [part for path in reports for part in ("--report", path)]
    code, told = answer(capsys, "verify", out, "--model", MODEL, "-a", place / "adapter", *options)
    assert (code, told["outcome"]) == (0, "same")
    assert told["placement"]["off_provider"] == []
    assert json.loads(reports[0].read_text())["outcome"] == "same"
    assert ElementTree.parse(reports[1]).getroot().get("failures") == "0"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.onnx", "verdict.json", "verdict.xml"]


@pytest.mark.parametrize("mode", ["merged", slow("nodes")])
def test_torchscript_is_proven_published_and_proven_again(
    place: Path, mode: str, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out.pt"
    code, told = answer(capsys, "torchscript", MODEL, "-a", place / "adapter", "-o", out, "--lora", mode)
    assert (code, told["proof"]["outcome"]) == (0, "same")
    code, told = answer(capsys, "verify", out, "--model", MODEL, "-a", place / "adapter")
    assert (code, told["outcome"]) == (0, "same")


def test_a_state_dict_is_merged_and_proven(place: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "merged.safetensors"
    assert call("merge", place / "base.safetensors", place / "adapter", "-o", out) == 0
    code, told = answer(capsys, "verify", out, "--model", MODEL, "-a", place / "adapter")
    assert (code, told["outcome"]) == (0, "same")


def test_a_module_that_was_never_merged_is_different(place: Path, capsys: Capture) -> None:
    code, told = answer(capsys, "verify", place / "base.safetensors", "--model", MODEL, "-a", place / "adapter")
    assert (code, told["outcome"]) == (4, "different")


def test_half_the_strength_is_different(place: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "half.safetensors"
    assert call("merge", place / "base.safetensors", place / "adapter", "-o", out, "--weight", "0.5") == 0
    code, _ = answer(capsys, "verify", out, "--model", MODEL, "-a", place / "adapter")
    assert code == 4
    code, _ = answer(capsys, "verify", out, "--model", MODEL, "-a", place / "adapter", "--weight", "0.5")
    assert code == 0


@pytest.mark.fault(43)
def test_cuda_that_is_not_there_is_exit_6(place: Path, tmp_path: Path, capsys: Capture) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: the refusal cannot be seen here")
    out = tmp_path / "out.onnx"
    assert call("onnx", MODEL, "-a", place / "adapter", "-o", out, "--provider", "cuda") == 6
    told = capsys.readouterr()
    assert "CUDAExecutionProvider" in told.err
    assert told.out == ""  # onnxruntime prints what it misses; stdout is for answers
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_graph_is_exit_8(place: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "noise.onnx").write_bytes(b"no graph")
    assert call("verify", tmp_path / "noise.onnx", "--model", MODEL, "-a", place / "adapter") == 8
    assert "onnxruntime refused" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["onnx", "nowhere.py:make", "-o", "{out}"], 3, "there is no file nowhere.py"),
        (["onnx", MODEL, "-a", "{place}/adapter", "-o", "{place}/signals.npz/x.onnx"], 7, "is not a folder"),
        (["onnx", MODEL, "-a", "{place}/adapter", "-o", "{place}/base.safetensors"], 2, "name it {place}/base.onnx"),
        (["torchscript", MODEL, "-a", "{place}/adapter", "-o", "{place}/base.onnx"], 2, "name it {place}/base.pt"),
        (
            ["merge", "{place}/base.safetensors", "{place}/adapter", "-o", "{place}/base"],
            7,
            "base.safetensors is the input",
        ),
        (["onnx", MODEL, "-a", "{place}/adapter"], 2, "Missing option '-o'"),
        (["torchscript", MODEL, "-a", "{place}/adapter", "--lora", "rows", "-o", "{out}"], 2, "'rows'"),
        (["verify", "{place}/signals.npz", "--model", MODEL], 3, "a candidate is"),
        (["verify", "{place}/base.safetensors", "--model", MODEL, "--report", "{out}.pdf"], 3, ".json"),
        (["verify", "{place}/base.safetensors", "--model", MODEL, "--provider", "cuda"], 2, "--provider cuda"),
        (["train", MODEL, "--data", "{place}/signals.npz", "-o", "{out}", "--target", "query"], 3, "query"),
        (["train", MODEL, "--data", "{place}/signals.npz", "-o", "{out}", "--compare", "partly"], 2, "none of full"),
    ],
)
def test_what_cannot_be_done_is_told_with_its_code_and_leaves_nothing(
    place: Path, tmp_path: Path, capsys: Capture, arguments: list[str], code: int, message: str
) -> None:
    before = sorted(place.rglob("*"))
    capsys.readouterr()
    assert call(*(part.format(place=place, out=tmp_path / "out") for part in arguments)) == code
    told = capsys.readouterr()
    assert message.format(place=place) in told.err
    assert told.out == ""
    assert "Traceback" not in told.err
    assert list(tmp_path.iterdir()) == []
    assert sorted(place.rglob("*")) == before


WITHOUT = """
import sys
from lora_export.cli import run
for package, words in (("onnx", ["inspect"]), ("torch", ["verify", "--model", "y"])):
    sys.modules[package] = None
    assert run([*words, "some.onnx"]) == 6
    del sys.modules[package]
for folder in ("library", "version"):
    sys.path.insert(0, folder)
    assert run(["onnx", "x:y", "-o", "out.onnx"]) == 6
    del sys.path[0]
"""


@pytest.mark.fault(43)
def test_packages_that_are_missing_or_do_not_load_are_exit_6(tmp_path: Path) -> None:
    graph_file(tmp_path / "some.onnx", {"fc": np.ones((3, 2), np.float32)})
    for folder, source in {
        "library": "raise OSError('libcudart.so.13: cannot open shared object file: No such file or directory')",
        "version": "raise ImportError('libcublas.so.13: version not found', name='torch._C')",
    }.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "torch.py").write_text(source)
    line = [sys.executable, "-c", WITHOUT]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    onnx_, torch_, library, version = done.stderr.splitlines()
    assert "needs the package onnx" in onnx_ and "needs the package torch" in torch_
    assert library.startswith("Error: a library does not load: libcudart.so.13: cannot open shared object file")
    assert version.startswith("Error: the package torch does not load: libcublas.so.13: version not found")
    assert all("`lora-export doctor` shows what is wrong" in each for each in (library, version))


@pytest.mark.fault(43)
def test_a_gpu_that_is_too_small_is_exit_6(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def too_large(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(cli.cli, "main", too_large)
    assert call("inspect", "x") == 6
    assert capsys.readouterr().err.startswith("Error: there is not enough memory: CUDA out of memory.")


def test_memory_that_pytorch_cannot_allocate_is_exit_6(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(cli.cli, "main", lambda *_, **__: torch.empty(1 << 58))
    assert call("inspect", "x") == 6
    assert capsys.readouterr().err.startswith(f"Error: there is not enough memory for {4 << 58:,} bytes at once")


@pytest.mark.cuda
@pytest.mark.fault(43)
def test_what_a_gpu_says_when_it_is_too_small_is_known() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1 << 50, device="cuda")


@pytest.mark.fault(44)
def test_tf32_by_the_environment_is_refused_for_a_proof_on_cuda(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    assert call("onnx", MODEL, "-o", tmp_path / "out.onnx", "--provider", "cuda") == 6
    assert "NVIDIA_TF32_OVERRIDE=1 turns TF32 on" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.fault(44)
def test_variables_that_change_results_are_in_file_and_verdict(
    place: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {"NVIDIA_TF32_OVERRIDE": "1", "ORT_CUDA_GEMM_OPTIONS": "3"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "out.onnx"
    code, told = answer(capsys, "onnx", MODEL, "-a", place / "adapter", "-o", out)
    assert code == 0 and variables.items() <= told["proof"]["about"].items()
    record = record_of(out)
    assert record["verdict"]["variables"] == variables
