"""Candidates by kind of artifact."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from lora_export.artifacts.artifact import open_artifact
from lora_export.errors import InputRefused
from lora_export.models.load import from_module, load_model
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.open_artifact import RUNNERS, HowToOpen, open_candidate
from lora_export.runtime.runner import Arrays, PlainRunner, TooSlow
from lora_export.runtime.torchscript.runner import ScriptRunner
from lora_export.storage.artifact_kinds import ArtifactKind
from support.generators import small_decoder
from support.small_models import small_model

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[n, 2] x) => (float[n, 2] y) <float[2, 2] w = {1.0, 2.0, 3.0, 4.0}> { y = MatMul (x, w) }
"""
MODEL = from_module(torch.nn.Linear(2, 2), {"input": torch.ones(3, 2)})


def test_kind_of_file_decides_the_runner(tmp_path: Path) -> None:
    onnx.save(onnx.parser.parse_model(TEXT), tmp_path / "m.onnx")
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(3, 2)), tmp_path / "m.pt")
    assert isinstance(open_candidate(open_artifact(tmp_path / "m.onnx"), HowToOpen(MODEL)), OnnxRunner)
    assert isinstance(open_candidate(open_artifact(tmp_path / "m.pt"), HowToOpen(MODEL)), ScriptRunner)
    (tmp_path / "m.txt").write_text("words")
    with pytest.raises(
        InputRefused, match=r"a candidate is an \.onnx, \.pt, \.pt2, \.pte, \.safetensors or \.xml file"
    ):
        open_candidate(open_artifact(tmp_path / "m.txt"), HowToOpen(MODEL))


def test_every_kind_of_candidate_has_a_time_limit(tmp_path: Path) -> None:
    module, x = torch.nn.Linear(2, 2), torch.ones(3, 2)
    torch.export.save(torch.export.export(module, (x,)), tmp_path / "m.pt2")
    save_file(module.state_dict(), tmp_path / "m.safetensors")
    model = small_model("llama", tmp_path / "folder")
    bases = {"m.pt2": MODEL, "m.safetensors": MODEL, "folder": load_model(str(model))}
    for name, base in bases.items():
        inputs = {key: value.numpy() for key, value in base.example_inputs().items()}
        assert open_candidate(open_artifact(tmp_path / name), HowToOpen(base)).run(inputs)
        with pytest.raises(TooSlow, match=rf"{name} did not finish within 1e-09 seconds"):
            open_candidate(open_artifact(tmp_path / name), HowToOpen(base, timeout=1e-9)).run(inputs)


def test_a_graph_gets_positions_where_the_inputs_have_none(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (int64[n, t] input_ids, int64[n, t] attention_mask, int64[n, t] position_ids) => (int64[n, t] y)
    { y = Identity (position_ids) }
    """
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    base = load_model(str(small_decoder("llama", tmp_path / "base")))
    inputs = {"input_ids": np.array([[5, 5, 5]]), "attention_mask": np.array([[0, 1, 1]])}
    assert open_candidate(open_artifact(tmp_path / "m.onnx"), HowToOpen(base)).run(inputs)["y"].tolist() == [[0, 1, 2]]


def test_a_gguf_file_is_no_candidate_beside_another_model(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputRefused, match=r'm\.gguf is compared with the GGUF file .*: model="BASE\.gguf"'):
        open_candidate(open_artifact(tmp_path / "m.gguf"), HowToOpen(MODEL))


def test_every_kind_of_artifact_has_a_runner_or_is_refused() -> None:
    assert set(RUNNERS) == set(ArtifactKind) - {ArtifactKind.ADAPTER, ArtifactKind.GGUF, ArtifactKind.OTHER}


def test_a_runner_is_a_row_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(PlainRunner):
        axes: ClassVar = {}
        names_known = True

        def run(self, inputs: Arrays) -> Arrays:
            return {name: 2 * value for name, value in inputs.items()}

    (tmp_path / "m.txt").write_text("words")
    monkeypatch.setitem(RUNNERS, ArtifactKind.OTHER, lambda path, how: Doubled())  # type: ignore[arg-type, index]
    with contextlib.closing(open_candidate(open_artifact(tmp_path / "m.txt"), HowToOpen(MODEL))) as runner:
        assert runner.run({"x": np.ones(2)})["x"].tolist() == [2, 2]
        assert (runner.placement, *runner.notes, *runner.cannot_give) == (None,)
