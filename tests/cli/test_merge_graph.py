"""The command `merge` on a graph."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_export import cli
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.storage import block_copy
from support.cli import Capture
from support.folder_contents import folder_contents
from support.graphs import stored
from support.handmade import base_file, graph_file, peft_adapter
from support.merged_graphs import WEIGHTS, A, B, packed_graph

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_copy, "BLOCK", 1000)


def test_base_of_another_graph_is_refused(tmp_path: Path, capsys: Capture) -> None:
    graph, base = packed_graph(tmp_path / "folder")
    tensors = load_file(base)
    tensors["attn.q_proj.weight"][3, 3] += 1
    save_file(tensors, base)
    adapter = peft_adapter(tmp_path / "ad", {"attn.q_proj": (A, RNG.integers(-3, 4, (30, 2)))})
    line = ["merge", str(graph), str(adapter), "-o", str(tmp_path / "out.onnx")]
    assert cli.run([*line, "--base", str(base)]) == 3
    assert "attn.q_proj" in capsys.readouterr().err
    assert cli.run(line) == 3  # nor without a base
    assert cli.run(["merge", str(base), str(adapter), "-o", str(tmp_path / "o"), "--base", str(base)]) == 2
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("lora_export.inputs", "the files of its adapters contain fingerprints of its weights"),
        ("lora_export.rows", "its rows choose among the adapters in it"),
    ],
)
def test_graph_with_adapter_inputs_is_refused(tmp_path: Path, key: str, reason: str, capsys: Capture) -> None:
    path = graph_file(tmp_path / "m.onnx", WEIGHTS, **{key: "{}"})
    peft_adapter(tmp_path / "ad", {"up": (A, B)})
    assert cli.run(["merge", str(path), str(tmp_path / "ad"), "-o", str(tmp_path / "out.onnx"), "--dry-run"]) == 3
    assert f"m.onnx takes adapters: {reason}. Merge into the graph" in capsys.readouterr().err


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    graph_file(tmp_path / "base.onnx", WEIGHTS, data="base.data")
    peft_adapter(tmp_path / "ad", {"up": (A, B)})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_graph_is_merged_and_reported(folder: Path, capsys: Capture) -> None:
    assert cli.run(["merge", "base.onnx", "ad", "-o", "m.onnx", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["output"], [result["weight"] for result in document["results"]]) == ("m.onnx", ["up.weight"])
    assert np.array_equal(stored(load_graph(folder / "m.onnx"), "up.weight"), WEIGHTS["up.weight"] + (B @ A).T)
    assert document["bytes"] == sum(path.stat().st_size for path in folder.glob("m.onnx*"))


def test_overwriting_removes_old_data_file(folder: Path, capsys: Capture) -> None:
    assert cli.run(["merge", "base.onnx", "ad", "-o", "m.onnx"]) == 0
    (old,) = folder.glob("m.onnx.*.data")
    assert cli.run(["merge", "base.onnx", "ad", "-o", "m.onnx", "--overwrite", "--weight", "2"]) == 0
    (new,) = folder.glob("m.onnx.*.data")
    assert new != old and f"removed {old.name}" in capsys.readouterr().err


def test_dry_run_prints_plan_and_writes_nothing(folder: Path, capsys: Capture) -> None:
    before = folder_contents(folder)
    assert cli.run(["merge", "base.onnx", "ad", "-o", "m.onnx", "--dry-run"]) == 0
    assert "up.weight" in capsys.readouterr().out
    assert folder_contents(folder) == before


def onto_itself(folder: Path) -> list[str]:
    return ["merge", "base.onnx", "ad", "-o", "base.onnx", "--overwrite"]


def another_type(folder: Path) -> list[str]:
    return ["merge", "base.onnx", "ad", "-o", "m.onnx", "--dtype", "float16"]


def a_misfit(folder: Path) -> list[str]:
    peft_adapter(folder / "other", {"up": (A, B[:-1]), "nowhere": (A, B)})
    return ["merge", "base.onnx", "other", "-o", "m.onnx"]


def nothing_there(folder: Path) -> list[str]:
    return ["merge", "none.onnx", "ad", "-o", "m.onnx"]


def no_graph(folder: Path) -> list[str]:
    (folder / "text.onnx").write_text("no graph at all")
    return ["merge", "text.onnx", "ad", "-o", "m.onnx"]


def lost(folder: Path) -> list[str]:
    graph_file(folder / "half.onnx", {name: np.full((40, 30), 1000, np.float16) for name in WEIGHTS})
    return ["merge", "half.onnx", "ad", "-o", "m.onnx", "--weight", "0.01"]


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        (onto_itself, 7, r"base.onnx"),
        (another_type, 2, r"--dtype is for checkpoints"),
        (a_misfit, 3, r"2 of 2 targets do not fit the base\.(?s:.)*nowhere(?s:.)*\nNothing was written.\n$"),
        (nothing_there, 3, r"none.onnx"),
        (no_graph, 3, r"text.onnx is no ONNX file"),
        (lost, 3, r"1 of 1 weights would lose most of their change(?s:.)*up.weight: 0.0% of the change"),
    ],
)
def test_refused_merge_writes_nothing(
    folder: Path, capsys: Capture, line: Callable[[Path], list[str]], code: int, message: str
) -> None:
    arguments = line(folder)
    before = folder_contents(folder)
    assert cli.run(arguments) == code
    assert re.search(message, capsys.readouterr().err)
    assert folder_contents(folder) == before


@pytest.mark.parametrize("command", [["merge", "lost.onnx", "ad"], ["onnx", "lost.onnx", "-a", "ad", "--no-verify"]])
def test_base_is_named_where_the_graph_lost_its_names(folder: Path, capsys: Capture, command: list[str]) -> None:
    graph_file(folder / "lost.onnx", {"onnx::MatMul_7": WEIGHTS["up.weight"]})
    before = folder_contents(folder)
    assert cli.run([*command, "-o", "m.onnx"]) == 3
    assert "--base CHECKPOINT, from which the graph was exported, finds" in capsys.readouterr().err
    assert folder_contents(folder) == before
    base_file(folder / "base.safetensors", {"up.weight": WEIGHTS["up.weight"].T})
    assert cli.run([*command, "-o", "m.onnx", "--base", "base.safetensors"]) == 0
