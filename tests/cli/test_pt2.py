"""Commands on programs of torch.export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from fuzz.targets import run
from lora_export import cli
from support import FACTORIES
from support.cli import Capture
from support.factories import Wide
from support.programs import SUBJECTS, ProgramFiles, export


def call(capsys: Capture, *arguments: object) -> tuple[int, Any, str]:
    capsys.readouterr()
    code = cli.run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, json.loads(captured.out) if captured.out.startswith("{") else captured.out, captured.err


FACTORY = f"{FACTORIES}:wide"


def test_verify_takes_a_pt2_as_candidate_and_as_model(programs: ProgramFiles, tmp_path: Path, capsys: Capture) -> None:
    base, merged, adapter = programs.base("mlp"), programs.merged("mlp"), programs.adapter_folder("mlp")
    report = tmp_path / "verdict.json"
    code, result, _ = call(capsys, "verify", merged, "--model", base, "-a", adapter, "--report", report, "--json")
    assert (code, result["outcome"]) == (0, "same")
    assert list(result["about"]["candidate"]["sha256"]) == [merged.name]
    assert json.loads(report.read_text())["outcome"] == "same"
    code, result, _ = call(capsys, "verify", base, "--model", base, "-a", adapter, "--json")
    assert (code, result["outcome"]) == (4, "different")
    assert call(capsys, "verify", merged, "--model", base, "-a", adapter, "--provider", "cuda")[0] == 2


def test_an_exported_graph_is_verified_against_a_program(
    programs: ProgramFiles, tmp_path: Path, capsys: Capture
) -> None:
    torch.manual_seed(0)
    base = export(Wide(), SUBJECTS["mlp"].inputs, tmp_path / "base.pt2", dynamic=2)
    out, adapter = tmp_path / "out.onnx", programs.adapter_folder("mlp")
    assert call(capsys, "onnx", FACTORY, "-a", adapter, "-o", out)[0] == 0
    code, result, _ = call(capsys, "verify", out, "--model", base, "-a", adapter, "--json")
    assert (code, result["outcome"], result["placement"]["off_provider"]) == (0, "same", [])
    code, result, _ = call(capsys, "verify", out, "--model", base, "--json")
    assert (code, result["outcome"]) == (4, "different")


def test_a_program_cannot_be_exported_or_trained(programs: ProgramFiles, tmp_path: Path, capsys: Capture) -> None:
    base = programs.base("mlp")
    np.savez(tmp_path / "data.npz", rows=np.ones((4, 5, 64), np.float32), labels=np.ones((4, 5, 64), np.float32))
    for command in (
        ("onnx", base, "-o", tmp_path / "out.onnx"),
        ("torchscript", base, "-o", tmp_path / "out.pt"),
        ("train", base, "--data", tmp_path / "data.npz", "-o", tmp_path / "adapter"),
    ):
        code, output, error = call(capsys, *command)
        assert (code, output) == (3, "")
        assert "is an exported program already" in error and "`lora-export verify` accepts it" in error
    assert [path.name for path in tmp_path.iterdir()] == ["data.npz"]


def test_an_unknown_suffix_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "x.bin")
    code, _, error = run("verify", tmp_path / "x.bin", "--model", f"{FACTORIES}:worded")
    assert code == 3 and ".onnx, .pt, .pt2, .pte, .safetensors or .xml file" in error
    code, _, error = run("verify", tmp_path / "x.bin", "--model", tmp_path / "nothing")
    assert code == 3 and "or a .pt2 file" in error
