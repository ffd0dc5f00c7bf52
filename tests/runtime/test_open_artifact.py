"""Candidates by kind of file, and the hashes of their files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from lora_export.errors import InputRefused
from lora_export.models import factory
from lora_export.models.load import load_model
from lora_export.runtime import open_artifact
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.open_artifact import file_hashes, open_candidate
from lora_export.runtime.runner import TooSlow
from lora_export.runtime.torchscript.runner import ScriptRunner
from lora_export.storage.hashes import HASH_BLOCK
from support.generators import small_decoder
from support.small_models import small_model

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[n, 2] x) => (float[n, 2] y) <float[2, 2] w = {1.0, 2.0, 3.0, 4.0}> { y = MatMul (x, w) }
"""
PEAK = Path("/proc/self/clear_refs")  # sets the peak of this process to what it takes now
MODEL = factory.from_module(torch.nn.Linear(2, 2), {"input": torch.ones(3, 2)})


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_kind_of_file_decides_the_runner(tmp_path: Path) -> None:
    onnx.save(onnx.parser.parse_model(TEXT), tmp_path / "m.onnx")
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(3, 2)), tmp_path / "m.pt")
    assert isinstance(open_candidate(tmp_path / "m.onnx", MODEL), OnnxRunner)
    assert isinstance(open_candidate(tmp_path / "m.pt", MODEL), ScriptRunner)
    (tmp_path / "m.txt").write_text("words")
    with pytest.raises(InputRefused, match=r"a candidate is an \.onnx, \.pt, \.pt2 or \.safetensors file"):
        open_candidate(tmp_path / "m.txt", MODEL)


def test_every_kind_of_candidate_has_a_time_limit(tmp_path: Path) -> None:
    module, x = torch.nn.Linear(2, 2), torch.ones(3, 2)
    torch.export.save(torch.export.export(module, (x,)), tmp_path / "m.pt2")
    save_file(module.state_dict(), tmp_path / "m.safetensors")
    model = small_model("llama", tmp_path / "folder")
    bases = {"m.pt2": MODEL, "m.safetensors": MODEL, "folder": load_model(str(model))}
    for name, base in bases.items():
        inputs = {key: value.numpy() for key, value in base.example_inputs().items()}
        assert open_candidate(tmp_path / name, base).run(inputs)
        with pytest.raises(TooSlow, match=rf"{name} did not finish within 1e-09 seconds"):
            open_candidate(tmp_path / name, base, timeout=1e-9).run(inputs)


@pytest.mark.parametrize(("name", "positions"), [("llama", [0, 1, 2]), ("opt", [-1, 0, 1])])
def test_a_graph_gets_the_positions_that_the_model_finds(name: str, positions: list[int], tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (int64[n, t] input_ids, int64[n, t] attention_mask, int64[n, t] position_ids) => (int64[n, t] y)
    { y = Identity (position_ids) }
    """
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    base = load_model(str(small_decoder(name, tmp_path / "base")))
    inputs = {"input_ids": np.array([[5, 5, 5]]), "attention_mask": np.array([[0, 1, 1]])}
    assert open_candidate(tmp_path / "m.onnx", base).run(inputs)["y"].tolist() == [positions]


@pytest.mark.parametrize("block", [HASH_BLOCK, 3])
def test_hashes_include_external_data_and_all_files_of_a_folder(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_artifact, "HASH_BLOCK", block)  # the name that is looked for is split into several
    model = onnx.parser.parse_model(TEXT)
    (weight,) = model.graph.initializer
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight), "w"))
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    both = {name: sha256(tmp_path / name) for name in ("m.onnx", "m.data")}
    assert file_hashes(tmp_path / "m.onnx") == both == file_hashes(tmp_path)
    assert list(file_hashes(tmp_path / "m.data")) == ["m.data"]


@pytest.mark.skipif(not PEAK.exists(), reason="only Linux starts the measured peak anew")
def test_a_graph_is_hashed_block_by_block(tmp_path: Path) -> None:
    """Pages of a file that is mapped count as the process's memory."""
    model = onnx.parser.parse_model(TEXT)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(1 << 24, np.float32), "large"))
    onnx.save(model, tmp_path / "m.onnx")  # 64 MiB
    del model

    def peak() -> int:
        text = Path("/proc/self/status").read_text()
        return int(text.split("VmHWM:")[1].split()[0]) << 10

    PEAK.write_text("5")
    before = peak()
    assert file_hashes(tmp_path / "m.onnx")
    assert peak() - before < 16 << 20
