"""The record in what lora-export writes, read again from each kind of output."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

import lora_export as le
from lora_export.artifacts import record
from lora_export.artifacts.artifact import open_artifact
from lora_export.errors import InputRefused
from support.api import MODEL, an_adapter, base_weights
from support.handmade import graph_file


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    an_adapter(folder / "fr")
    (folder / "base").mkdir()
    base_weights(folder / "base" / "model.safetensors")
    (folder / "base" / "config.json").write_text("{}")
    return folder


def test_every_output_has_its_record(place: Path) -> None:
    adapter = place / "fr"
    le.merge(place / "base", adapter, place / "merged")
    le.merge(place / "base" / "model.safetensors", adapter, place / "m.safetensors", weights=[0.5])
    le.export_torchscript(MODEL, place / "m.pt", adapters=adapter, verify=False)
    for mode in ("merged", "nodes", "inputs", "rows"):
        le.export_onnx(MODEL, place / f"{mode}.onnx", adapters=adapter, lora=mode, verify=False)
        found = open_artifact(place / f"{mode}.onnx").record
        assert found and found.mode == mode and found.by_row == (["fr"] if mode == "rows" else None)
        assert found.content["verdict"] == {"outcome": "not verified", "why": "--no-verify"}
    for name, weight in (("merged", 1.0), ("m.safetensors", 0.5), ("m.pt", 1.0), ("nodes.onnx", 1.0)):
        (recorded,) = open_artifact(place / name).record.adapters
        assert (recorded["name"], recorded["weight"]) == ("fr", weight) and len(recorded["sha256"]) == 64
        assert open_artifact(place / name).record.base


def test_what_others_wrote_has_no_record(place: Path, tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_bytes(b"x")
    graph_file(tmp_path / "m.onnx", {"up.weight": np.eye(4, dtype=np.float32)})
    for path in (place / "base", place / "base" / "model.safetensors", tmp_path / "m.onnx", tmp_path / "model.pt2"):
        assert not open_artifact(path).record


def test_an_enormous_or_damaged_record_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        archive.writestr("m/extra/lora_export.json", '{"adapters": 1}')
    with pytest.raises(InputRefused, match="damaged"):
        _ = open_artifact(tmp_path / "m.pt").record
    monkeypatch.setattr(record, "MAX_RECORD", 3)
    with pytest.raises(InputRefused, match="the record has 15 bytes"):
        _ = open_artifact(tmp_path / "m.pt").record
