"""Which files of a folder were judged, and others that a loader might take in their place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_export.artifacts.artifact import open_artifact
from lora_export.artifacts.files import GRAPH_FILES
from lora_export.verification.judged_files import loaded_files
from support.cli import answer, call
from support.handmade import base_file, peft_adapter

W = np.arange(6).reshape(2, 3)
LEFTOVERS = [
    *("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "tf_model.h5"),
    *("flax_model.msgpack", "adapter_config.json", "adapter_model.bin", "model.bin", "model.ckpt.index"),
    *("consolidated.00.pth", "pytorch_model.fp16.bin", "diffusion_pytorch_model.bin"),
    *("diffusion_pytorch_model.fp16.bin", "diffusion_pytorch_model.safetensors.index.fp16.json"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    (folder / "base").mkdir()
    base_file(folder / "base/model.safetensors", {"fc.weight": W, "norm.weight": [1, 1]})
    (folder / "base/config.json").write_text('{"model_type": "llama"}')
    peft_adapter(folder / "adapter", {"fc": ([[1, 2, 3]], [[1], [10]])})
    assert call("merge", folder / "base", folder / "adapter", "-o", folder / "merged") == 0
    return folder


@pytest.fixture
def merged(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "own")
    return tmp_path / "own" / "merged"


def audit(merged: Path) -> list[str | Path]:
    return ["verify", merged, "--base", merged.parent / "base", "-a", merged.parent / "adapter"]


@pytest.mark.parametrize("name", LEFTOVERS)
def test_other_weights_that_a_loader_may_take_are_different(merged: Path, name: str) -> None:
    assert loaded_files(open_artifact(merged)).others.faults == ()
    (merged / name).write_bytes(b"{}")
    line = f"{name} is not what was judged, and a loader may take it. Remove it"
    assert loaded_files(open_artifact(merged)).others.faults == (line,)


def test_the_report_lists_what_was_judged(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("training_args.bin", "optimizer.pt", "notes.txt", "README.md"):
        (merged / name).write_bytes(b"")
    code, document = answer(capsys, *audit(merged))
    assert code == 0 and document["about"]["judged_files"] == ["config.json", "model.safetensors"]
    assert "not compared: notes.txt, optimizer.pt, training_args.bin" in document["notes"]


@pytest.mark.parametrize("name", ["sub/model.safetensors", "other.bin", "onnx/model.onnx", "q4.gguf"])
def test_other_weights_are_listed_as_not_judged(merged: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (merged / name).parent.mkdir(exist_ok=True)
    (merged / name).write_bytes(b"")
    code, document = answer(capsys, *audit(merged), "--no-strict")
    assert code == 0
    assert document["not_judged"] == [f"other weights in the folder: {name}"]
    assert call(*audit(merged), "--strict") == 5


def test_a_merged_decoder_beside_the_graphs_of_an_encoder_decoder_is_different(tmp_path: Path) -> None:
    for name in (*GRAPH_FILES, "config.json", "tokenizer.json", "quantised.onnx", "model.safetensors"):
        (tmp_path / name).touch()
    found = loaded_files(open_artifact(tmp_path))
    assert set(found.judged) == {*GRAPH_FILES, "config.json", "tokenizer.json"}
    assert found.others.faults == ()
    assert found.others.not_judged == ("other weights in the folder: model.safetensors, quantised.onnx",)
    (tmp_path / "decoder_model_merged.onnx").write_bytes(b"")
    (line,) = loaded_files(open_artifact(tmp_path)).others.faults
    assert line.startswith("decoder_model_merged.onnx is not what was judged, and a loader takes it before")


def test_a_config_that_names_other_weights_is_different(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((merged / "config.json").read_text())
    (merged / "config.json").write_text(json.dumps(config | {"transformers_weights": "other\n.bin"}))
    assert call(*audit(merged)) == 4
    assert r"config.json names the weights 'other\n.bin' (transformers_weights)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "model-00001-of-00002.safetensors", "x.safetensors"])
def test_a_second_set_of_safetensors_is_refused_by_name(
    merged: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"fc.weight": np.float32(W)}, merged / name)
    assert call(*audit(merged)) == 3
    assert name in capsys.readouterr().err
    table = {"weight_map": dict.fromkeys(("fc.weight", "norm.weight"), "model.safetensors")}
    (merged / "model.safetensors.index.json").write_text(json.dumps(table))
    assert call(*audit(merged)) == 3
    assert f"has an index and, besides its shards, {name}" in capsys.readouterr().err


def test_a_single_file_is_its_own(tmp_path: Path) -> None:
    path = base_file(tmp_path / "m.safetensors", {"fc.weight": W})
    found = loaded_files(open_artifact(path))
    assert found.judged == {"m.safetensors": path} and not found.others.notes
